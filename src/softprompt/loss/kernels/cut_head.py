"""The loss of a large frozen head on a GPU by cut-cross-entropy (Wijmans et al. 2024): no logits in memory, one kernel a pass.

An extra (`softprompt[cce]`). Where the package is not installed, or does not give what the plain road gives, heads go
through base/nll.py block by block.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from softprompt.base.nll import Head, dense

# Logits up to which the plain road is taken: it is faster below about 2**26 and takes 7 ms for 2**28 (this one 4, on an H100), and
# compiling this one's kernels takes one to two seconds a process (benchmarks/tuning_on_gpu.json).
MOST_PLAIN = 2**29
PROBED = 64  # positions of the comparison with the plain road
# Both roads round products to the head's dtype, and the kernel leaves out what is below that dtype's precision.
TOLERANCE = 8.0


class CutHead:
    """A loss of a head (base.nll.HeadLoss) by cut-cross-entropy, for more than `most_plain` logits.

    `impl` is the package's: its kernel for GPUs, or `torch_compile`, which keeps all logits and runs anywhere."""

    def __init__(self, head: Head, impl: str = "cce", most_plain: int = MOST_PLAIN) -> None:
        self.head, self.impl, self.most_plain = head, impl, most_plain

    def __call__(
        self, hidden_ND: Tensor, targets_N: Tensor, head: Head, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of each token, float32 [N], and where wanted its gradient, float32 [N, D].

        Before the first use it is compared with the plain road, which is taken for good where they differ."""
        assert head is self.head
        if len(hidden_ND) * len(head.weight_VD) <= self.most_plain or not self.agrees:
            return dense(hidden_ND, targets_N, head, wants_gradient)
        return self.cut(hidden_ND, targets_N, wants_gradient)

    @cached_property
    def agrees(self) -> bool:
        """Whether loss and gradient of a few made-up hidden states are those of the plain road."""
        head = self.head
        vocabulary, width = head.weight_VD.shape
        drawn = torch.Generator().manual_seed(0)
        device = head.weight_VD.device
        hidden_ND = torch.randn(PROBED, width, generator=drawn).to(device, head.weight_VD.dtype)
        targets_N = torch.randint(0, vocabulary, (PROBED,), generator=drawn).to(device)
        allowed = TOLERANCE * torch.finfo(head.weight_VD.dtype).eps
        for ours, theirs in zip(
            self.cut(hidden_ND, targets_N, True), dense(hidden_ND, targets_N, head, True), strict=True
        ):
            assert ours is not None
            assert theirs is not None
            if not bool((ours - theirs).norm() <= allowed * theirs.norm()):
                return False
        return True

    def cut(self, hidden_ND: Tensor, targets_N: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The same by cut-cross-entropy, however few logits there are."""
        from cut_cross_entropy import linear_cross_entropy

        head = self.head
        with torch.inference_mode(False), torch.set_grad_enabled(wants_gradient):
            # A copy that belongs to no graph, also where the caller reads without gradients.
            leaf_ND = torch.empty_like(hidden_ND, dtype=head.weight_VD.dtype).copy_(hidden_ND)
            leaf_ND.requires_grad_(wants_gradient)
            nll_N: Any = linear_cross_entropy(
                leaf_ND * head.scale,
                head.weight_VD,
                targets_N.clone(),
                softcap=head.softcap,
                reduction="none",
                filter_eps="auto",
                impl=self.impl,
            )
            if not wants_gradient:
                return nll_N.float(), None
            # No token's loss depends on another's hidden state, so the gradient of the sum is each one's own.
            (gradient_ND,) = torch.autograd.grad(nll_N.sum(), leaf_ND)
        return nll_N.detach().float(), gradient_ND.float()


def cut_head(head: Head, impl: str = "cce") -> CutHead | None:
    """A CutHead where the package is installed and knows such a head; None elsewhere."""
    weight_VD = head.weight_VD
    if (
        find_spec("cut_cross_entropy") is None
        or find_spec("triton") is None
        or (impl == "cce" and weight_VD.device.type != "cuda")
        or weight_VD.dtype == torch.float32  # who asks for float32 gets its rounding
        or head.bias_V is not None
        or head.shard is not None
    ):
        return None
    return CutHead(head, impl)
