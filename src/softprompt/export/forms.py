"""A prompt in the forms that other programs read.

PEFT              store.peft_format: a prompt's folder is PEFT's format already where PEFT reads it rightly
vectors           one .safetensors file, for vLLM's and others' prompt embeddings
a copy of a base  export.merged: the vectors as added tokens
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch

from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.atomic import write_together
from softprompt.store.card import last_part
from softprompt.store.ownership import check_file

VECTORS = "prompt_embeds"


def save_vectors(prompt: Prompt, path: str | Path, *, overwrite: bool = True) -> Path:
    """Writes a soft prompt's vectors as one float32 tensor `prompt_embeds` [P, D].

    The file's metadata holds the template and the base. Only a file that was written here before is replaced, and none
    with `overwrite` False. Raises PromptError for a deep prompt, which has no vectors, and SaveError."""
    if not isinstance(prompt, SoftPrompt):
        raise PromptError(
            f"{prompt.name}: a deep prompt is keys and values, not vectors in the input. Export it to PEFT instead."
        )
    path = check_file(path, _is_ours, overwrite=overwrite)
    metadata = {
        "format": "pt",
        "name": prompt.name,
        "template": prompt.template,
        "target": prompt.target or "",
        "base": json.dumps(
            {
                "name": last_part(prompt.base.name),
                "revision": prompt.base.revision,
                "sha256": prompt.base.sha256,
            }
        ),
    }
    content = safetensors.torch.save({VECTORS: prompt.embeddings_PD.contiguous()}, metadata=metadata)
    write_together(path.parent, {path.name: content})
    return path


def _is_ours(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {"template", "base"} <= set(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False
