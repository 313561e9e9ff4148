"""One prompt on disk: PEFT's files, our own beside them, checked on loading.

    adapter_config.json          PEFT's description: PROMPT_TUNING for a soft prompt, PREFIX_TUNING for a deep one
    adapter_model.safetensors    one float32 tensor, `prompt_embeddings`
    softprompt.json              ours: template, target, the base's fingerprint, notes, the tensor file's digest
    README.md                    a model card for people

PEFT reads the first two and ignores the rest; we read what PEFT writes. Format: PEFT 0.21's save_pretrained.

Each file is first written beside its place, as a draft; the prompt is saved when `softprompt.json`, which names the
drafts that belong to it, is moved there. A kill before that leaves the former prompt. One between that and the other
moves leaves drafts, which are read instead of the files that they were to replace.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.prompt.soft_prompt import DeepPrompt, Fingerprint, Prompt, SoftPrompt
from softprompt.store.atomic import draft_path, write_together

CONFIG, TENSORS, OURS, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "softprompt.json",
    "README.md",
)
FORMAT = 1
SHALLOW = {"PROMPT_TUNING", "P_TUNING", "CPT"}
DEEP = {"PREFIX_TUNING", "CARTRIDGE"}


def save_prompt(prompt: Prompt, folder: str | Path) -> Path:
    """Write `prompt` into `folder`, beside whatever else lies there. A full disk or a kill, at any moment, leaves the
    former prompt or the new one. Raises SaveError."""
    folder = Path(folder)
    mark = secrets.token_hex(8)
    tensors = safetensors.torch.save({"prompt_embeddings": _packed(prompt)}, metadata={"format": "pt"})
    ours = {
        "format": FORMAT,
        "kind": prompt.kind,
        "name": prompt.name,
        "length": prompt.length,
        "template": prompt.template,
        "target": prompt.target,
        "base": asdict(prompt.base),
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "drafts": mark,
        "notes": prompt.notes,
    }
    write_together(
        folder,
        {
            OURS: _json(ours),  # the first: it decides
            TENSORS: tensors,
            CONFIG: _json(_peft_config(prompt)),
            CARD: _card(prompt).encode(),
        },
        mark,
    )
    return folder


def load_prompt(folder: str | Path, *, base: Fingerprint | None = None) -> Prompt:
    """Read a prompt that softprompt or PEFT saved. Given the loaded `base`'s fingerprint, it must be the prompt's own.

    Raises PromptError (no such prompt, or a kind that is not one), DamagedPrompt, or WrongBase."""
    folder = Path(folder).expanduser()
    ours = _read_ours(folder)
    config = _read_config(folder, ours)
    packed = _read_tensors(folder, ours)
    prompt = _unpacked(packed, config, ours, folder)
    if base is not None:
        prompt.base.demand(base, str(folder))
    return prompt


def prompt_bytes(folder: str | Path) -> int:
    """Bytes of the learned tensors on disk: what one more task costs."""
    return _place(Path(folder), TENSORS, _read_ours(Path(folder))).stat().st_size


def _place(folder: Path, name: str, ours: Mapping[str, Any]) -> Path:
    """Where a file of the prompt lies: where it was drafted, if a kill kept it from its place."""
    draft = draft_path(folder, name, str(ours.get("drafts")))
    return draft if os.path.exists(draft) else folder / name


def _packed(prompt: Prompt) -> Tensor:
    """The one tensor of PEFT's file: [P, D], or [P, L * 2 * H * K] with layer l's keys at 2l and values at 2l + 1."""
    if isinstance(prompt, SoftPrompt):
        return prompt.embeddings_PD.contiguous()
    state_P2LHK = torch.stack([prompt.keys_LPHK, prompt.values_LPHK], 1).flatten(0, 1).transpose(0, 1)
    return state_P2LHK.reshape(prompt.length, -1).contiguous()


def _peft_config(prompt: Prompt) -> dict[str, Any]:
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.base.name,
        "revision": prompt.base.revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "modules_to_save": None,
        "num_virtual_tokens": prompt.length,
        "num_transformer_submodules": 1,
        "num_layers": prompt.base.layers,
    }
    if isinstance(prompt, SoftPrompt):
        return common | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": prompt.embeddings_PD.shape[1],
            "num_attention_heads": prompt.base.kv_heads or 1,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": prompt.base.name,
            "tokenizer_kwargs": None,
        }
    layers, _, heads, head_width = prompt.keys_LPHK.shape
    return common | {
        "peft_type": "PREFIX_TUNING",
        "token_dim": heads * head_width,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": heads * head_width,
        "prefix_projection": False,
    }


def _read_ours(folder: Path) -> dict[str, Any]:
    return _read_json(folder / OURS) if (folder / OURS).exists() else {}


def _read_config(folder: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    path = _place(folder, CONFIG, ours)
    if not folder.exists():
        raise PromptError(f"{folder}: there is no such folder. Give the folder that `tune` or PEFT saved.")
    if not path.exists():
        raise PromptError(f"{folder}: found no {CONFIG}, wanted a prompt as softprompt or PEFT saves it.")
    config = _read_json(path)
    kind = config.get("peft_type")
    if kind == "MULTITASK_PROMPT_TUNING":
        raise PromptError(
            f"{folder}: a multitask prompt holds one prompt a task. Save the task's own prompt from PEFT "
            "(get_prompt with its task id), then load that."
        )
    if kind not in SHALLOW | DEEP:
        raise PromptError(
            f"{folder}: found a PEFT adapter of type {kind}, wanted one of {', '.join(sorted(SHALLOW | DEEP))}."
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise PromptError(f"{folder}: was made for an encoder-decoder; softprompt uses causal models alone.")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedPrompt(
            f"{path}: cannot be read as JSON ({error}). Restore the file or tune again."
        ) from error
    if not isinstance(value, dict):
        raise DamagedPrompt(f"{path}: found a {type(value).__name__}, wanted a JSON object.")
    return value


def _read_tensors(folder: Path, ours: Mapping[str, Any]) -> Tensor:
    path, digest = _place(folder, TENSORS, ours), ours.get("tensors_sha256")
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise PromptError(
                f"{folder}: holds adapter_model.bin, a pickle, which can run code when read. Save it again from PEFT "
                "with safe_serialization=True."
            )
        raise DamagedPrompt(f"{folder}: {TENSORS} is missing. Restore it or tune again.")
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedPrompt(
            f"{path}: is not a whole safetensors file ({error}). Restore it or tune again."
        ) from error
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise DamagedPrompt(
            f"{path}: its digest is not the one in {OURS}: one of the two was changed or an old copy came between. "
            f"Restore both, or delete {OURS} to use the vectors without their template."
        )
    if "prompt_embeddings" not in tensors:
        raise DamagedPrompt(f"{path}: found {sorted(tensors)}, wanted a tensor `prompt_embeddings`.")
    return tensors["prompt_embeddings"]


def _unpacked(packed: Tensor, config: dict[str, Any], ours: dict[str, Any], folder: Path) -> Prompt:
    length = config.get("num_virtual_tokens")
    if not packed.is_floating_point() or packed.dim() != 2 or packed.shape[0] != length:
        raise DamagedPrompt(
            f"{folder / TENSORS}: found {packed.dtype} {tuple(packed.shape)}, wanted floating-point numbers with "
            f"{length} rows, as {CONFIG} says."
        )
    bad = packed.numel() - int(torch.isfinite(packed).sum())
    if bad:
        raise DamagedPrompt(
            f"{folder / TENSORS}: {bad} of {packed.numel()} values are NaN or infinite. Tune again."
        )
    deep = config["peft_type"] in DEEP
    common: dict[str, Any] = {
        "base": _fingerprint(config, ours, deep),
        "template": ours.get("template") or f"{{soft:{length}}}{{text}}",
        "target": ours.get("target"),
        "name": ours.get("name") or folder.resolve().name,
        "notes": ours.get("notes") or {},
    }
    if not deep:
        width = config.get("token_dim")
        if width and packed.shape[1] != width:
            raise DamagedPrompt(
                f"{folder / TENSORS}: found vectors {packed.shape[1]} wide, wanted {width} ({CONFIG})."
            )
        return SoftPrompt(packed, **common)
    heads, layers = config.get("num_attention_heads") or 0, config.get("num_layers") or 0
    if not heads or not layers or packed.shape[1] % (2 * layers * heads):
        raise DamagedPrompt(
            f"{folder / TENSORS}: found {packed.shape[1]} values a token, wanted keys and values for {layers} layers "
            f"of {heads} heads ({CONFIG})."
        )
    state_P2LHK = packed.float().view(int(packed.shape[0]), layers, 2, heads, -1)
    keys_LPHK, values_LPHK = (state_P2LHK[:, :, part].transpose(0, 1) for part in (0, 1))
    return DeepPrompt(keys_LPHK, values_LPHK, **common)


def _fingerprint(config: dict[str, Any], ours: dict[str, Any], deep: bool) -> Fingerprint:
    if isinstance(ours.get("base"), dict):
        known = {
            name: value for name, value in ours["base"].items() if name in Fingerprint.__dataclass_fields__
        }
        return Fingerprint(**known)
    return Fingerprint(
        name=config.get("base_model_name_or_path") or "unknown",
        revision=config.get("revision"),
        width=0 if deep else config.get("token_dim") or 0,
        layers=config.get("num_layers") or 0,
    )


def _card(prompt: Prompt) -> str:
    """A model card that says what this is, what it belongs to and how to use it."""
    notes = prompt.notes
    hub_id = prompt.base.name.count("/") == 1 and not prompt.base.name.startswith((".", "/", "~"))
    head = ["---", *([f"base_model: {prompt.base.name}"] if hub_id else []), "library_name: softprompt"]
    head += ["tags: [prompt-tuning, soft-prompt, peft]", "---"]
    measured = [
        f"| {key.replace('_', ' ')} | {value:.4f} |"
        for key, value in (notes.get("metrics") or {}).items()
        if isinstance(value, float) and math.isfinite(value)
    ]
    table = ["| measured | value |", "|---|---|", *measured, ""] if measured else []
    return "\n".join(
        [
            *head,
            f"# {prompt.name}",
            "",
            f"A {prompt.kind} prompt of {prompt.length} virtual tokens for `{prompt.base.name}`"
            f"{f' at revision `{prompt.base.revision}`' if prompt.base.revision else ''}, which stays unchanged.",
            "",
            f"- template: `{prompt.template}`",
            f"- learned: {f'the field `{prompt.target}`' if prompt.target else 'all of the text'}",
            f"- fingerprint of the base: `{prompt.base.sha256 or 'unknown'}`",
            "",
            *table,
            "```bash",
            f"softprompt generate --base {prompt.base.name} --prompt FOLDER 'some text'",
            "```",
            "",
            "`peft.PeftModel.from_pretrained(model, FOLDER)` loads it too.",
            "",
        ]
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n").encode()
