"""The score that chooses the best step: held-out loss, or how often the frozen base would generate exactly the wanted text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.placement import place
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.prompt.soft_prompt import Plain


def token_accuracy(lm: FrozenLM, rows: Sequence[Encoded], prompt: Plain, batch_size: int) -> float:
    """The share of trained tokens that the base holds most likely, given those before."""
    right = torch.cat(list(_right(lm, rows, prompt, batch_size)))
    return float(right.double().mean())


def exact_match(lm: FrozenLM, rows: Sequence[Encoded], prompt: Plain, batch_size: int) -> float:
    """The share of rows of which every trained token is the most likely one: those that greedy decoding says exactly."""
    return sum(bool(right_N.all()) for right_N in _right(lm, rows, prompt, batch_size)) / len(rows)


SCORES: Mapping[str, Callable[[FrozenLM, Sequence[Encoded], Plain, int], float]] = {
    "token_accuracy": token_accuracy,
    "exact_match": exact_match,
}
"""Higher is better. `nll`, the default, needs none of them."""


def _right(lm: FrozenLM, rows: Sequence[Encoded], prompt: Plain, batch_size: int) -> Iterator[Tensor]:
    """For each row, in any order: which of its trained tokens are the most likely ones."""
    device = lm.device
    ordered = sorted(rows, key=len)
    for first in range(0, len(ordered), batch_size):
        some = ordered[first : first + batch_size]
        batch = collate(some).to(device)
        with torch.inference_mode():
            placed = place(lm, batch, prompt)
            hidden_BSD = lm.hidden(placed.embeddings_BSD, placed.mask_BS, placed.positions_BS, placed.past)
            before_BS = batch.trained_BS[:, 1:]
            likeliest_N = torch.cat(
                [lm.logits(part_nD).argmax(-1) for part_nD in torch.split(hidden_BSD[:, :-1][before_BS], 64)]
            )
            right_N = (likeliest_N == batch.ids_BS[:, 1:][before_BS]).cpu()
        yield from torch.split(right_N, [row.trained_tokens for row in some])
