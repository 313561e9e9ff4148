"""Text before the first soft token, read once: no prompt can change its keys and values, nor needs a gradient there.

The states are kept for as many contexts as the budget holds and reused in every epoch. What does not fit is read again each
time, still without the backward pass. Results equal those of reading everything, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, batch_cache, new_cache, row_state
from softprompt.base.placement import Placed, padding_mask
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded

Context = tuple[int, ...]
GIGABYTE = 10**9
SHORTEST = 8  # tokens; reading fewer again costs less than placing their state beside the row


class ContextCache:
    """The states of contexts over one base, by their token ids, in at most `budget_bytes`; `read` computes new ones."""

    def __init__(self, lm: FrozenLM, read: Callable[[Placed], Tensor], budget_bytes: int = GIGABYTE) -> None:
        self.lm, self.read_placed = lm, read
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self.read = 0
        self._states: dict[Context, State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Frees everything that is kept."""
        self._states, self.bytes = {}, 0

    def split(self, batch: Batch) -> tuple[Batch, Placed] | None:
        """Returns the batch from each row's first soft position on, with its mask, positions and the contexts as a cache.

        None if there is nothing to gain: a row starts with its soft slot, or a token of a context is trained."""
        if not self.budget_bytes:
            return None
        # Everything before the first soft position depends on frozen weights alone, so its keys and values are constants.
        starts = (batch.soft_BS >= 0).int().argmax(1).tolist()
        if min(starts) < SHORTEST:
            return None
        # A trained token needs the hidden state that predicts it, and the cache keeps none.
        if any(
            bool(trained_S[:start].any()) for trained_S, start in zip(batch.trained_BS, starts, strict=True)
        ):
            return None
        contexts = [tuple(ids_S[:start].tolist()) for ids_S, start in zip(batch.ids_BS, starts, strict=True)]
        cache, columns = batch_cache(self._read(contexts))
        rest = _from(batch, starts)
        starts_B1 = torch.tensor(starts, device=batch.ids_BS.device)[:, None]
        offset_R = torch.arange(rest.ids_BS.shape[1], device=batch.ids_BS.device)
        # Padding repeats the last real position, so that no table of positions is ever read past its end.
        positions_BR = starts_B1 + torch.minimum(offset_R[None], rest.lengths_B[:, None] - 1)
        mask_BR = padding_mask(rest)
        # Contexts are right-aligned in the cache: columns to the left of a shorter one are empty and are masked.
        if mask_BR is not None or min(starts) < columns:
            column_C = torch.arange(columns, device=batch.ids_BS.device)
            real_BR = torch.ones_like(rest.ids_BS) if mask_BR is None else mask_BR
            mask_BR = torch.cat([(column_C >= columns - starts_B1).long(), real_BR], 1)
        return rest, Placed(torch.empty(0), mask_BR, positions_BR, cache)

    def _read(self, contexts: Sequence[Context]) -> list[State]:
        """Returns the state of each context: a kept one, or read by the base and then kept if the budget allows."""
        states = {context: self._states[context] for context in contexts if context in self._states}
        missing = sorted(set(contexts) - set(states), key=lambda context: (len(context), context))
        if missing:
            self.read += len(missing)
            # Not as inference tensors, even when a loss without gradient asks first: learning uses them later.
            with torch.inference_mode(False), torch.no_grad():
                states |= {context: self._compute(context) for context in missing}
        for context in missing:
            if self.bytes + states[context].bytes <= self.budget_bytes:
                self._states[context] = states[context]
                self.bytes += states[context].bytes
        return [states[context] for context in contexts]

    def _compute(self, context: Context) -> State:
        """Reads a context, by itself: in company its last bits would depend on which others happened to be missing.

        A resumed run starts with an empty cache, and must read the same states as the run that it continues."""
        row = Encoded(list(context), [-1] * len(context), [False] * len(context), -1, 0)
        cache = new_cache()
        self.read_placed(Placed(self.lm.embed(collate([row]).to(self.lm.device).ids_BS), None, None, cache))
        return row_state(cache, 0, 0, len(context), context)


def contexts_of(rows: Iterable[Encoded]) -> set[Context]:
    """Collects what can be read once: the distinct texts before a first soft token that hold no trained token."""
    contexts = set()
    for row in rows:
        start = next((at for at, soft in enumerate(row.soft) if soft >= 0), 0)
        if start >= SHORTEST and not any(row.trained[:start]):
            contexts.add(tuple(row.ids[:start]))
    return contexts


def context_bytes(lm: FrozenLM, contexts: set[Context]) -> int:
    """Counts the bytes of the keys and values of all these contexts."""
    shape = lm.fingerprint
    values = 2 * shape.layers * shape.kv_heads * shape.head_width
    return sum(map(len, contexts)) * values * lm.dtype.itemsize


def _from(batch: Batch, starts: Sequence[int]) -> Batch:
    """The rows without their first `starts` positions."""
    lengths_B = batch.lengths_B - torch.tensor(starts, device=batch.lengths_B.device)
    longest = int(lengths_B.max())
    start_B1 = torch.tensor(starts, device=batch.ids_BS.device)[:, None]
    source_BR = start_B1 + torch.arange(longest, device=batch.ids_BS.device)[None]
    real_BR = source_BR < batch.lengths_B[:, None]
    source_BR = source_BR.clamp(max=batch.ids_BS.shape[1] - 1)
    return replace(
        batch,
        ids_BS=batch.ids_BS.gather(1, source_BR),
        soft_BS=batch.soft_BS.gather(1, source_BR).where(real_BR, -1),
        trained_BS=batch.trained_BS.gather(1, source_BR) & real_BR,
        lengths_B=lengths_B,
    )
