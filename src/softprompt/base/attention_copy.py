"""A copy of the base's body with another attention in its layers, over the same weights."""

from __future__ import annotations

import copy
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.quantised import shared_tensors


def body_with_attention(lm: FrozenLM, name: str) -> Any:
    """A copy of the base's body that shares its weights and calls the attention registered under `name`.

    Architectures that have an attention of their own do not call it."""
    body: Any = copy.deepcopy(lm.body, shared_tensors(lm.body))
    config = copy.deepcopy(body.config)
    config._attn_implementation = name
    for module in body.modules():
        if hasattr(module, "config"):
            module.config = config
    return body
