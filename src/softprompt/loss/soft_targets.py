"""Cross-entropy of the frozen head against a teacher's probabilities instead of one right token.

Loss and gradient come in one pass, as for single targets (base/nll.py): the gradient at a hidden state is
sum_v p_v w_v - sum_k t_k w_k, with the teacher's probabilities t over its k likeliest tokens. The KL divergence differs
from this loss by the teacher's entropy alone, which no prompt changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.nll import BLOCK_LOGITS, Head


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's likeliest tokens at N positions: token ids [N, k], the likeliest first, and their probabilities
    [N, k], float32, which add up to 1 at every position."""

    ids_Nk: Tensor
    probabilities_Nk: Tensor

    def __len__(self) -> int:
        return len(self.ids_Nk)

    @property
    def entropy_N(self) -> Tensor:
        """The teacher's entropy in nats, [N]: the least that the cross-entropy can be."""
        return -torch.xlogy(self.probabilities_Nk, self.probabilities_Nk).sum(1)

    def to(self, device: torch.device) -> SoftTargets:
        """The same on another device."""
        return SoftTargets(self.ids_Nk.to(device), self.probabilities_Nk.to(device))

    def mixed(self, gold_N: Tensor, share: float) -> SoftTargets:
        """Targets with `share` of the probability given to the right tokens [N], and the rest unchanged."""
        ones_N1 = torch.full_like(self.probabilities_Nk[:, :1], share)
        return SoftTargets(
            torch.cat([self.ids_Nk, gold_N[:, None]], 1),
            torch.cat([self.probabilities_Nk * (1 - share), ones_N1], 1),
        )

    @classmethod
    def of(cls, logits_NV: Tensor, k: int | None) -> SoftTargets:
        """The k likeliest tokens of each position with their shares of each other, or all of them (k None)."""
        log_probabilities_NV = logits_NV.float().log_softmax(1)
        top = log_probabilities_NV.topk(min(k or logits_NV.shape[1], logits_NV.shape[1]), dim=1)
        return cls(top.indices, top.values.softmax(1))

    @classmethod
    def joined(cls, parts: list[SoftTargets]) -> SoftTargets:
        """Positions of several, one after another; those of fewer tokens are filled up with probability 0."""
        most = max(part.ids_Nk.shape[1] for part in parts)
        parts = [
            cls(
                *(
                    torch.nn.functional.pad(tensor, (0, most - tensor.shape[1]))
                    for tensor in (part.ids_Nk, part.probabilities_Nk)
                )
            )
            for part in parts
        ]
        return cls(
            torch.cat([part.ids_Nk for part in parts]), torch.cat([part.probabilities_Nk for part in parts])
        )


def soft_cross_entropy(hidden_ND: Tensor, targets: SoftTargets, head: Head) -> Tensor:
    """-sum_k t_k log p_k in nats at every position, float32 [N], differentiable towards `hidden_ND` alone."""
    loss_N: Tensor = _FrozenHeadSoftTargets.apply(  # type: ignore[no-untyped-call]
        hidden_ND, targets.ids_Nk, targets.probabilities_Nk, head
    )
    return loss_N


class _FrozenHeadSoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, ids_Nk: Tensor, probabilities_Nk: Tensor, head: Head) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        gradient_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=torch.float32) if wants_gradient else None
        size = max(1, BLOCK_LOGITS // len(head.weight_VD))
        for start in range(0, len(hidden_ND), size):
            block = slice(start, start + size)
            loss_N[block], pull_nD = _block(
                hidden_ND[block], ids_Nk[block], probabilities_Nk[block], head, wants_gradient
            )
            if gradient_ND is not None and pull_nD is not None:
                gradient_ND[block] = pull_nD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND.to(hidden_ND.dtype))
        return loss_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0][:, None].to(gradient_ND.dtype), None, None, None


def _block(
    hidden_nD: Tensor, ids_nk: Tensor, probabilities_nk: Tensor, head: Head, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    logits_nV = head.logits(hidden_nD).float()
    # The teacher's tokens are looked up in the same logits that are summed, so that no loss is below the entropy.
    log_sum_n1 = logits_nV.logsumexp(1, keepdim=True)
    loss_n = (probabilities_nk * (log_sum_n1 - logits_nV.gather(1, ids_nk))).sum(1)
    if not wants_gradient:
        return loss_n, None
    # d loss / d logit_v = p_v - t_v, since the teacher's probabilities add up to 1; then through cap, scale and weight.
    grad_nV = logits_nV.sub(log_sum_n1).exp_().scatter_add_(1, ids_nk, -probabilities_nk)
    if head.softcap is not None:
        grad_nV.mul_(1.0 - (logits_nV / head.softcap).square())
    return loss_n, (grad_nV.to(head.weight_VD.dtype) @ head.weight_VD).float().mul_(head.scale)
