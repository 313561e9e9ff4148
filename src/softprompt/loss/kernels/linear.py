"""Products with weights that never change: no gradient but the input's, in the arithmetic that is fast here.

With int8, weights are coded once (a scale for each output) and inputs in every call (a scale for each position);
the backward pass has its own coded copy, because there the scales belong to the other side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softprompt.loss.kernels.screened_head import coded, int8_product, quantised
from softprompt.loss.kernels.workspace import scratch


class FrozenLinear(nn.Module):
    """inputs @ weight.T + bias, as nn.Linear does it, with products in float32 and results in the inputs' dtype."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight_OI, self.bias_O = (
            [weight_OI],
            bias_O,
        )  # a list hides it: the parameter is another module's

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        outputs: Tensor = _WideProduct.apply(inputs, self.weight_OI[0], self.bias_O)  # type: ignore[no-untyped-call]
        return outputs


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.weight_OI = weight_OI
        rows_NI = inputs.reshape(-1, inputs.shape[-1])
        outputs_NO = inputs.new_empty(len(rows_NI), len(weight_OI))
        wide_NO = _product(rows_NI, weight_OI.T)
        outputs_NO.copy_(wide_NO if bias_O is None else wide_NO.add_(bias_O))
        return outputs_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = upstream
        rows_NO = grad.reshape(-1, grad.shape[-1])
        grad_inputs = grad.new_empty(len(rows_NO), ctx.weight_OI.shape[1])
        grad_inputs.copy_(_product(rows_NO, ctx.weight_OI))
        return grad_inputs.view(*grad.shape[:-1], -1), None, None


def _product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """left @ right, computed in float32, in memory that the next product reuses."""
    wide_NK = scratch("left", *left_NK.shape).copy_(left_NK)
    turned = right_KM.stride(0) == 1  # a transposed view is copied as it lies
    plain = right_KM.T if turned else right_KM
    wide = scratch("right", *plain.shape).copy_(plain)
    product_NM = scratch("product", len(left_NK), right_KM.shape[1])
    return torch.mm(wide_NK, wide.T if turned else wide, out=product_NM)


class Int8Linear(nn.Module):
    """Like FrozenLinear with int8 products, forward and backward: an approximation that a run must ask for."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.ahead = _Packed(weight_OI)
        self.back = _Packed(weight_OI.T)
        self.bias_O = None if bias_O is None else bias_O.float()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        outputs: Tensor = _Int8Product.apply(inputs, self.ahead, self.back, self.bias_O)  # type: ignore[no-untyped-call]
        return outputs


class _Packed:
    """Weights [O, I] as int8 with a step for each output, in the layout of the product."""

    def __init__(self, weight_OI: Tensor) -> None:
        codes_OI, self.step_O = coded(weight_OI)
        self.codes: Any = torch.ops.onednn.qlinear_prepack(codes_OI, [512, codes_OI.shape[1]])
        self.zero_O = torch.zeros(len(codes_OI), dtype=torch.int32)

    def product(self, inputs: Tensor, bias_O: Tensor | None) -> Tensor:
        """inputs [..., I] to [..., O], in the inputs' dtype."""
        codes_NI, step_N1 = quantised(inputs.reshape(-1, inputs.shape[-1]))
        outputs_NO = int8_product(codes_NI, self.codes, self.step_O, self.zero_O)
        if bias_O is None:
            outputs_NO.mul_(step_N1)
        else:
            torch.addcmul(bias_O, outputs_NO, step_N1, out=outputs_NO)
        return outputs_NO.to(inputs.dtype).view(*inputs.shape[:-1], -1)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, ahead: _Packed, back: _Packed, bias_O: Tensor | None) -> Tensor:
        ctx.back = back
        return ahead.product(inputs, bias_O)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = upstream
        return ctx.back.product(grad, None), None, None, None
