"""A prompt in the forms that other programs read.

PEFT              store.artifact: a prompt's folder is PEFT's format already (PROMPT_TUNING, PREFIX_TUNING)
vectors           one .safetensors file, for vLLM's and others' prompt embeddings
a copy of a base  base.merged: the vectors as added tokens
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.atomic import write_together

VECTORS = "prompt_embeds"


def save_vectors(prompt: Prompt, path: str | Path) -> Path:
    """Write a soft prompt's vectors as one float32 tensor `prompt_embeds` [P, D].

    The file's metadata says where they stand and which base they belong to.
    Raises PromptError for a deep prompt, which has no vectors, and SaveError."""
    path = Path(path)
    if not isinstance(prompt, SoftPrompt):
        raise PromptError(
            f"{prompt.name}: a deep prompt is keys and values, not vectors in the input. Export it to PEFT instead."
        )
    metadata = {
        "format": "pt",
        "name": prompt.name,
        "template": prompt.template,
        "target": prompt.target or "",
        "base": json.dumps(
            {"name": prompt.base.name, "revision": prompt.base.revision, "sha256": prompt.base.sha256}
        ),
    }
    content = safetensors.torch.save({VECTORS: prompt.embeddings_PD.contiguous()}, metadata=metadata)
    write_together(path.parent, {path.name: content})
    return path
