"""The KL divergence of a prompt's predictions from a teacher's, as a loss to learn with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from softprompt.data.batch import Batch
from softprompt.loss.fast import FastLoss
from softprompt.loss.soft_targets import SoftTargets, soft_cross_entropy
from softprompt.prompt.soft_prompt import Plain


class DivergenceLoss:
    """KL divergence of the student from the teacher at every trained token.

    The teacher's targets of a row are found by the row's number. Below zero only by rounding; 0 where the student is the
    teacher. `weight` multiplies it."""

    def __init__(self, fast: FastLoss, targets: Mapping[int, SoftTargets], weight: float = 1.0) -> None:
        self.fast, self.targets, self.weight = fast, targets, weight
        self.context_cache = fast.context_cache

    def __call__(self, batch: Batch, prompt: Plain | None = None) -> Tensor:
        """Nats at every trained token, float32 [N]."""
        hidden_ND = self.fast.hidden(batch, prompt)
        wanted = SoftTargets.joined([self.targets[row] for row in batch.rows]).to(hidden_ND.device)
        loss_N = soft_cross_entropy(hidden_ND, wanted, self.fast.lm.head, self.fast.head_loss)
        return self.weight * (loss_N - wanted.entropy_N)
