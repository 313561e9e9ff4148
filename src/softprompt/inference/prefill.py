"""Reads rows that differ in prompt and length, each continued from the state that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, batch_cache, row_state
from softprompt.base.placement import Placed
from softprompt.base.ragged import Known, RaggedGroup, can_read_ragged, hidden_ragged
from softprompt.base.shared_prefix import hidden_in_parts, prefix_groups
from softprompt.errors import PromptError


@dataclass(frozen=True)
class PrefillRow:
    """A sequence to read: the key/value state of its first positions, and the marks of all of them.

    A mark is a token id, or -1 - i for row i of `vectors_PD`. `shared` is the state of a long prompt in front of `state`,
    which rows share and never copy (base/shared_prefix.py)."""

    state: State
    marks: tuple[int, ...]
    vectors_PD: Tensor | None = None
    shared: State = EMPTY

    @property
    def rest(self) -> int:
        """Positions that are still to be computed."""
        return len(self.marks) - self.known

    @property
    def known(self) -> int:
        """Positions whose keys and values are known."""
        return self.shared.length + self.state.length


@dataclass(frozen=True)
class Prefilled:
    """One forward pass over rows that differ in prompt and length.

    `cache` holds no prefix that rows share. Row b's real columns of `cache` are `columns - rows[b].state.length` up to `columns + rows[b].rest`;
    `hidden_BTD[b, t]` is the state at its position `rows[b].known + t`.
    """

    cache: Any
    columns: int
    hidden_BTD: Tensor
    rows: tuple[PrefillRow, ...]

    def span(self, b: int) -> tuple[int, int]:
        """First column of row b, and the one after its last."""
        return self.columns - self.rows[b].state.length, self.columns + self.rows[b].rest


# What one more pass costs, in positions: about 40 positions of a small base on a CPU, where reading the weights and
# starting the layers' operations count; on a GPU a pass of few positions costs as much as one of thousands.
PASS_COST_CPU, PASS_COST_GPU = 40, 4096
# Rows of unlike length that are read in one pass without padding.
PASS_POSITIONS = 4096


def like_lengths(
    lm: FrozenLM, rows: Sequence[PrefillRow], most_rows: int | None = None
) -> list[list[PrefillRow]]:
    """Groups rows into passes of at most `most_rows` rows that together cost least.

    A pass computes as many positions for every row as its longest row has left, so a long text beside short ones
    makes all of them long. The cut is found by a dynamic programme over the rows in the order of their lengths. Known
    state and rest, each as long as the group's longest, must fit the base: some architectures (MPT, GPT-Neo) have
    tables of that many columns, padding included."""
    pass_cost = PASS_COST_CPU if torch.device(lm.device).type == "cpu" else PASS_COST_GPU
    most_columns = longest_text(lm)
    # Sorted: a pass is as long as its longest row, so that only neighbours in length need to share one.
    ordered = sorted(rows, key=lambda row: row.rest)
    # best[end] is the least cost of the first `end` rows, and cut[end] the start of their last group.
    best, cut = [0] + [0] * len(ordered), [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        longest = ordered[end - 1].rest  # they are sorted, so a group's last row is its longest
        most_known = 0  # most positions of known state in the group: sorting says nothing of them
        best[end] = -1
        for start in range(end - 1, -1, -1):
            most_known = max(most_known, ordered[start].state.length)
            size = end - start
            too_wide = most_columns is not None and most_known + longest > most_columns
            if size > 1 and (too_wide or (most_rows is not None and size > most_rows)):
                break  # more rows only make it wider
            cost = best[start] + pass_cost + size * longest
            if best[end] < 0 or cost < best[end]:
                best[end], cut[end] = cost, start
    # Walk back from the end: each cut gives the end of the group before it.
    groups: list[list[PrefillRow]] = []
    end = len(ordered)
    while end:
        groups.append(ordered[cut[end] : end])
        end = cut[end]
    return groups[::-1]


@torch.inference_mode()
def read_on(lm: FrozenLM, row: PrefillRow, positions: int) -> PrefillRow:
    """The same row with the next `positions` of its rest read: a long text in parts, so that others need not wait for
    all of it. At least the last position stays to be read, since its hidden state is wanted."""
    positions = min(positions, row.rest - 1)
    if positions < 1:
        return row
    marks = row.marks[: row.known + positions]
    done = prefill(lm, [replace(row, marks=marks)])
    return replace(row, state=row_state(done.cache, 0, *done.span(0), marks[row.shared.length :]))


def prefill(lm: FrozenLM, rows: Sequence[PrefillRow]) -> Prefilled:
    """Computes the rest of every row in one pass: [left pad][known state][rest][right pad]."""
    # Known state is right-aligned, so that the rests of all rows begin in the same column of the cache.
    cache, columns = batch_cache([row.state for row in rows])
    device = lm.device
    longest = max(row.rest for row in rows)
    embeddings_BTD = _embedded(lm, rows, longest)
    own_B1 = torch.tensor([[row.state.length] for row in rows], device=device)
    known_B1 = torch.tensor([[row.known] for row in rows], device=device)
    rest_B1 = torch.tensor([[row.rest] for row in rows], device=device)
    # Real columns of a row are its own known state and its rest; everything outside of them is masked.
    column_S = torch.arange(columns + longest, device=device)
    mask_BS = ((column_S >= columns - own_B1) & (column_S < columns + rest_B1)).long()
    # Positions count from each row's own start, not from the left padding. Padding on the right repeats the last real
    # position, so that no table of positions is read past its end.
    positions_BT = known_B1 + torch.minimum(torch.arange(longest, device=device)[None], rest_B1 - 1)
    placed = Placed(embeddings_BTD, mask_BS, positions_BT, cache)
    hidden_BTD = hidden_in_parts(lm, placed, prefix_groups([row.shared for row in rows], device))
    return Prefilled(cache, columns, hidden_BTD, tuple(rows))


def prefill_groups(lm: FrozenLM, groups: Sequence[Sequence[PrefillRow]]) -> list[Prefilled]:
    """Like `prefill` of each group, in one pass without padding where the base can be read so (base/ragged.py)."""
    if len(groups) < 2 or not can_read_ragged(lm):
        return [prefill(lm, group) for group in groups]
    results: list[Prefilled] = []
    for together in _passes(groups):
        results += _prefill_ragged(lm, together)
    return results


def _passes(groups: Sequence[Sequence[PrefillRow]]) -> list[list[Sequence[PrefillRow]]]:
    """Groups of at most PASS_POSITIONS positions together, since each layer's states of all of them are held at once."""
    passes: list[list[Sequence[PrefillRow]]] = [[]]
    taken = 0
    for group in groups:
        size = sum(row.rest for row in group)
        if passes[-1] and taken + size > PASS_POSITIONS:
            passes.append([])
            taken = 0
        passes[-1].append(group)
        taken += size
    return passes


def _prefill_ragged(lm: FrozenLM, groups: Sequence[Sequence[PrefillRow]]) -> list[Prefilled]:
    rows = [row for group in groups for row in group]
    embeddings_1ND = torch.cat([_embedded(lm, [row], row.rest) for row in rows], 1)
    positions_N = torch.cat([torch.arange(row.known, len(row.marks), device=lm.device) for row in rows])
    ragged: list[RaggedGroup] = []
    start = 0
    for group in groups:
        ragged.append(RaggedGroup.of([Known(row.shared, row.state, row.rest) for row in group], start, lm))
        start += sum(row.rest for row in group)
    hidden_ND = hidden_ragged(lm, embeddings_1ND, positions_N[None], ragged)[0]
    return [
        Prefilled(done.cache, done.columns, hidden_ND[done.positions_BT], tuple(group))
        for done, group in zip(ragged, groups, strict=True)
    ]


def _embedded(lm: FrozenLM, rows: Sequence[PrefillRow], longest: int) -> Tensor:
    """Embeddings [B, T, D] of what is still to be computed of each row, padded to the longest."""
    rests = [row.marks[row.known :] for row in rows]
    ids_BT = torch.tensor(
        [[max(mark, 0) for mark in rest] + [0] * (longest - len(rest)) for rest in rests], device=lm.device
    )
    embeddings_BTD = lm.embed(ids_BT)
    # Negative marks were embedded as token 0 to keep the shape; the prompt's own vectors replace them.
    for b, (row, rest) in enumerate(zip(rows, rests, strict=True)):
        soft = [(t, -1 - mark) for t, mark in enumerate(rest) if mark < 0]
        if soft:
            if row.vectors_PD is None:
                raise PromptError(
                    "The row has soft positions, but its prompt has no vectors. Use a soft prompt for it."
                )
            places, indices = zip(*soft, strict=True)
            embeddings_BTD[b, list(places)] = row.vectors_PD[list(indices)].to(embeddings_BTD.dtype)
    return embeddings_BTD
