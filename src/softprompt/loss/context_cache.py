"""Text before the first soft token, read once: no prompt can change its keys and values, nor needs a gradient there.

The states are kept for as many contexts as the budget holds and reused in every epoch. What does not fit is read again each
time, still without the backward pass. Results equal those of reading everything, up to rounding.

A short context read by itself takes up to three times as long as in company, since all weights pass by for a few
rows. But its last bits depend on the company, and a run that is killed and resumed, with nothing kept, must meet the same
bits again. So a run says once which contexts are read together (`read_together`); else each is read by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, batch_cache, new_cache, row_state
from softprompt.base.placement import Placed, padding_mask
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded

Context = tuple[int, ...]
Company = tuple[Context, ...]
"""Contexts that are read in one pass, always all of them."""
GIGABYTE = 10**9
COMPANY_POSITIONS = 512  # of a pass, padding too: more gain no speed, and only take memory
SHORTEST = 8  # tokens; reading fewer again costs less than placing their state beside the row


class ContextCache:
    """The states of contexts over one base, by their token ids, in at most `budget_bytes`; `read` computes new ones."""

    def __init__(self, lm: FrozenLM, read: Callable[[Placed], Tensor], budget_bytes: int = GIGABYTE) -> None:
        self.lm, self.read_placed = lm, read
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self.read = 0
        self._states: dict[Company, list[State]] = {}
        # The pass of each context that is to be kept; None where each is read by itself.
        self._company_of: dict[Context, Company] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._states))

    def clear(self) -> None:
        """Frees everything that is kept."""
        self._states, self.bytes = {}, 0

    def read_alone(self) -> None:
        """From now on reads each context by itself."""
        self._company_of = None
        self._forget([company for company in self._states if len(company) > 1])

    def read_together(self, groups: Iterable[Iterable[Context]]) -> None:
        """From now on reads contexts of a group together, and keeps those of the first groups, as many as the budget holds.

        All others are read together with those of their batch, and not kept. So the bits of a context depend on `groups` and
        its batch alone, not on what was read before."""
        company_of: dict[Context, Company] = {}
        needed = 0
        passes = (company for group in groups for company in companies(set(group) - company_of.keys()))
        for company in passes:
            size = context_bytes(self.lm, company)
            if needed + size > self.budget_bytes:
                break
            needed += size
            company_of |= dict.fromkeys(company, company)
        self._company_of = company_of
        wanted = set(company_of.values())
        former = [company for company in self._states if company not in wanted]
        if sum(self._bytes(company) for company in former) + needed > self.budget_bytes:
            self._forget(former)

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
        """Returns the state of each context: a kept one, or read by the base and then kept if it is to be."""
        found: dict[Context, State] = {}
        for company, is_kept in self._companies(set(contexts)):
            states = self._states.get(company)
            if states is None:
                self.read += len(company)
                states = self._compute(company)
                size = sum(state.bytes for state in states)
                if is_kept and self.bytes + size <= self.budget_bytes:
                    self._states[company] = states
                    self.bytes += size
            found |= dict(zip(company, states, strict=True))
        return [found[context] for context in contexts]

    def _companies(self, contexts: set[Context]) -> list[tuple[Company, bool]]:
        """The passes that give these contexts, and whether what they give is kept."""
        if self._company_of is None:
            return [((context,), True) for context in _in_order(contexts)]
        kept = {self._company_of[context] for context in contexts if context in self._company_of}
        passing = companies(contexts - self._company_of.keys())
        return [*((company, True) for company in sorted(kept)), *((company, False) for company in passing)]

    def _compute(self, company: Company) -> list[State]:
        """Reads contexts in one pass."""
        rows = [Encoded(list(ids), [-1] * len(ids), [False] * len(ids), -1, 0) for ids in company]
        # Not as inference tensors, even when a loss without gradient asks first: learning uses them later.
        with torch.inference_mode(False), torch.no_grad():
            batch = collate(rows).to(self.lm.device)
            cache = new_cache()
            self.read_placed(Placed(self.lm.embed(batch.ids_BS), padding_mask(batch), None, cache))
            return [row_state(cache, row, 0, len(ids), ids) for row, ids in enumerate(company)]

    def _forget(self, former: Iterable[Company]) -> None:
        for company in former:
            self.bytes -= self._bytes(company)
            del self._states[company]

    def _bytes(self, company: Company) -> int:
        return sum(state.bytes for state in self._states[company])


def companies(contexts: Iterable[Context]) -> list[Company]:
    """Parts these contexts into passes of at most `COMPANY_POSITIONS` positions, those of like length together."""
    found: list[Company] = []
    for context in _in_order(contexts):
        if found and len(context) * (len(found[-1]) + 1) <= COMPANY_POSITIONS:
            found[-1] = (*found[-1], context)
        else:
            found.append((context,))
    return found


def _in_order(contexts: Iterable[Context]) -> list[Context]:
    return sorted(contexts, key=lambda context: (len(context), context))


def contexts_of(rows: Iterable[Encoded]) -> set[Context]:
    """Collects what can be read once: the distinct texts before a first soft token that hold no trained token."""
    contexts = set()
    for row in rows:
        start = next((at for at, soft in enumerate(row.soft) if soft >= 0), 0)
        if start >= SHORTEST and not any(row.trained[:start]):
            contexts.add(tuple(row.ids[:start]))
    return contexts


@runtime_checkable
class KeepsContexts(Protocol):
    """A loss that reads contexts through such a cache."""

    context_cache: ContextCache


def context_bytes(lm: FrozenLM, contexts: Iterable[Context]) -> int:
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
