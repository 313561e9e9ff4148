"""Products with weights that were packed once, for a server that reads and continues texts for as long as it lives.

A frozen weight never changes, yet each of torch's products with it first brings it into the order that the CPU's matrix
instructions read. Packed once, a step of eight rows of SmolLM2 in bfloat16 takes 0.7 of its time, one of 32 rows 0.85. Only
bfloat16 is packed: there the products are equal to the bit on the CPUs tried, while float32 rounds otherwise. The packed
weights take their memory once more; the base's own stay, since gradients and digests read those.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.hardware import free_memory_bytes
from softprompt.base.quantised import is_quantised

# A large base beside a second copy of itself may leave too little for keys and values.
MAX_MEMORY_SHARE = 0.25


class PackedLinear(nn.Module):
    """A linear layer without gradient: `packed` is the layer's weight in the order of the CPU's instructions."""

    def __init__(self, linear: nn.Linear, packed: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, packed

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output, as nn.Linear gives it."""
        return _product(states, self.packed, self.bias)


def pack_weights(lm: FrozenLM) -> bool:
    """Packs the weights of a base's linear layers and head, once for all who read through it in this process.

    False, and nothing is changed, on other devices and dtypes, for a base that is quantised or in parts, where this torch has no such product, or where the packed
    weights would take more than a quarter of the memory that is free."""
    if lm in _PACKED:
        return True
    if not lm.is_whole or is_quantised(lm.body):  # weights lie elsewhere, or are packed otherwise
        return False
    layers = _linear_layers(lm.body)
    weights = {id(layer.weight): layer.weight for layer in layers}
    weights[id(lm.head.weight_VD)] = lm.head.weight_VD
    size = sum(weight.nbytes for weight in weights.values())
    is_able = torch.device(lm.device).type == "cpu" and lm.dtype == torch.bfloat16 and packing_is_offered()
    if not is_able or size > MAX_MEMORY_SHARE * free_memory_bytes(lm.device):
        return False
    with torch.no_grad():
        packed = {
            key: torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            for key, weight in weights.items()
            if weight.dtype == torch.bfloat16
        }
    if not all(_is_exact(weight, packed[key]) for key, weight in weights.items() if key in packed):
        return False
    _PACKED[lm] = packed
    return True


def packed_body(lm: FrozenLM, body: Any) -> Any:
    """`body`, or a copy of it that reads the packed weights where `pack_weights` has made them."""
    packed = _PACKED.get(lm)
    if packed is None:
        return body
    if body not in _COPIES:
        shared = {id(tensor): tensor for tensor in (*body.parameters(), *body.buffers())}
        packed_copy: Any = copy.deepcopy(body, shared)
        for module in list(packed_copy.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and id(child.weight) in packed:
                    setattr(module, name, PackedLinear(child, packed[id(child.weight)]))
        _COPIES[body] = packed_copy
    return _COPIES[body]


def logits(lm: FrozenLM, hidden: Tensor) -> Tensor:
    """Hidden states [..., D] to logits [..., V], through the packed head if there is one."""
    packed = _PACKED.get(lm, {}).get(id(lm.head.weight_VD))
    if packed is None:
        return lm.logits(hidden)
    return lm.head.finished(_product(hidden, packed, lm.head.bias_V))


_PACKED: WeakKeyDictionary[FrozenLM, dict[int, Tensor]] = WeakKeyDictionary()  # by id of the weight
_COPIES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _linear_layers(body: Any) -> list[nn.Linear]:
    """Layers that are nn.Linear itself: a subclass, as quantised bases have, may compute something else."""
    return [module for module in body.modules() if type(module) is nn.Linear]


def packing_is_offered() -> bool:
    """Whether this torch has a product with packed bfloat16 weights, and this CPU the instructions for it."""
    operations: Any = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operations, name) for name in names):  # type: ignore[no-untyped-call]
        return False
    return bool(operations._is_mkldnn_bf16_supported())


def _is_exact(weight: Tensor, packed: Tensor) -> bool:
    """Whether one product with the packed weight is the plain one, up to the rounding of its dtype."""
    states = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    plain = torch.nn.functional.linear(states, weight).float()
    scale = max(1.0, float(plain.abs().max()))
    difference = float((_product(states, packed, None).float() - plain).abs().max())
    return difference <= 4 * torch.finfo(weight.dtype).eps * scale


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return result
