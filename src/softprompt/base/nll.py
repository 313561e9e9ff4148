"""Cross-entropy through a frozen output layer: loss and gradient in one pass, never all logits at once.

The head's weights never change, so the only gradient is the one towards the hidden state, and it can be had together
with the loss: sum_v p_v w_v - w_target, over blocks of tokens and of vocabulary, with the sums rescaled whenever a
larger logit turns up (as attention does in FlashAttention; for heads see cut-cross-entropy, Wijmans et al. 2024).
Memory is one block, whatever the numbers of tokens and of vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from softprompt.base.hardware import product_dtype
from softprompt.base.split import Shard

BLOCK_LOGITS = 2**24  # 16 M numbers: 250,880 x 64 tokens
BLOCK_TOKENS = 512
BLOCK_VOCABULARY = 4096  # 512 x 4,096 float32 are 8 MB: they stay in the cache through product, exp, product
ON_ACCELERATORS = (
    4  # blocks are so many times as long either way: 128 MB, so that starting kernels costs little
)


@dataclass(frozen=True)
class Head:
    """A base's output layer: logits = softcap(scale * (hidden @ weight.T + bias)).

    With `shard`, the weight holds a part of the vocabulary, and other processes the rest."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: Shard | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V], in the weights' dtype."""
        # The head may lie on another device than the base's input.
        there_ND = hidden_ND.to(self.weight_VD.device)
        logits_NV = torch.nn.functional.linear(there_ND, self.weight_VD, self.bias_V)
        return self.finished(logits_NV).to(hidden_ND.device)

    def finished(self, logits_NV: Tensor) -> Tensor:
        """The product with the weights, scaled, capped, and joined with the parts of other processes."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV if self.shard is None else self.shard.joined(logits_NV)


class HeadLoss(Protocol):
    """Computes the loss of each token, float32 [N], and where wanted its gradient, float32 [N, D]."""

    def __call__(
        self, hidden_ND: Tensor, targets_N: Tensor, head: Head, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]: ...


def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: Head, head_loss: HeadLoss | None = None) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [N], differentiable towards `hidden_ND` alone.

    `head_loss` computes it; `dense` unless another is given."""
    nll_N: Tensor = _FrozenHeadNll.apply(hidden_ND, targets_N, head, head_loss or dense)  # type: ignore[no-untyped-call]
    return nll_N


class _FrozenHeadNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head, head_loss: HeadLoss) -> Tensor:
        nll_N, gradient_ND = head_loss(hidden_ND, targets_N, head, ctx.needs_input_grad[0])
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND.to(hidden_ND.dtype))
        return nll_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        (upstream_N,) = upstream
        return gradient_ND * upstream_N[:, None].to(gradient_ND.dtype), None, None, None


def dense(
    hidden_ND: Tensor, targets_N: Tensor, head: Head, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """All of the vocabulary, block by block: the exact loss and gradient, to the rounding of the products."""
    nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    gradient_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=torch.float32) if wants_gradient else None
    size = BLOCK_TOKENS * _larger(head)
    for start in range(0, len(hidden_ND), size):
        block = slice(start, start + size)
        nll_N[block], gradient_nD = dense_block(hidden_ND[block], targets_N[block], head, wants_gradient)
        if gradient_ND is not None and gradient_nD is not None:
            gradient_ND[block] = gradient_nD
    return nll_N, gradient_ND


def dense_block(
    hidden_nD: Tensor, targets_n: Tensor, head: Head, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    weight_VD, shard = head.weight_VD, head.shard
    if shard is not None:  # targets by their row of this part; those of other parts lie outside
        targets_n = targets_n - shard.first
    dtype = product_dtype(weight_VD.dtype, weight_VD.device)
    hidden_nD, targets_n = hidden_nD.to(weight_VD.device, dtype), targets_n.to(weight_VD.device)
    # Softmax online: the highest logit so far, the sum of exp(logit - highest), and the sum of such weights times rows.
    highest_n1 = hidden_nD.new_full((len(hidden_nD), 1), -torch.inf, dtype=torch.float32)
    sum_n1 = torch.zeros_like(highest_n1)
    target_n1 = torch.zeros_like(highest_n1)
    pull_nD = hidden_nD.new_zeros(hidden_nD.shape, dtype=torch.float32)
    size = BLOCK_VOCABULARY * _larger(head)
    for first in range(0, len(weight_VD), size):
        weight_vD = weight_VD[first : first + size].to(dtype)
        bias_v = None if head.bias_V is None else head.bias_V[first : first + size]
        logits_nv = capped(torch.mm(hidden_nD, weight_vD.T).float(), head, bias_v)
        # The target's logit is one of those summed, so that its rounding cancels and no loss is below zero.
        at_n1 = targets_n[:, None] - first
        own_n1 = logits_nv.gather(1, at_n1.clamp(0, logits_nv.shape[1] - 1))
        target_n1 = torch.where((at_n1 >= 0) & (at_n1 < logits_nv.shape[1]), own_n1, target_n1)
        # A higher logit shrinks what was summed before.
        higher_n1 = torch.maximum(highest_n1, logits_nv.amax(1, keepdim=True))
        shrink_n1 = torch.exp(highest_n1 - higher_n1)
        highest_n1 = higher_n1
        derivative_nv = softcap_derivative(logits_nv, head) if wants_gradient else None
        likely_nv = logits_nv.sub_(highest_n1).exp_()
        sum_n1.mul_(shrink_n1).add_(likely_nv.sum(1, keepdim=True))
        if wants_gradient:
            pulling_nv = (likely_nv if derivative_nv is None else likely_nv.mul_(derivative_nv)).to(dtype)
            pull_nD.mul_(shrink_n1)
            if dtype == torch.float32:
                pull_nD.addmm_(pulling_nv, weight_vD)
            else:
                pull_nD.add_(pulling_nv @ weight_vD)
    if shard is not None:  # the parts' sums, each relative to the highest logit of all
        own_highest_n1 = highest_n1
        highest_n1 = shard.highest(highest_n1.clone())
        shrink_n1 = torch.exp(own_highest_n1 - highest_n1)
        sum_n1, target_n1 = shard.sum(sum_n1.mul_(shrink_n1)), shard.sum(target_n1)
        if wants_gradient:
            pull_nD = shard.sum(pull_nD.mul_(shrink_n1))
    # log(sum) >= 0 >= target - highest, also after rounding.
    nll_n = (sum_n1.log() - (target_n1 - highest_n1))[:, 0]
    if not wants_gradient:
        return nll_n, None
    # Gradient: the expected row of the weight less the target's row.
    derivative_n1 = softcap_derivative(target_n1, head)
    target_nD = _target_rows(weight_VD, targets_n, shard)
    pull_nD.div_(sum_n1).sub_(target_nD if derivative_n1 is None else target_nD * derivative_n1)
    return nll_n, pull_nD.mul_(head.scale)


def _target_rows(weight_VD: Tensor, targets_n: Tensor, shard: Shard | None) -> Tensor:
    if shard is None:
        return weight_VD[targets_n].float()
    here_n1 = ((targets_n >= 0) & (targets_n < len(weight_VD)))[:, None]
    return shard.sum(weight_VD[targets_n.clamp(0, len(weight_VD) - 1)].float() * here_n1)


def _larger(head: Head) -> int:
    return 1 if head.weight_VD.device.type == "cpu" else ON_ACCELERATORS


def capped(raw_nv: Tensor, head: Head, bias_v: Tensor | None) -> Tensor:
    """Products to logits, in place: bias, scale and soft cap of the architecture."""
    if bias_v is not None:
        raw_nv.add_(bias_v)
    if head.scale != 1.0:
        raw_nv.mul_(head.scale)
    if head.softcap is not None:
        raw_nv.div_(head.softcap).tanh_().mul_(head.softcap)
    return raw_nv


def softcap_derivative(logits_nv: Tensor, head: Head) -> Tensor | None:
    """The factor that a soft cap leaves of the gradient; None without a cap."""
    return None if head.softcap is None else 1.0 - (logits_nv / head.softcap).square()
