"""Cross-entropy of the frozen head against a teacher's probabilities instead of one right token.

The teacher's k likeliest tokens keep their probabilities, and all other tokens count as one class, the rest. So the loss
is least, and the divergence 0, where the student is the teacher; shares of the k tokens alone would pull a student away
from its teacher by as much as the rest weighs. Loss and gradient come in one pass, as for single targets (base/nll.py).
With the student's probabilities p, the teacher's t, and r and R for the rest of each, the gradient at a logit is
p_v - t_v for one of the k tokens, and p_v (1 - R / r) for any other. The KL divergence is this loss less the teacher's
entropy, which no prompt changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.nll import BLOCK_LOGITS, Head, HeadLoss, softcap_derivative

FEW_LISTED = 256  # listed tokens; with more, all logits cost no more than their rows
# A rest that is known as 1 less the listed is rounding where the teacher's is below the first; the ratio of both rests
# multiplies the rounding of the mean row, so it is bounded by the second.
SMALLEST_REST, MOST_RATIO = 1e-3, 30.0
LEAST = 1e-30  # the smallest probability that the rest of a student can have, so that its logarithm is finite


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's likeliest tokens at N positions: token ids [N, k] with their probabilities [N, k], float32, and the
    probability of all other tokens together [N]. They add up to 1 at every position; an id with probability 0 is a
    filler and counts as one of the others."""

    ids_Nk: Tensor
    probabilities_Nk: Tensor
    rest_N: Tensor

    def __len__(self) -> int:
        return len(self.ids_Nk)

    @property
    def entropy_N(self) -> Tensor:
        """The teacher's entropy over its k tokens and the rest in nats, [N]: the least that the cross-entropy can be."""
        own_N = torch.xlogy(self.probabilities_Nk, self.probabilities_Nk).sum(1)
        return -own_N - torch.xlogy(self.rest_N, self.rest_N)

    def to(self, device: torch.device) -> SoftTargets:
        """The same on another device."""
        return SoftTargets(self.ids_Nk.to(device), self.probabilities_Nk.to(device), self.rest_N.to(device))

    def mixed(self, gold_N: Tensor, share: float) -> SoftTargets:
        """Targets with `share` of the probability given to the right tokens [N], and the rest unchanged."""
        kept_Nk = self.probabilities_Nk * (1 - share)
        # A right token that the teacher lists already gets its share there: no id may occur twice.
        listed_Nk = (self.ids_Nk == gold_N[:, None]) & (self.probabilities_Nk > 0)
        missing_N1 = (~listed_Nk.any(1, keepdim=True)).to(kept_Nk.dtype)
        return SoftTargets(
            torch.cat([self.ids_Nk, gold_N[:, None]], 1),
            torch.cat([kept_Nk + share * listed_Nk, share * missing_N1], 1),
            self.rest_N * (1 - share),
        )

    @classmethod
    def of(cls, logits_NV: Tensor, k: int | None) -> SoftTargets:
        """The k likeliest tokens of each position and the rest, or all tokens (k None)."""
        log_probabilities_NV = logits_NV.float().log_softmax(1)
        top = log_probabilities_NV.topk(min(k or logits_NV.shape[1], logits_NV.shape[1]), dim=1)
        # Summed over the others, not 1 less the listed: where the teacher is sure, that would be rounding.
        rest_N = log_probabilities_NV.scatter_(1, top.indices, -torch.inf).exp_().sum(1)
        return cls(top.indices, top.values.exp(), rest_N)

    @classmethod
    def joined(cls, parts: list[SoftTargets]) -> SoftTargets:
        """Positions of several, one after another; those of fewer tokens are filled up with probability 0."""
        most = max(part.ids_Nk.shape[1] for part in parts)
        ids, probabilities = (
            [torch.nn.functional.pad(tensor, (0, most - tensor.shape[1])) for tensor in tensors]
            for tensors in ([part.ids_Nk for part in parts], [part.probabilities_Nk for part in parts])
        )
        return cls(torch.cat(ids), torch.cat(probabilities), torch.cat([part.rest_N for part in parts]))


def soft_cross_entropy(
    hidden_ND: Tensor, targets: SoftTargets, head: Head, head_loss: HeadLoss | None = None
) -> Tensor:
    """-sum_k t_k log p_k - R log r in nats at every position, float32 [N], differentiable towards `hidden_ND` alone.

    `head_loss` (a ScreenedHead) gives loss and gradient of the likeliest token, from which those of all k follow;
    without it all logits are computed."""
    loss_N: Tensor = _FrozenHeadSoftTargets.apply(hidden_ND, targets, head, head_loss)  # type: ignore[no-untyped-call]
    return loss_N


class _FrozenHeadSoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets: SoftTargets, head: Head, head_loss: HeadLoss | None
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        gradient_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=torch.float32) if wants_gradient else None
        # As many positions at a time as keep the logits of the whole vocabulary in a bounded buffer.
        size = max(1, BLOCK_LOGITS // len(head.weight_VD))
        for start in range(0, len(hidden_ND), size):
            block = slice(start, start + size)
            part = SoftTargets(targets.ids_Nk[block], targets.probabilities_Nk[block], targets.rest_N[block])
            # With few listed tokens the fast head gives the sum over the vocabulary; with many, its extra rows cost more than it saves.
            if head_loss is None or head.shard is not None or part.ids_Nk.shape[1] > FEW_LISTED:
                loss_n, pull_nD = _block(hidden_ND[block], part, head, wants_gradient)
            else:
                loss_n, pull_nD = _from_likeliest(hidden_ND[block], part, head, head_loss, wants_gradient)
            loss_N[block] = loss_n
            if gradient_ND is not None and pull_nD is not None:
                gradient_ND[block] = pull_nD
        # The gradient is computed with the loss: logits are dropped block by block and would have to be computed again.
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND.to(hidden_ND.dtype))
        return loss_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0][:, None].to(gradient_ND.dtype), None, None, None


def _block(
    hidden_nD: Tensor, targets: SoftTargets, head: Head, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    logits_nV = head.logits(hidden_nD).float()
    ids_nk, wanted_nk = targets.ids_Nk, targets.probabilities_Nk
    # The teacher's tokens are looked up in the same logits that are summed, so that no loss is below the entropy.
    log_likely_nk = logits_nV.gather(1, ids_nk) - logits_nV.logsumexp(1, keepdim=True)
    likely_nV = logits_nV.softmax(1)
    # The others are what is left when the listed ones are struck out; fillers are not listed.
    listed_nk = wanted_nk > 0
    struck_nk = likely_nV.gather(1, ids_nk) * listed_nk
    others_nV = likely_nV.scatter_add(1, ids_nk, -struck_nk).clamp_(min=0)
    rest_n1 = others_nV.sum(1, keepdim=True).clamp_(min=LEAST)
    wanted_rest_n1 = targets.rest_N[:, None]
    loss_n = -(wanted_nk * log_likely_nk).sum(1) - (wanted_rest_n1 * rest_n1.log())[:, 0]
    if not wants_gradient:
        return loss_n, None
    # d loss / d logit: p - t for the listed, p (1 - R / r) for the others; then through cap, scale and weight.
    pull_nV = others_nV.mul_(1 - wanted_rest_n1 / rest_n1)
    pull_nV.scatter_add_(1, ids_nk, struck_nk - wanted_nk)
    if head.softcap is not None:
        pull_nV.mul_(1.0 - (logits_nV / head.softcap).square())
    if head.shard is None:
        return loss_n, (pull_nV.to(head.weight_VD) @ head.weight_VD).float().mul_(head.scale)
    own_nV = pull_nV[:, head.shard.first : head.shard.first + len(head.weight_VD)]
    pull_nD = head.shard.sum((own_nV.to(head.weight_VD) @ head.weight_VD).float())
    return loss_n, pull_nD.mul_(head.scale)


def _from_likeliest(
    hidden_nD: Tensor, targets: SoftTargets, head: Head, head_loss: HeadLoss, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by way of one target: its loss says the sum over the vocabulary, its gradient the mean row of the head.

    Only the k listed rows of the head are read besides."""
    ids_nk, wanted_nk = targets.ids_Nk, targets.probabilities_Nk
    # The loss of one target is log sum - logit, and its gradient the mean row of the head less the target's:
    # together they hold all that is needed of the whole vocabulary.
    first_n = ids_nk[:, 0]
    nll_n, pull_nD = head_loss(hidden_nD, first_n, head, wants_gradient)
    rows_nkD = head.weight_VD[ids_nk].float()
    logits_nk = torch.einsum("nd,nkd->nk", hidden_nD.float(), rows_nkD)
    if head.bias_V is not None:
        logits_nk = logits_nk + head.bias_V[ids_nk].float()
    logits_nk = logits_nk * head.scale
    if head.softcap is not None:
        logits_nk = torch.tanh(logits_nk / head.softcap) * head.softcap
    # log p_k = l_k - log sum, and the loss of the likeliest token is log sum - l_1.
    log_likely_nk = logits_nk - logits_nk[:, :1] - nll_n[:, None]
    likely_nk = log_likely_nk.exp() * (wanted_nk > 0)
    rest_n1 = (1 - likely_nk.sum(1, keepdim=True)).clamp(min=LEAST)
    wanted_rest_n1 = targets.rest_N[:, None]
    loss_n = -(wanted_nk * log_likely_nk).sum(1) - (wanted_rest_n1 * rest_n1.log())[:, 0]
    if not wants_gradient or pull_nD is None:
        return loss_n, None
    # pull is sum_v p_v w_v - w_1. Wanted: that sum times (1 - R / r), and p_k R / r - t_k of every listed row.
    slopes_nk = softcap_derivative(logits_nk, head)
    rows_nkD = rows_nkD if slopes_nk is None else rows_nkD * slopes_nk[..., None]
    ratio_n1 = (wanted_rest_n1 / rest_n1).clamp(max=MOST_RATIO)
    ratio_n1 = torch.where(wanted_rest_n1 < SMALLEST_REST, torch.ones_like(ratio_n1), ratio_n1)
    mean_nD = pull_nD / head.scale + rows_nkD[:, 0]
    own_nD = torch.einsum("nk,nkd->nd", likely_nk * ratio_n1 - wanted_nk, rows_nkD)
    return loss_n, (mean_nD * (1 - ratio_n1) + own_nD).mul_(head.scale)
