"""Gradient checkpointing: layers keep only their input and recompute the rest in the backward pass.

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
    """Returns a copy of `body` that shares all weights; a backward pass needs memory for one layer and a third more time.

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
    for index, layer in enumerate(module.children()):
        own = _shallow(layer)
        own.forward = _wrapped(layer.forward, index)
        twin._modules[str(index)] = own
    return twin


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _wrapped(forward: Any, layer: int) -> Any:
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # A layer extends its cache in place: recomputing must start from what the cache held before.
        caches = [value for value in (*inputs, *named.values()) if hasattr(value, "layers")]
        before = [(cache.layers[layer].keys, cache.layers[layer].values) for cache in caches]

        def from_the_cache_before(*inputs: Any, **named: Any) -> Any:
            for cache, (keys, values) in zip(caches, before, strict=True):
                cache.layers[layer].keys, cache.layers[layer].values = keys, values
            return forward(*inputs, **named)

        return checkpoint(
            from_the_cache_before, *inputs, use_reentrant=False, preserve_rng_state=False, **named
        )

    return run
