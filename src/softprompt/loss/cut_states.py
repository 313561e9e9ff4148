"""Hidden states where a deep prompt begins to learn: below it nothing changes, so every row is read up to there once.

If only the layers from a cut on learn, a step needs the layers below it neither backward nor, once a row has been read,
forward. Over several epochs half of the layers cost about half of the time. Results equal those of reading everything, up to
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.placement import place
from softprompt.data.batch import Batch
from softprompt.loss.packed_body import PackedBody
from softprompt.prompt.soft_prompt import Plain


def below_detached(prompt: Plain, first_layer: int) -> Plain:
    """The deep prompt (keys, values), [L, P, H, K] each, differentiable from layer `first_layer` on alone."""
    return tuple(torch.cat([part[:first_layer].detach(), part[first_layer:]]) for part in prompt)


class CutStates:
    """The states of rows at the cut, by what the prompt holds below it and by their token ids, in at most `budget_bytes`.

    `read` counts the rows that were read; one beyond the budget is read each time."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self.read = 0
        self._kept: list[tuple[Plain, dict[tuple[int, ...], Tensor]]] = []

    def of(self, lm: FrozenLM, body: PackedBody, batch: Batch, prompt: Plain, first_layer: int) -> Tensor:
        """The states [B, S, D] of the batch's rows that enter layer `first_layer` under `prompt`; zero at padding."""
        # Not as inference tensors, even when a loss without gradient asks first: learning uses them later.
        with torch.inference_mode(False), torch.no_grad():
            kept = self._states_under(tuple(part[:first_layer] for part in prompt))
            rows = []
            for row in (_row(batch, number) for number in range(len(batch.ids_BS))):
                key = tuple(row.ids_BS[0].tolist())
                if key not in kept:
                    # By itself: in company its last bits would depend on the other rows.
                    self.read += 1
                    state_SD = body.states_entering(first_layer, place(lm, row, prompt), row)
                    rows.append(state_SD)
                    if self.bytes + state_SD.nbytes <= self.budget_bytes:
                        kept[key] = state_SD
                        self.bytes += state_SD.nbytes
                else:
                    rows.append(kept[key])
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _states_under(self, below: Plain) -> dict[tuple[int, ...], Tensor]:
        """What is kept for a prompt that holds `below` under the cut: runs side by side have starts of their own."""
        for known, states in self._kept:
            if all(map(torch.equal, known, below)):
                return states
        states = {}
        self._kept.append((tuple(part.clone() for part in below), states))
        return states


def _row(batch: Batch, number: int) -> Batch:
    """One row of a batch without its padding."""
    own, length = slice(number, number + 1), int(batch.lengths_B[number])
    return Batch(
        batch.ids_BS[own, :length],
        batch.soft_BS[own, :length],
        batch.trained_BS[own, :length],
        batch.lengths_B[own],
        batch.rows[own],
    )
