"""Cross-entropy through a frozen output layer: loss and gradient in one pass, never all logits at once.

The head's weights never change, so the only gradient is the one towards the hidden state; it can be had together with
the loss while a block of logits is still at hand (as in cut-cross-entropy, Wijmans et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_LOGITS = 2**24  # 16 M numbers: 250,880 x 64 tokens


@dataclass(frozen=True)
class Head:
    """A base's output layer: logits = softcap(scale * (hidden @ weight.T + bias))."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V], in the weights' dtype."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [N], differentiable towards `hidden_ND` alone."""
    nll_N: Tensor = _FrozenHeadNll.apply(hidden_ND, targets_N, head)  # type: ignore[no-untyped-call]
    return nll_N


class _FrozenHeadNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        rows = max(1, BLOCK_LOGITS // head.weight_VD.shape[0])
        for start in range(0, len(hidden_ND), rows):
            block = slice(start, start + rows)
            logits_nV = head.logits(hidden_ND[block]).float()
            targets_n1 = targets_N[block, None]
            logsum_n1 = logits_nV.logsumexp(-1, keepdim=True)
            nll_N[block] = (logsum_n1 - logits_nV.gather(1, targets_n1))[:, 0]
            if gradient_ND is not None:
                slope_nV = (logits_nV - logsum_n1).exp_()
                slope_nV.scatter_add_(1, targets_n1, -torch.ones_like(logsum_n1))
                if head.softcap is not None:
                    slope_nV *= 1 - (logits_nV / head.softcap) ** 2
                if head.scale != 1.0:
                    slope_nV *= head.scale
                gradient_ND[block] = slope_nV.to(hidden_ND.dtype) @ head.weight_VD
        ctx.save_for_backward(gradient_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        (upstream_N,) = upstream
        return gradient_ND * upstream_N[:, None].to(gradient_ND.dtype), None, None
