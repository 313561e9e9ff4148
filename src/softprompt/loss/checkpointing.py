"""Gradient checkpointing: layers keep only their input, and compute the rest again in the backward pass.

transformers' own switch wants training mode, which turns dropout on, and throws away the cache that holds a deep prompt
(peft#869). Here a shallow copy of the body gets wrapped layers, and the cache is restored before a layer is recomputed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from softprompt.errors import BaseError


def checkpointed(body: nn.Module, num_layers: int, name: str) -> Any:
    """A copy of `body` that shares all weights; backward passes need memory for one layer, and a third more time.

    Raises BaseError where the layers are not in one list."""
    for path, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return _with_wrapped_layers(body, path.split(".") if path else [])
    raise BaseError(
        f"{name}: its layers are not in one list, so they cannot be recomputed one by one. "
        "Set tune.gradient_checkpointing to false."
    )


def _with_wrapped_layers(module: nn.Module, path: list[str]) -> nn.Module:
    """Copies of the modules along `path`, down to the list of layers, whose layers are wrapped copies."""
    twin = _shallow(module)
    if path:
        twin._modules[path[0]] = _with_wrapped_layers(module.get_submodule(path[0]), path[1:])
        return twin
    for place, layer in enumerate(module.children()):
        own = _shallow(layer)
        own.forward = _wrapped(layer.forward, place)
        twin._modules[str(place)] = own
    return twin


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


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
