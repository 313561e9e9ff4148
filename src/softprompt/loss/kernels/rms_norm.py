"""RMSNorm as Llama has it, forward and backward, computed in float32 a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.loss.kernels.workspace import row_chunks, scratch


@dataclass(frozen=True)
class Norm:
    """weight * (x / rms)."""

    weight_D: Tensor
    eps: float


def normed(hidden_ND: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of packed rows, differentiable towards them."""
    output: Tensor = _Norm.apply(hidden_ND, norm)  # type: ignore[no-untyped-call]
    return output


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, norm: Norm) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(hidden_ND)
        ctx.norm = norm
        return norm_forward(hidden_ND, norm)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (hidden_ND,) = ctx.saved_tensors
        return norm_backward(upstream[0], hidden_ND, ctx.norm, None), None


def norm_forward(hidden_ND: Tensor, norm: Norm) -> Tensor:
    """The normed rows, in their dtype."""
    output_ND = torch.empty_like(hidden_ND)
    for chunk in row_chunks(hidden_ND):
        wide_nD, scale_n1 = _wide_and_scale(hidden_ND[chunk], norm.eps)
        # As transformers does: x / rms is rounded to the dtype, then multiplied by the weight.
        torch.mul(wide_nD, scale_n1, out=wide_nD)
        if hidden_ND.dtype == torch.float32:
            torch.mul(wide_nD, norm.weight_D, out=output_ND[chunk])
        else:
            output_ND[chunk] = wide_nD
            output_ND[chunk] *= norm.weight_D
    return output_ND


def norm_backward(above_ND: Tensor, hidden_ND: Tensor, norm: Norm, residual_ND: Tensor | None) -> Tensor:
    """The gradient at the norm's input, plus that of the residual branch beside it."""
    output_ND = torch.empty_like(hidden_ND)
    width = hidden_ND.shape[1]
    weight_D = norm.weight_D.float()
    for chunk in row_chunks(hidden_ND):
        wide_nD, scale_n1 = _wide_and_scale(hidden_ND[chunk], norm.eps)
        weighed_nD = scratch("weighed", *wide_nD.shape)
        weighed_nD.copy_(above_ND[chunk]).mul_(weight_D)
        # y = s x with s = (mean x^2 + eps)^-1/2 has the gradient s g - x s^3 (g . x) / D.
        along_n1 = torch.linalg.vecdot(weighed_nD, wide_nD)[:, None]
        along_n1 *= scale_n1.pow(3).mul_(-1 / width)
        weighed_nD.mul_(scale_n1).addcmul_(wide_nD, along_n1)
        if residual_ND is not None:
            weighed_nD += residual_ND[chunk]
        output_ND[chunk] = weighed_nD
    return output_ND


def _wide_and_scale(hidden_nD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows in float32, in scratch memory, and 1 / rms of each, [n, 1]."""
    wide_nD = scratch("wide", *hidden_nD.shape).copy_(hidden_nD)
    mean_n = torch.linalg.vecdot(wide_nD, wide_nD).div_(hidden_nD.shape[1])
    return wide_nD, mean_n.add_(eps).rsqrt_()[:, None]
