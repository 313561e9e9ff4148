"""BLOOM's GELU on a CPU: value and derivative in one pass through the cache.

x * sigmoid(2u) is the same function as x/2 * (1 + tanh(u)), and its derivative costs little once the sigmoid is known. A
few rows at a time go through all of it in memory that stays in the cache; only the derivative is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softprompt.loss.kernels.workspace import scratch

LINEAR, CUBIC = (
    1.5957691216057308,
    0.07135481627159,
)  # 2u = x * (LINEAR + CUBIC * x^2): LINEAR is 2 sqrt(2/pi), CUBIC is 0.044715 of it
VALUES_AT_ONCE = 2**17  # in float32 half a megabyte; the working memory is four times that


class SmallGelu(nn.Module):
    """GELU in its tanh form."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        outputs: Tensor = _Gelu.apply(inputs)  # type: ignore[no-untyped-call]
        return outputs


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        flat_ND = inputs.reshape(-1, inputs.shape[-1])
        outputs_ND = torch.empty_like(flat_ND)
        derivative_ND = torch.empty_like(flat_ND) if wants_gradient else None
        # Few rows at a time, so that all intermediate values stay in the processor's cache.
        size = max(1, VALUES_AT_ONCE // flat_ND.shape[1])
        working = scratch("gelu", 4, min(size, len(flat_ND)), flat_ND.shape[1])
        for first in range(0, len(flat_ND), size):
            part_nD = flat_ND[first : first + size]
            wide_nD, square_nD, sigmoid_nD, value_nD = working[:, : len(part_nD)]
            # In float32 also for a bfloat16 base: the polynomial loses digits otherwise.
            wide_nD.copy_(part_nD)
            torch.mul(wide_nD, wide_nD, out=square_nD)
            # sigmoid = sigmoid(2u), value = x * sigmoid
            torch.mul(square_nD, CUBIC, out=sigmoid_nD).add_(LINEAR).mul_(wide_nD).sigmoid_()
            torch.mul(wide_nD, sigmoid_nD, out=value_nD)
            outputs_ND[first : first + size] = value_nD
            if derivative_ND is not None:
                # derivative = sigmoid + value * (2u)' * (1 - sigmoid), with (2u)' = LINEAR + 3 CUBIC x^2
                square_nD.mul_(3 * CUBIC).add_(LINEAR).mul_(value_nD)
                value_nD.copy_(sigmoid_nD).neg_().add_(1)
                derivative_ND[first : first + size] = torch.addcmul(
                    sigmoid_nD, square_nD, value_nD, out=sigmoid_nD
                )
        if derivative_ND is not None:
            ctx.save_for_backward(derivative_ND.view(inputs.shape))
        return outputs_ND.view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        (grad,) = upstream
        grad_inputs: Tensor = grad * derivative
        return grad_inputs
