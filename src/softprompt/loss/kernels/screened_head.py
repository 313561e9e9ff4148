"""The loss of a large frozen head on a CPU: int8 finds the entries that matter, float products compute just those.

Nearly all of a vocabulary is out of the question at any one position, and the gradient from there is below rounding
(cut-cross-entropy, Wijmans et al. 2024, drops what is under 2^-12). So all logits are first taken with int8 products,
which this CPU does several times faster. Entries that any token of the block gives 2^-13 or more are then computed
from the real weights: their logits, their share of the sum, their gradient. The rest counts with its int8 estimate in
the sum of probabilities, where errors of single entries average out. Its gradient is not dropped, which would cost up
to a quarter of the whole: of vectors around a mean m with covariance C, weighed by exp(h . w), the mean is m + C h
(exactly so for a normal distribution), with the mean of each block of the vocabulary and one covariance for all. That
leaves an error of under 0.2 %, less than what bfloat16 products leave.

Every call compares int8 with the real logits on the entries computed both ways, and where they are far apart, or where
most of the vocabulary matters, the dense loss is used instead. The int8 copy is a byte a weight; nothing else is held
but one block of probabilities of bounded size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.base.hardware import has_int8_products, product_dtype
from softprompt.base.nll import Head, dense, dense_block
from softprompt.loss.kernels.int8 import Int8Weights, coded_rows, outliers
from softprompt.loss.kernels.workspace import scratch

MIN_PROBABILITY = (
    2.0**-13
)  # at one position of a block at least; a less likely token adds less than bfloat16 rounds
BLOCK_VOCABULARY = 2048
BLOCK_PROBABILITIES = 2**25  # bfloat16: 64 MB; 128 tokens of a vocabulary of 250,880
BLOCK_TOKENS = 128  # at most: what matters to any token of a larger block is more of the vocabulary
MAX_CHOSEN_SHARE = 1 / 4  # of the vocabulary; above, the dense kernel is as fast
MAX_LOGIT_ERROR = 0.1  # root mean square difference of int8 logits from the real ones, in nats
ROWS_PER_DIMENSION = 16  # sampled to estimate the covariance
MIN_WEIGHTS = 2**24  # of a head; smaller ones cost little either way
LARGE = 2**25  # weights of a head that is screened for few tokens too, and without a gradient
MANY_TOKENS = 64
HEADROOM = 30.0  # nats above the target's logit: exp stays finite up to 118 of them


class PackedHead:
    """A head in int8, with what approximates the part of the gradient that is left out. Packed with the first loss."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.blocks: list[tuple[int, Int8Weights]] = []  # where in the vocabulary each begins
        self.means_MD = torch.empty(0)
        self.covariance_DD = torch.empty(0)

    def pack(self) -> None:
        """Every row of the weight as int8 with its own scale, packed as the product wants it; once."""
        if self.blocks:
            return
        weight_VD = self.head.weight_VD
        width = weight_VD.shape[1]
        # The covariance only weighs errors, so a sample of some rows per dimension estimates it well enough.
        stride = max(1, len(weight_VD) // (ROWS_PER_DIMENSION * width))
        means, sampled = [], 0
        self.covariance_DD = torch.zeros(width, width)
        for first in range(0, len(weight_VD), BLOCK_VOCABULARY):
            rows_vD = weight_VD[first : first + BLOCK_VOCABULARY]
            weight_vD = scratch("head", *rows_vD.shape).copy_(rows_vD)
            # The gradient of the entries that are not chosen follows from each block's mean and the one covariance.
            means.append(weight_vD.mean(0))
            around_sD = weight_vD[::stride] - means[-1]
            self.covariance_DD.addmm_(around_sD.T, around_sD)
            sampled += len(around_sD)
            self.blocks.append((first, Int8Weights(rows_vD, rows=256)))
        self.means_MD = torch.stack(means)
        self.covariance_DD /= sampled


class ScreenedHead:
    """A loss for `token_nll` over a packed head. It counts the blocks that int8 could not settle, to stop trying."""

    def __init__(self, packed: PackedHead) -> None:
        self.packed, self.head = packed, packed.head
        self.taken = 0
        self.refused = 0

    def __call__(
        self, hidden_ND: Tensor, targets_N: Tensor, head: Head, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and gradient as `nll.dense` gives them, to the rounding of bfloat16."""
        is_much = wants_gradient and len(hidden_ND) >= MANY_TOKENS
        if not is_much and head.weight_VD.numel() < LARGE:
            return dense(hidden_ND, targets_N, head, wants_gradient)
        self.packed.pack()
        nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        gradient_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=torch.float32) if wants_gradient else None
        # As many tokens at a time as keep the bfloat16 probabilities of the whole vocabulary in a bounded buffer.
        size = max(16, min(BLOCK_TOKENS, BLOCK_PROBABILITIES // len(head.weight_VD)))
        outliers_O = outliers(hidden_ND)
        probabilities_nV = scratch(
            "probabilities", min(size, len(hidden_ND)), len(head.weight_VD), dtype=torch.bfloat16
        )
        for start in range(0, len(hidden_ND), size):
            block = slice(start, start + size)
            hidden_nD, targets_n = hidden_ND[block], targets_N[block]
            screened = None
            # Screening that fails costs a product: once it fails more often than it helps, the dense loss is used at once.
            if self.refused <= self.taken + 2:
                screened = self._screened(
                    hidden_nD.float(),
                    targets_n,
                    wants_gradient,
                    probabilities_nV[: len(hidden_nD)],
                    outliers_O,
                )
                self.taken += screened is not None
                self.refused += screened is None
            nll_N[block], part_nD = screened or dense_block(hidden_nD, targets_n, head, wants_gradient)
            if gradient_ND is not None and part_nD is not None:
                gradient_ND[block] = part_nD
        return nll_N, gradient_ND

    def _screened(
        self,
        hidden_nD: Tensor,
        targets_n: Tensor,
        wants_gradient: bool,
        probabilities_nV: Tensor,
        outliers_O: Tensor,
    ) -> tuple[Tensor, Tensor | None] | None:
        head = self.head
        dtype = product_dtype(head.weight_VD.dtype, head.weight_VD.device)
        # Probabilities relative to the target's, so that their scale is known before any other logit is.
        target_nD = head.weight_VD[targets_n].float()
        shift_n1 = (hidden_nD * target_nD).sum(1, keepdim=True).mul_(head.scale).add_(HEADROOM)
        below_n1 = shift_n1.neg()
        # All logits with int8 products: their sums a block of the vocabulary, and each probability in bfloat16.
        rows = coded_rows(hidden_nD * head.scale, outliers_O)
        sums_nM = hidden_nD.new_empty(len(hidden_nD), len(self.packed.blocks))
        for index, (start, block) in enumerate(self.packed.blocks):
            likely_nv = block.product(rows, plus=below_n1).exp_()
            stored_nv = probabilities_nV[:, start : start + likely_nv.shape[1]].copy_(likely_nv)
            # Sums are of what is stored: chosen entries are subtracted again below, and must leave nothing behind.
            torch.sum(stored_nv, 1, dtype=torch.float32, out=sums_nM[:, index])
        sum_n1 = sums_nM.sum(1, keepdim=True)
        if not bool(torch.isfinite(sum_n1).all()):
            return None
        # An entry matters where any token of the block gives it 2^-13 of its probability.
        share_n1 = sum_n1.reciprocal().bfloat16()
        matters_V = torch.empty(len(head.weight_VD), dtype=torch.bool)
        for start, _ in self.packed.blocks:
            here = slice(start, start + BLOCK_VOCABULARY)
            torch.ge((probabilities_nV[:, here] * share_n1).amax(0), MIN_PROBABILITY, out=matters_V[here])
        matters_V[targets_n] = True
        chosen_M = matters_V.nonzero()[:, 0]
        if len(chosen_M) > MAX_CHOSEN_SHARE * len(head.weight_VD):
            return None
        # Chosen entries: the real logits take the place of the int8 ones.
        hidden_cast_nD = hidden_nD.to(dtype)
        place_V = torch.empty(len(head.weight_VD), dtype=torch.int64)
        place_V[chosen_M] = torch.arange(len(chosen_M))
        target_place_n1 = place_V[targets_n][:, None]
        exact_n1, target_likely_n1 = torch.zeros_like(sum_n1), torch.zeros_like(sum_n1)
        pull_nD = torch.zeros_like(hidden_nD)
        off, weighed = torch.zeros(()), torch.zeros(())
        for first in range(0, len(chosen_M), BLOCK_VOCABULARY):
            chosen_m = chosen_M[first : first + BLOCK_VOCABULARY]
            weight_mD = head.weight_VD[chosen_m].to(dtype)
            rough_nm = probabilities_nV[:, chosen_m].float()
            likely_nm = torch.mm(hidden_cast_nD, weight_mD.T).float().mul_(head.scale).sub_(shift_n1).exp_()
            exact_n1 += likely_nm.sum(1, keepdim=True)
            # The target is one of the chosen: its share comes from the product that the sum comes from.
            at_n1 = target_place_n1 - first
            own_n1 = likely_nm.gather(1, at_n1.clamp(0, len(chosen_m) - 1))
            target_likely_n1 = torch.where((at_n1 >= 0) & (at_n1 < len(chosen_m)), own_n1, target_likely_n1)
            sums_nM.index_add_(1, chosen_m // BLOCK_VOCABULARY, rough_nm, alpha=-1)
            # Relative differences of probabilities are differences of logits, as long as they are small.
            off += (likely_nm - rough_nm).div_(sum_n1).square_().sum()
            weighed += (likely_nm / sum_n1).square_().sum()
            if wants_gradient:
                if dtype == torch.float32:
                    pull_nD.addmm_(likely_nm, weight_mD)
                else:
                    pull_nD.add_(likely_nm.to(dtype) @ weight_mD)
        if not float(off) <= MAX_LOGIT_ERROR**2 * float(weighed):
            return None
        total_n1 = exact_n1 + sums_nM.clamp_(min=0).sum(1, keepdim=True)
        nll_n = total_n1.div(target_likely_n1).log_()[
            :, 0
        ]  # the total holds the target's share: never below zero
        if not wants_gradient:
            return nll_n, None
        # What was not chosen pulls by its blocks' means, tilted along the hidden state by the covariance.
        tilt_nD = torch.mm(hidden_nD * head.scale, self.packed.covariance_DD)
        pull_nD.addmm_(sums_nM, self.packed.means_MD).addcmul_(sums_nM.sum(1, keepdim=True), tilt_nD)
        pull_nD.div_(total_n1).sub_(target_nD)
        return nll_n, pull_nD.mul_(head.scale)


def packed(head: Head) -> PackedHead | None:
    """The head to screen where that is faster and holds: large, bfloat16, without bias and soft cap, on such a CPU."""
    weight_VD = head.weight_VD
    if (
        weight_VD.device.type != "cpu"
        or weight_VD.dtype != torch.bfloat16  # who asks for float32 gets its rounding
        or weight_VD.numel() < MIN_WEIGHTS
        or head.bias_V is not None
        or head.softcap is not None
        or head.shard is not None
        or not has_int8_products()
    ):
        return None
    return PackedHead(head)
