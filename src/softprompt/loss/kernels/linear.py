"""Products with weights that never change: no gradient but the input's, in the arithmetic that is fast here.

A layer written by hand multiplies by a FrozenLinear: FloatLinear, or Int8Linear where a run asks for int8. There
weights are coded once and inputs in every call; the backward pass has its own coded copy, because there the steps
belong to the other side. LinearModule puts one in the place of an nn.Linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softprompt.base.hardware import product_dtype
from softprompt.loss.kernels.int8 import CodedRows, Int8Weights, coded_rows
from softprompt.loss.kernels.workspace import scratch

_NO_DIMENSIONS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Inputs:
    """Inputs of frozen linear layers, [N, I]: as they are, and in int8 codes that several layers can share."""

    rows_NI: Tensor

    @cached_property
    def coded(self) -> CodedRows:
        return coded_rows(self.rows_NI)


class FrozenLinear(Protocol):
    """A frozen linear layer, [I] to [O]."""

    def ahead(self, inputs: Inputs) -> Tensor:
        """inputs @ weight.T + bias, [N, O] in the inputs' dtype."""

    def back(self, above_NO: Tensor) -> Tensor:
        """above @ weight, [N, I]: the gradient at the inputs from that at the outputs."""


@dataclass(frozen=True)
class FloatLinear:
    """A FrozenLinear in float32 or in the weights' dtype, whichever this CPU multiplies faster."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def ahead(self, inputs: Inputs) -> Tensor:
        output_NO = _product(inputs.rows_NI, self.weight_OI.T)
        if self.bias_O is not None:
            output_NO += self.bias_O
        return output_NO

    def back(self, above_NO: Tensor) -> Tensor:
        return _product(above_NO, self.weight_OI)


class Int8Linear:
    """A FrozenLinear in int8, forward and backward: an approximation that a run must ask for."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.forward_weights, self.backward_weights = Int8Weights(weight_OI), Int8Weights(weight_OI.T)
        self.bias_O = None if bias_O is None else bias_O.float()

    def ahead(self, inputs: Inputs) -> Tensor:
        return self.forward_weights.product(inputs.coded, self.bias_O).to(inputs.rows_NI.dtype)

    def back(self, above_NO: Tensor) -> Tensor:
        # What is large in a gradient is whole rows, which have steps of their own.
        return self.backward_weights.product(coded_rows(above_NO, _NO_DIMENSIONS)).to(above_NO.dtype)


class LinearModule(nn.Module):
    """A FrozenLinear in the place of `module`, called as that is, in a body that autograd differentiates."""

    def __init__(self, module: nn.Linear, kind: type[FloatLinear] | type[Int8Linear]) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        # No parameter of its own: the weight is the other module's.
        self.linear: FrozenLinear = kind(
            module.weight.detach(), None if module.bias is None else module.bias.detach()
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        outputs: Tensor = _Linear.apply(inputs, self.linear)  # type: ignore[no-untyped-call]
        return outputs


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        outputs_NO = linear.ahead(Inputs(inputs.reshape(-1, inputs.shape[-1])))
        return outputs_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (above,) = upstream
        on_inputs_NI = ctx.linear.back(above.reshape(-1, above.shape[-1]))
        return on_inputs_NI.view(*above.shape[:-1], -1), None


def _product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """left @ right in left's dtype, computed in the dtype of products, by the faster of the two libraries at hand."""
    dtype = product_dtype(right_KM.dtype, right_KM.device)
    if dtype != right_KM.dtype:
        # Convert into memory that the next product takes again; a transposed view is copied in its memory order.
        turned = right_KM.stride(0) == 1
        plain = right_KM.T if turned else right_KM
        wide = scratch("right", *plain.shape).copy_(plain)
        right_KM, wide_NK = wide.T if turned else wide, scratch("left", *left_NK.shape).copy_(left_NK)
        return _float32_product(wide_NK, right_KM).to(left_NK.dtype)
    return _float32_product(left_NK, right_KM) if dtype == torch.float32 else left_NK @ right_KM


def _float32_product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """oneDNN's product where torch has it: a tenth faster than MKL's on AMD, without a packed copy of the weights."""
    if _HAS_ONEDNN and left_NK.device.type == "cpu":
        with_right: Tensor = torch.ops.mkldnn._linear_pointwise(
            left_NK.contiguous(), right_KM.T, None, "none", [], ""
        )
        return with_right
    return left_NK @ right_KM


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)
