"""Attention over short rows on a CPU, from the fused projection to the gradient in its own layout.

For the lengths that prompts are usually learned on, batched products over the whole score matrix are twice as fast as
torch's fused attention, forward and backward together; and the gradient is written right into the fused layout. From
`SHORT` positions on the score matrix grows too large and the caller takes torch's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.base.hardware import product_dtype
from softprompt.loss.kernels.workspace import scratch

SHORT = 384  # positions


def fused_attention(fused_BSE: Tensor, bias_BHSS: Tensor, heads: int, scale: float) -> Tensor:
    """Context [B, S, H*K] of a projection whose last dimension is heads x (query, key, value) x K.

    `bias_BHSS` is added to the scaled scores: mask and ALiBi, float32, contiguous."""
    context: Tensor = _FusedAttention.apply(fused_BSE, bias_BHSS, heads, scale)  # type: ignore[no-untyped-call]
    return context


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused_BSE: Tensor, bias_BHSS: Tensor, heads: int, scale: float) -> Tensor:
        rows, length, width = fused_BSE.shape
        query, key, value = _apart(fused_BSE, heads)
        probabilities = _probabilities(query, key, bias_BHSS, scale)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(fused_BSE, bias_BHSS)
        ctx.heads, ctx.scale = heads, scale
        context = torch.bmm(probabilities, value).view(rows, heads, length, -1)
        return context.transpose(1, 2).to(fused_BSE.dtype).reshape(rows, length, width // 3)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        fused_BSE, bias_BHSS = ctx.saved_tensors
        heads, scale = ctx.heads, ctx.scale
        rows, length, width = fused_BSE.shape
        query, key, value = _apart(fused_BSE, heads)
        # Recomputed: saving them would hold S x S probabilities for every layer.
        probabilities = _probabilities(query, key, bias_BHSS, scale)
        grad = upstream[0].view(rows, length, heads, -1).transpose(1, 2)
        grad = _laid_out("grad", grad, query.dtype).view(rows * heads, length, -1)
        grad_probabilities = torch.bmm(
            grad,
            value.transpose(1, 2),
            out=scratch("scores", *probabilities.shape, dtype=probabilities.dtype),
        )
        grad_scores = torch._softmax_backward_data(
            grad_probabilities, probabilities, -1, probabilities.dtype
        ).mul_(scale)
        # The three gradients go straight into the layout of the fused projection.
        on_fused = fused_BSE.new_empty(rows, length, heads, 3, width // (3 * heads))
        for index, part in enumerate(
            (
                torch.bmm(grad_scores, key),
                torch.bmm(grad_scores.transpose(1, 2), query),
                torch.bmm(probabilities.transpose(1, 2), grad),
            )
        ):
            on_fused[:, :, :, index] = part.view(rows, heads, length, -1).transpose(1, 2)
        return on_fused.view(rows, length, width), None, None, None


def _probabilities(query: Tensor, key: Tensor, bias_BHSS: Tensor, scale: float) -> Tensor:
    """Attention probabilities [B*H, S, S], in memory that the next layer reuses."""
    rows, heads, length, _ = bias_BHSS.shape
    bias = bias_BHSS.to(query.dtype).view(rows * heads, length, length)
    scores = scratch("scores", *bias.shape, dtype=bias.dtype)
    torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scratch("probabilities", *bias.shape, dtype=bias.dtype))


def _apart(fused_BSE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [B*H, S, K] each, contiguous, in the dtype of products."""
    rows, length, width = fused_BSE.shape
    parts = fused_BSE.view(rows, length, heads, 3, width // (3 * heads)).permute(3, 0, 2, 1, 4)
    dtype = product_dtype(fused_BSE.dtype, fused_BSE.device)
    query, key, value = (
        _laid_out(use, part, dtype).view(rows * heads, length, -1)
        for use, part in zip(("query", "key", "value"), parts, strict=True)
    )
    return query, key, value


def _laid_out(use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies to contiguous memory in `dtype` at once; the next layer reuses that memory."""
    return scratch(use, *tensor.shape, dtype=dtype).copy_(tensor)
