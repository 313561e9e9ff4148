"""A learned prompt: a few vectors, the template that they are part of, and the base that they were learned on."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, cast

import torch
from torch import Tensor

from softprompt.errors import PromptError, WrongBase

Plain: TypeAlias = tuple[Tensor, ...]
"""A prompt's tensors alone: (vectors [P, D],) or (keys, values), [L, P, H, K] each."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of the base a prompt belongs to: its sizes, and digests of what it computes with.

    `weights_sha256` is of every weight, `tokenizer_sha256` of its tokens and how it splits texts, `config` the settings
    that matter as JSON; each is the same whether the base was loaded in float32 or bfloat16. `sha256` is of a sample
    of the weights, all that version 0.1 recorded. What is empty or 0 is unknown and not compared (a prompt saved by
    PEFT names its base, no more).
    """

    name: str
    revision: str | None = None
    sha256: str = ""
    width: int = 0
    layers: int = 0
    vocabulary: int = 0
    kv_heads: int = 0
    head_width: int = 0
    weights_sha256: str = ""
    tokenizer_sha256: str = ""
    config: str = field(default="", repr=False)

    @property
    def parts(self) -> dict[str, str]:
        """All that says what the base computes, by name; each setting of its config is a part."""
        digests = {
            "weights": self.sha256,
            "weights, all of them": self.weights_sha256,
            "tokenizer": self.tokenizer_sha256,
        }
        settings = {key: json.dumps(value) for key, value in _flat(json.loads(self.config or "{}")).items()}
        return {name: value for name, value in digests.items() if value} | settings

    @property
    def digest(self) -> str:
        """One digest of all parts; the base's name and revision are not among them."""
        return hashlib.sha256(json.dumps(sorted(self.parts.items())).encode()).hexdigest()

    @property
    def sampled_only(self) -> bool:
        """Whether version 0.1 recorded it: a change of a few weights, of the tokenizer or of the config goes unnoticed."""
        return bool(self.sha256) and not self.weights_sha256

    def demand(self, loaded: Fingerprint, prompt: str) -> None:
        """Raises WrongBase, naming the part, unless `loaded` is the base that this fingerprint was taken from."""
        for what in ("width", "layers", "vocabulary", "kv_heads", "head_width"):
            mine, theirs = getattr(self, what), getattr(loaded, what)
            if mine and theirs and mine != theirs:
                raise WrongBase(
                    f"{prompt}: learned on {self.name} ({what} {mine}), but the loaded base is {loaded.name} "
                    f"({what} {theirs}). Load {self.name}, or tune again."
                )
        advice = "Load the model that it was learned on, or tune again."
        weights = "weights_sha256" if self.weights_sha256 and loaded.weights_sha256 else "sha256"
        for digest, part in ((weights, "weights"), ("tokenizer_sha256", "tokenizer")):
            mine, theirs = getattr(self, digest), getattr(loaded, digest)
            if mine and theirs and mine != theirs:
                raise WrongBase(
                    f"{prompt}: learned on {self.name} ({part} {mine[:12]}), but the loaded base {loaded.name} "
                    f"has the same sizes and other {part} ({theirs[:12]}). {advice}"
                )
        # A setting that only one of the two has came with another version of transformers.
        was, now = (_flat(json.loads(config or "{}")) for config in (self.config, loaded.config))
        changed = [
            f"{key} was {was[key]}, is {now[key]}" for key in was if key in now and was[key] != now[key]
        ]
        if changed:
            raise WrongBase(
                f"{prompt}: learned on {self.name}, but the loaded base {loaded.name} computes otherwise with the same "
                f"weights. In its config {'; '.join(changed)}. {advice}"
            )


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings on one level: rope_parameters.rope_theta."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return flat


class _Learned:
    """The common part of soft and deep prompts: comparison by content, a short repr, saving and loading.

    Two prompts are equal if they have the same tensors, base, template and target and read special tokens alike, that
    is, if they answer alike on the same base. Name and other notes do not count. A prompt's tensors can be changed in place, so it has no hash: use
    `id(prompt)` or the name as a key.
    """

    kind: ClassVar[str]
    base: Fingerprint
    template: str
    target: str | None
    name: str
    notes: Mapping[str, Any]

    __hash__ = None  # type: ignore[assignment]

    @property
    def special_tokens(self) -> bool:
        """Whether special tokens that an input spells are read as such, as in training (data.special_tokens)."""
        recipe = self.notes.get("recipe")
        data = recipe.get("data") if isinstance(recipe, Mapping) else None
        return isinstance(data, Mapping) and data.get("special_tokens") is True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Learned):
            return NotImplemented
        mine, theirs = self.tensors, other.tensors
        return (
            self.kind == other.kind
            and (self.base, self.template, self.target) == (other.base, other.template, other.target)
            and self.special_tokens == other.special_tokens
            and all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)
        )

    def __repr__(self) -> str:
        learned = f", target={self.target!r}" if self.target else ""
        template = f", template={self.template!r}" if self.template else ""
        return (
            f"{type(self).__name__}({self.name!r}, {self.length} virtual tokens on {self.base.name!r}"
            f"{template}{learned})"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks. Everything in it is escaped: a prompt's texts may come from a stranger."""
        rows = {
            "kind": self.kind,
            "virtual tokens": self.length,
            "template": self.template or "none: in front of the text",
            "target": self.target or "all text",
            "base": self.base.name,
            "values": f"{sum(tensor.numel() for tensor in self.tensors.values()):,}",
        }
        cells = "".join(
            f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items()
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{cells}</table>"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the prompt into `folder`, as `softprompt.save_prompt` does. Raises SaveError."""
        # Files are the business of `store`, a layer above this one, so it is only looked up when it is asked for.
        return cast(Path, import_module("softprompt.store.artifact").save_prompt(self, folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: Fingerprint | None = None) -> Self:
        """Reads a prompt of this kind from a folder that softprompt or PEFT saved, as `softprompt.load_prompt` does.

        Raises PromptError for a prompt of the other kind, and what `load_prompt` raises."""
        # See save_pretrained.
        prompt = import_module("softprompt.store.artifact").load_prompt(folder, base=base)
        if not isinstance(prompt, cls):
            raise PromptError(
                f"{folder}: found a {prompt.kind} prompt, wanted a {cls.kind} one. Use "
                f"{type(prompt).__name__}.from_pretrained, or softprompt.load_prompt for either kind."
            )
        return prompt


@dataclass(eq=False, repr=False)
class SoftPrompt(_Learned):
    """Vectors in place of token embeddings (Lester et al. 2021).

    `embeddings_PD` is float32, in the units of the base's input embeddings. `template` says where they are inserted,
    `target` names the field that was learned (None: all text). `notes` records how the prompt was made: plain data.
    """

    embeddings_PD: Tensor
    base: Fingerprint
    template: str = ""
    target: str | None = None
    name: str = "prompt"
    notes: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "soft"

    def __post_init__(self) -> None:
        self.embeddings_PD = _checked(self.embeddings_PD, 2, "embeddings [P, D]", self.name)
        width = self.embeddings_PD.shape[1]
        if self.base.width and width != self.base.width:
            raise PromptError(
                f"{self.name}: the vectors are {width} wide, but its base {self.base.name} is {self.base.width} wide. "
                "They do not belong together."
            )

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.embeddings_PD.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        return {"embeddings_PD": self.embeddings_PD}

    @property
    def plain(self) -> Plain:
        """The vectors alone."""
        return (self.embeddings_PD,)


@dataclass(eq=False, repr=False)
class DeepPrompt(_Learned):
    """Keys and values for every layer (prefix tuning, Li and Liang 2021; P-tuning v2, Liu et al. 2022).

    Both are float32 [L, P, H, K], keys as the model caches them: rotated for positions 0..P-1 where it rotates.
    """

    keys_LPHK: Tensor
    values_LPHK: Tensor
    base: Fingerprint
    template: str = ""
    target: str | None = None
    name: str = "prompt"
    notes: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "deep"

    def __post_init__(self) -> None:
        self.keys_LPHK = _checked(self.keys_LPHK, 4, "keys [L, P, H, K]", self.name)
        self.values_LPHK = _checked(self.values_LPHK, 4, "values [L, P, H, K]", self.name)
        if self.keys_LPHK.shape != self.values_LPHK.shape:
            raise PromptError(
                f"{self.name}: keys are {tuple(self.keys_LPHK.shape)}, values {tuple(self.values_LPHK.shape)}. "
                "Wanted the same shape [L, P, H, K]."
            )
        layers, _, heads, head_width = self.keys_LPHK.shape
        for what, own, wanted in (
            ("layers", layers, self.base.layers),
            ("key/value heads", heads, self.base.kv_heads),
            ("head width", head_width, self.base.head_width),
        ):
            if wanted and own != wanted:
                raise PromptError(
                    f"{self.name}: {what} {own}, but its base {self.base.name} has {wanted}. "
                    "They do not belong together."
                )

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.keys_LPHK.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        return {"keys_LPHK": self.keys_LPHK, "values_LPHK": self.values_LPHK}

    @property
    def plain(self) -> Plain:
        """Keys and values alone."""
        return (self.keys_LPHK, self.values_LPHK)


Prompt = SoftPrompt | DeepPrompt


def prompt_of(plain: Plain, **about: Any) -> Prompt:
    """The prompt that these tensors are, with its base, template, target, name and notes."""
    if len(plain) == 1:
        return SoftPrompt(plain[0], **about)
    keys_LPHK, values_LPHK = plain
    return DeepPrompt(keys_LPHK, values_LPHK, **about)


def _checked(tensor: Tensor, dimensions: int, what: str, name: str) -> Tensor:
    if tensor.dim() != dimensions or 0 in tensor.shape:
        raise PromptError(
            f"{name}: found a tensor of shape {tuple(tensor.shape)}, wanted {what}, none of them 0."
        )
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PromptError(
            f"{name}: {bad} of {tensor.numel()} values in {what} are NaN or infinite. Tune again."
        )
    return tensor
