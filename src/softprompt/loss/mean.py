"""Held-out loss of a prompt, or of the untouched base, over encoded rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.loss.gradient import Loss
from softprompt.prompt.soft_prompt import Plain


def mean_nll(
    loss: Loss, encoded: Sequence[Encoded], prompt: Plain | None = None, *, batch_size: int = 8
) -> float:
    """Loss in nats per trained token over all rows together."""
    total, tokens = 0.0, 0
    for _, nll_N in token_nlls(loss, encoded, prompt, batch_size=batch_size):
        total += float(nll_N.double().sum())
        tokens += nll_N.numel()
    return total / tokens


class BaseLosses:
    """Losses of the untouched base that were measured so far, for runs that are judged on the same rows."""

    def __init__(self) -> None:
        self._known: list[tuple[Sequence[Encoded], int, float]] = []

    def nll(self, loss: Loss, encoded: Sequence[Encoded], *, batch_size: int) -> float:
        """Loss in nats per trained token over all rows together; `loss` is one of the same base each time."""
        for rows, size, nll in self._known:
            if (rows, size) == (encoded, batch_size):
                return nll
        nll = mean_nll(loss, encoded, batch_size=batch_size)
        self._known.append((encoded, batch_size, nll))
        return nll


def token_nlls(
    loss: Loss, encoded: Sequence[Encoded], prompt: Plain | None = None, *, batch_size: int = 8
) -> Iterator[tuple[int, Tensor]]:
    """Each row's index in `encoded` and the loss of its trained tokens, in nats, float32 on the CPU.

    Rows come in order of length, so that batches hold little padding; no row's figures depend on its neighbours."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        rows = [encoded[index] for index in indices]
        with torch.inference_mode():
            nll_N = loss(collate(rows), prompt).cpu()
        yield from zip(indices, torch.split(nll_N, [row.trained_tokens for row in rows]), strict=True)
