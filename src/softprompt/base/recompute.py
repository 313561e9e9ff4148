"""Gradient checkpointing: layers keep only their input, and compute the rest again in the backward pass.

transformers' own switch wants training mode, which turns dropout on, and throws the cache away that a deep prompt stands
in (peft#869). Here each layer is wrapped from outside, and the cache is put back before it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import BaseError


@contextmanager
def recomputing(lm: FrozenLM) -> Iterator[None]:
    """While inside, backward passes need memory for one layer at a time, and a third more time."""
    layers = _layers(lm)
    own = [vars(layer).get("forward") for layer in layers]
    for place, layer in enumerate(layers):
        layer.forward = _wrapped(layer.forward, place)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward  # the class's own again
            if forward is not None:
                layer.forward = forward


def _layers(lm: FrozenLM) -> list[Any]:
    for module in lm._learning_body().modules():
        if isinstance(module, nn.ModuleList) and len(module) == lm.layers:
            return list(module)
    raise BaseError(
        f"{lm.name}: its layers are not in one list, so they cannot be computed again one by one. "
        "Set tune.gradient_checkpointing to false."
    )


def _wrapped(forward: Any, place: int) -> Any:
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        held = [value for value in (*inputs, *named.values()) if hasattr(value, "layers")]  # caches
        before = [(cache.layers[place].keys, cache.layers[place].values) for cache in held]

        def again(*inputs: Any, **named: Any) -> Any:
            for cache, (keys, values) in zip(held, before, strict=True):
                cache.layers[place].keys, cache.layers[place].values = keys, values
            return forward(*inputs, **named)

        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return run
