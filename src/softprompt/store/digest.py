"""The digest of a prompt: the same for equal content, wherever it is kept and whatever it is called."""

from __future__ import annotations

import hashlib
import json

from softprompt.prompt.soft_prompt import Prompt


def digest_of(prompt: Prompt) -> str:
    """A prompt's digest, over its numbers, template, target and base."""
    about = [prompt.kind, prompt.template, prompt.target, prompt.base.sha256]
    about += ["special_tokens"] if prompt.special_tokens else []
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in prompt.plain:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
