"""One prompt on disk: PEFT's files where PEFT reads the prompt rightly, our own beside them, checked on loading.

    softprompt.json              ours: kind, shape, template, target, the base's fingerprint, notes, the tensors' digest
    adapter_model.safetensors    one float32 tensor, `prompt_embeddings`
    adapter_config.json          PEFT's description, a promise that PEFT reads it rightly (peft_format says when)
    README.md                    a model card for people

We also read what PEFT saves, which has no softprompt.json, and what version 0.1 saved, which always has PEFT's files.

Each file is first written in full as a draft; the prompt is saved when `softprompt.json`, which names the drafts that
belong to it, is moved to its place. A kill before that leaves the former prompt. One between that and the other moves
leaves drafts, which are read instead of the files that they were to replace; the next save removes them. One process
at a time saves into a folder; a reader who meets a save begins again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.prompt.soft_prompt import DeepPrompt, Fingerprint, Prompt, SoftPrompt
from softprompt.store import schema
from softprompt.store.atomic import draft_path, write_together
from softprompt.store.card import card
from softprompt.store.digest import digest_of
from softprompt.store.lock import SAVE
from softprompt.store.ownership import check_replaceable, writing
from softprompt.store.peft_format import DEEP, check_readable, peft_config, why_not_peft
from softprompt.store.plain_file import read_bytes
from softprompt.store.references import located
from softprompt.store.schema import Ours, PeftConfig

CONFIG, TENSORS, OURS, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "softprompt.json",
    "README.md",
)
ALL = (OURS, TENSORS, CONFIG, CARD)
LARGEST_TENSORS = 2**33  # bytes: a deep prompt of 10,000 positions for a base of 100 layers takes less
SAVE_WAITS_SECONDS = 60.0  # for another save into the same folder
READ_ATTEMPTS = 40  # of a folder that is being saved into; each save takes some milliseconds
PAUSE_SECONDS = 0.01
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Value = TypeVar("Value")


def save_prompt(prompt: Prompt, folder: str | Path, *, overwrite: bool = True) -> Path:
    """Writes `prompt` into `folder`, beside whatever else is there.

    A full disk or a kill, at any moment, leaves the former prompt or the new one. Only a prompt that softprompt wrote
    is replaced, and none with `overwrite` False. Raises SaveError."""
    folder = check_replaceable(folder, ALL, overwrite=overwrite)
    mark = secrets.token_hex(8)
    packed = _packed(prompt)
    tensors = safetensors.torch.save({"prompt_embeddings": packed}, metadata={"format": "pt"})
    for_peft = why_not_peft(prompt) is None
    ours = {
        "format": schema.FORMAT,
        "kind": prompt.kind,
        "name": prompt.name,
        "folder": folder.resolve().name,
        "length": prompt.length,
        "shape": list(prompt.plain[0].shape),
        "template": prompt.template,
        "target": prompt.target,
        "base": asdict(prompt.base),
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "peft": for_peft,
        "files": [OURS, TENSORS, *([CONFIG] if for_peft else []), CARD],
        "drafts": mark,
        "notes": prompt.notes,
    }
    files = {OURS: _json(ours), TENSORS: tensors}  # the first decides
    if for_peft:
        files[CONFIG] = _json(peft_config(prompt))
    files[CARD] = card(prompt).encode()
    with writing(folder, ALL, "saving a prompt", kind="prompt", lock=SAVE, wait_seconds=SAVE_WAITS_SECONDS):
        write_together(folder, files, mark, without=[] if for_peft else [CONFIG])
    return folder


def load_prompt(folder: str | Path, *, base: Fingerprint | None = None) -> Prompt:
    """Reads a prompt that softprompt or PEFT saved. Given the loaded `base`'s fingerprint, it must be the prompt's own.

    `folder` may also be a name in a library (`library/support@2`), an address that fsspec knows, or a prompt on the hub
    (`hf://owner/name@revision`); store/references.py lists them. What lies elsewhere is copied here first.

    Raises PromptError (no such prompt, or a kind that is not one), DamagedPrompt, or WrongBase."""
    source = located(folder)
    prompt = _undisturbed(source.folder, lambda: _read(source.folder))
    if source.digest is not None and digest_of(prompt) != source.digest:
        raise DamagedPrompt(
            f"{folder}: is not the prompt that was published under this name. Publish it again as a new version."
        )
    if source.name is not None:
        prompt = replace(prompt, name=source.name)
    if base is not None:
        prompt.base.demand(base, str(folder))
    return prompt


def prompt_bytes(folder: str | Path) -> int:
    """Bytes of the learned tensors on disk: what one more task costs."""
    folder = located(folder).folder
    return _undisturbed(folder, lambda: _place(folder, TENSORS, _read_ours(folder)).stat().st_size)


def _undisturbed(folder: Path, read: Callable[[], Value]) -> Value:
    """The result of `read` while no save changes the folder. A refusal is raised if it occurs twice in an unchanged folder."""
    refused = 0
    for attempt in range(READ_ATTEMPTS):
        before = _stamp(folder)
        try:
            value = read()
        except (PromptError, OSError) as error:
            refused = refused + 1 if before == _stamp(folder) else 0
            if refused == 2 or not folder.exists() or attempt + 1 == READ_ATTEMPTS:
                if isinstance(error, OSError):
                    raise DamagedPrompt(
                        f"{folder}: cannot be read ({error.strerror or error}). Restore it or tune again."
                    ) from error
                raise
            time.sleep(PAUSE_SECONDS)
            continue
        if before == _stamp(folder):
            return value
    raise DamagedPrompt(f"{folder}: is saved into faster than it can be read. Try again.")


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """A value that changes when another prompt is saved: the identity of softprompt.json."""
    try:
        info = os.stat(folder / OURS)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _read(folder: Path) -> Prompt:
    ours = _read_ours(folder)
    if not folder.exists():
        raise PromptError(f"{folder}: there is no such folder. Give the folder that `tune` or PEFT saved.")
    if ours.shape is not None:  # softprompt.json says all; PEFT's description is for PEFT
        packed = _read_tensors(folder, ours)
        return _prompt(packed, ours.kind or "soft", ours.shape, None, ours, folder)
    path = _place(folder, CONFIG, ours)
    if not path.exists():
        raise PromptError(
            f"{folder}: found neither a {OURS} nor {CONFIG} of a prompt, wanted a prompt as softprompt or PEFT saves it."
        )
    config = schema.read(path, PeftConfig)
    check_readable(config, folder)
    packed = _read_tensors(folder, ours)
    kind = "deep" if config.peft_type in DEEP else "soft"
    return _prompt(packed, kind, _shape(packed, kind, config, folder), config, ours, folder)


def _place(folder: Path, name: str, ours: Ours) -> Path:
    """The path of a file of the prompt: its draft, if a kill kept the draft from replacing it."""
    draft = draft_path(folder, name, str(ours.drafts))
    return draft if os.path.exists(draft) else folder / name


def _packed(prompt: Prompt) -> Tensor:
    """The one tensor of PEFT's file: [P, D], or [P, L * 2 * H * K] with layer l's keys at 2l and values at 2l + 1."""
    if isinstance(prompt, SoftPrompt):
        return prompt.embeddings_PD.contiguous()
    state_P2LHK = torch.stack([prompt.keys_LPHK, prompt.values_LPHK], 1).flatten(0, 1).transpose(0, 1)
    return state_P2LHK.reshape(prompt.length, -1).contiguous()


def _read_ours(folder: Path) -> Ours:
    return schema.read(folder / OURS, Ours) if (folder / OURS).exists() else Ours()


def _read_tensors(folder: Path, ours: Ours) -> Tensor:
    path, digest = _place(folder, TENSORS, ours), ours.tensors_sha256
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise PromptError(
                f"{folder}: holds adapter_model.bin, a pickle, which can run code when read. Save it again from PEFT "
                "with safe_serialization=True."
            )
        raise DamagedPrompt(f"{folder}: {TENSORS} is missing. Restore it or tune again.")
    try:
        content = read_bytes(path, LARGEST_TENSORS)
        tensors = safetensors.torch.load(content)
    except FileNotFoundError:  # moved by a save since
        raise
    except Exception as error:  # safetensors and torch raise many kinds for a file that is not whole
        raise DamagedPrompt(
            f"{path}: is not a whole safetensors file ({error}). Restore it or tune again."
        ) from error
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise DamagedPrompt(
            f"{path}: its digest is not the one in {OURS}: one of the two was changed or replaced by an old copy. "
            f"Restore both, or tune again."
        )
    if "prompt_embeddings" not in tensors:
        raise DamagedPrompt(f"{path}: found {sorted(tensors)}, wanted a tensor `prompt_embeddings`.")
    more = sorted(set(tensors) - {"prompt_embeddings"})
    if more:
        raise PromptError(
            f"{path}: also holds {', '.join(more[:5])}{', ...' if more[5:] else ''}, which a prompt does not use: without "
            "it the answers would be others. Use it with PEFT."
        )
    return tensors["prompt_embeddings"]


def _shape(packed: Tensor, kind: str, config: PeftConfig, folder: Path) -> list[int]:
    """[P, D] or [L, P, H, K] as adapter_config.json says. Raises DamagedPrompt where the tensor has another one."""
    length = config.num_virtual_tokens
    if packed.dim() != 2 or packed.shape[0] != length:
        raise DamagedPrompt(
            f"{folder / TENSORS}: found {packed.dtype} {tuple(packed.shape)}, wanted floating-point numbers with "
            f"{length} rows, as {CONFIG} says."
        )
    width = int(packed.shape[1])
    if kind == "soft":
        if config.token_dim and width != config.token_dim:
            raise DamagedPrompt(
                f"{folder / TENSORS}: found vectors {width} wide, wanted {config.token_dim} ({CONFIG})."
            )
        return [length, width]
    heads, layers = config.num_attention_heads or 0, config.num_layers or 0
    if not heads or not layers or width % (2 * layers * heads):
        raise DamagedPrompt(
            f"{folder / TENSORS}: found {width} values a token, wanted keys and values for {layers} layers "
            f"of {heads} heads ({CONFIG})."
        )
    return [layers, length, heads, width // (2 * layers * heads)]


def _prompt(
    packed: Tensor, kind: str, shape: list[int], config: PeftConfig | None, ours: Ours, folder: Path
) -> Prompt:
    """The prompt of that shape, [P, D] or [L, P, H, K], in the tensor of PEFT's file."""
    wanted = [] if len(shape) != (4 if kind == "deep" else 2) else shape
    if kind == "deep" and wanted:
        layers, length, heads, head_width = shape
        wanted = [length, layers * 2 * heads * head_width]
    if not wanted or list(packed.shape) != wanted or packed.dtype not in FLOATS:
        raise DamagedPrompt(
            f"{folder / TENSORS}: found {packed.dtype} {tuple(packed.shape)}, wanted floating-point numbers of shape "
            f"{tuple(wanted or shape)}. Restore it or tune again."
        )
    bad = packed.numel() - int(torch.isfinite(packed).sum())
    if bad:
        raise DamagedPrompt(
            f"{folder / TENSORS}: {bad} of {packed.numel()} values are NaN or infinite. Tune again."
        )
    length = int(packed.shape[0])
    common: dict[str, Any] = {
        "base": _fingerprint(config, ours, kind, folder),
        "template": ours.template or f"{{soft:{length}}}{{text}}",
        "target": ours.target,
        "name": _name(ours, folder),
        "notes": ours.notes or {},
    }
    try:
        if kind == "soft":
            return SoftPrompt(packed, **common)
        layers, _, heads, _ = shape
        state_P2LHK = packed.float().view(length, layers, 2, heads, -1)
        keys_LPHK, values_LPHK = (state_P2LHK[:, :, part].transpose(0, 1) for part in (0, 1))
        return DeepPrompt(keys_LPHK, values_LPHK, **common)
    except PromptError as error:
        raise DamagedPrompt(f"{folder}: {error}") from error


def _name(ours: Ours, folder: Path) -> str:
    """The name it was saved under; a folder that was copied or renamed since goes by its new name."""
    now = folder.resolve().name
    saved_as = ours.folder if ours.folder is not None else ours.name  # 0.1: `tune` gave the folder's name
    return ours.name if ours.name and saved_as == now else now or "prompt"


def _fingerprint(config: PeftConfig | None, ours: Ours, kind: str, folder: Path) -> Fingerprint:
    if ours.base is not None:
        return schema.fingerprint(ours.base, folder / OURS)
    if config is None:
        raise DamagedPrompt(
            f"{folder / OURS}: does not say which base it belongs to. Restore it or tune again."
        )
    return Fingerprint(
        name=config.base_model_name_or_path or "unknown",
        revision=config.revision,
        width=0 if kind == "deep" else config.token_dim or 0,
        layers=config.num_layers or 0,
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n").encode()
