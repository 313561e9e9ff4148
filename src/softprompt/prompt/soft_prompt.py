"""The learned thing itself: a few vectors, the template they stand in, and the base they were learned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from softprompt.errors import PromptError, WrongBase

Plain: TypeAlias = tuple[Tensor, ...]
"""The tensors of a prompt and no more: (vectors [P, D],) or (keys, values), [L, P, H, K] each."""


@dataclass(frozen=True)
class Fingerprint:
    """Which base a prompt belongs to: its sizes, and a digest of its weights as bfloat16 numbers.

    The digest is the same whether the base was loaded in float32 or bfloat16, and differs for other weights of the
    same sizes. An empty `sha256` or a size of 0 is unknown (a prompt saved by PEFT names its base, no more).
    """

    name: str
    revision: str | None = None
    sha256: str = ""
    width: int = 0
    layers: int = 0
    vocabulary: int = 0
    kv_heads: int = 0
    head_width: int = 0

    def demand(self, loaded: Fingerprint, prompt: str) -> None:
        """Raise WrongBase unless `loaded` is the base that this fingerprint was taken from."""
        for what in ("width", "layers", "vocabulary", "kv_heads", "head_width"):
            mine, found = getattr(self, what), getattr(loaded, what)
            if mine and found and mine != found:
                raise WrongBase(
                    f"{prompt}: learned on {self.name} ({what} {mine}), but the loaded base is {loaded.name} "
                    f"({what} {found}). Load {self.name}, or tune again."
                )
        if self.sha256 and loaded.sha256 and self.sha256 != loaded.sha256:
            raise WrongBase(
                f"{prompt}: learned on {self.name} (weights {self.sha256[:12]}), but the loaded base {loaded.name} "
                f"has the same sizes and other weights ({loaded.sha256[:12]}). Load the very model it was learned "
                "on, or tune again."
            )


@dataclass
class SoftPrompt:
    """Vectors that stand where token embeddings would stand (Lester et al. 2021).

    `embeddings_PD` is float32, in the units of the base's input embeddings. `template` is where they stand, `target`
    the field that was learned (None: all text). `notes` holds what was recorded when it was made: plain data.
    """

    embeddings_PD: Tensor
    base: Fingerprint
    template: str = ""
    target: str | None = None
    name: str = "prompt"
    notes: Mapping[str, Any] = field(default_factory=dict)

    kind = "soft"

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
        """What is learned, by name."""
        return {"embeddings_PD": self.embeddings_PD}

    @property
    def plain(self) -> Plain:
        """The vectors alone."""
        return (self.embeddings_PD,)


@dataclass
class DeepPrompt:
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

    kind = "deep"

    def __post_init__(self) -> None:
        self.keys_LPHK = _checked(self.keys_LPHK, 4, "keys [L, P, H, K]", self.name)
        self.values_LPHK = _checked(self.values_LPHK, 4, "values [L, P, H, K]", self.name)
        if self.keys_LPHK.shape != self.values_LPHK.shape:
            raise PromptError(
                f"{self.name}: keys are {tuple(self.keys_LPHK.shape)}, values {tuple(self.values_LPHK.shape)}. "
                "Wanted the same shape [L, P, H, K]."
            )
        layers, _, heads, head_width = self.keys_LPHK.shape
        for what, found, wanted in (
            ("layers", layers, self.base.layers),
            ("key/value heads", heads, self.base.kv_heads),
            ("head width", head_width, self.base.head_width),
        ):
            if wanted and found != wanted:
                raise PromptError(
                    f"{self.name}: {what} {found}, but its base {self.base.name} has {wanted}. "
                    "They do not belong together."
                )

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.keys_LPHK.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by name."""
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
    tensor = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PromptError(
            f"{name}: {bad} of {tensor.numel()} values in {what} are NaN or infinite. Tune again."
        )
    return tensor
