"""BLOOM's GELU on a CPU: value and slope in one pass through the cache.

x * sigmoid(2u) is the same function as x/2 * (1 + tanh(u)), and its slope costs little once the sigmoid is at hand. A
few rows at a time go through all of it in memory that stays in the cache; only the slope is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softprompt.loss.kernels.workspace import scratch

LINE, BEND = (
    1.5957691216057308,
    0.07135481627159,
)  # 2u = x * (LINE + BEND * x^2): twice sqrt(2/pi), and 0.044715 of it
AT_ONCE = 2**17  # numbers in float32: half a megabyte, and three such


class SmallGelu(nn.Module):
    """GELU in its tanh form."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        outputs: Tensor = _Gelu.apply(inputs)  # type: ignore[no-untyped-call]
        return outputs


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        wants_slope = ctx.needs_input_grad[0]
        flat_ND = inputs.reshape(-1, inputs.shape[-1])
        outputs_ND = torch.empty_like(flat_ND)
        slopes_ND = torch.empty_like(flat_ND) if wants_slope else None
        size = max(1, AT_ONCE // flat_ND.shape[1])
        working = scratch("gelu", 4, min(size, len(flat_ND)), flat_ND.shape[1])
        for first in range(0, len(flat_ND), size):
            part_nD = flat_ND[first : first + size]
            wide_nD, square_nD, chance_nD, value_nD = working[:, : len(part_nD)]
            wide_nD.copy_(part_nD)
            torch.mul(wide_nD, wide_nD, out=square_nD)
            # chance = sigmoid(2u), value = x * chance
            torch.mul(square_nD, BEND, out=chance_nD).add_(LINE).mul_(wide_nD).sigmoid_()
            torch.mul(wide_nD, chance_nD, out=value_nD)
            outputs_ND[first : first + size] = value_nD
            if slopes_ND is not None:
                # slope = chance + value * (2u)' * (1 - chance), with (2u)' = LINE + 3 BEND x^2
                square_nD.mul_(3 * BEND).add_(LINE).mul_(value_nD)
                value_nD.copy_(chance_nD).neg_().add_(1)
                slopes_ND[first : first + size] = torch.addcmul(chance_nD, square_nD, value_nD, out=chance_nD)
        if slopes_ND is not None:
            ctx.save_for_backward(slopes_ND.view(inputs.shape))
        return outputs_ND.view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        (above,) = upstream
        on_inputs: Tensor = above * slopes
        return on_inputs
