"""Compaction: the keys and values of a long context, cut down to a few positions without a gradient step.

Attention matching (arXiv 2602.16284): for every layer and key/value head, the P keys that matter most to sampled queries
stay, and their values are solved for, by ridge least squares, so that attention over the short prefix gives what
attention over all of the context gave. The paper's extra bias on a key's score is not part of a key/value state and is
left out. On rotary bases the kept keys are turned, so that text behind the short prefix sees them at the distances of the
whole context; with learned positions or ALiBi that is not possible, and the least squares make up for what they can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, batch_cache
from softprompt.base.placement import Placed
from softprompt.base.queries import RecordedQueries
from softprompt.base.rotary import rotary_of, turned_state
from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import Plain

RIDGE = 1e-3  # of the mean square weight that a kept key gets; the pull is towards the key's own value
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Compacted:
    """The short prefix, keys and values [L, P, H, K], and which positions of the context its keys come from, [L, H, P].

    `turned` says whether the keys were turned to the short prefix's distances (rotary bases)."""

    plain: Plain
    places_LHP: Tensor
    turned: bool


@torch.no_grad()
def compact(
    lm: FrozenLM, context: State, rows: Sequence[Sequence[int]], length: int, *, ridge: float = RIDGE
) -> Compacted:
    """Cuts `context` down to `length` positions, for texts like `rows` (token ids that follow the context).

    The context's first position is always kept: much attention rests on it (Xiao et al. 2023, attention sinks). Raises
    PromptError where the context has no more positions than that, or if there is no row."""
    if not 1 < length < context.length:
        raise PromptError(
            f"The context has {context.length} positions; it can be cut down to 2 to {context.length - 1}, found {length}. "
            "Set fewer virtual tokens, or keep the context as text."
        )
    if not rows:
        raise PromptError(
            "There is no text that follows the context, so it is unknown which keys matter. Give some."
        )
    readings = [reading for row in _groups(rows) for reading in _read(lm, context, row)]
    rotary = rotary_of(lm)
    keys, values, places = [], [], []
    for layer in range(lm.num_layers):
        found = [reading[layer] for reading in readings]
        keys_HTK, values_HTK = context.keys[layer].float(), context.values[layer].float()
        places_HP = _places(found, keys_HTK, length)
        kept_HPK = _taken(keys_HTK, places_HP)
        values.append(_solved(found, keys_HTK, values_HTK, places_HP, ridge))
        keys.append(kept_HPK)
        places.append(places_HP)
    short = State(tuple(keys), tuple(values), context.marks[:length])
    if rotary is not None:
        short = turned_state(rotary, short, length - context.length)
    plain = tuple(
        torch.stack([layer.transpose(0, 1) for layer in layers]).float().cpu()
        for layers in (short.keys, short.values)
    )
    return Compacted(plain, torch.stack(places).cpu(), rotary is not None)


def moved(lm: FrozenLM, plain: Plain, positions: int) -> Plain:
    """Keys and values [L, P, H, K] so many positions further on, where the base rotates its keys; else as they are."""
    rotary = rotary_of(lm)
    keys_LPHK, values_LPHK = plain
    if rotary is None or positions == 0:
        return plain
    return rotary.turned(keys_LPHK, positions), values_LPHK


@dataclass(frozen=True)
class _Reading:
    """One layer's view of one text behind the context: its queries [H, G, S, K] in groups of heads that share a
    key/value head, and the text's own keys and values [H, S, K]."""

    query_HGSK: Tensor
    keys_HSK: Tensor
    values_HSK: Tensor
    scaling: float
    slopes_HG: Tensor | None = None

    def weights(self, keys_HPK: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to the keys at positions 0 to P - 1 and to the text's own, which follow: [H, G, S, P] and
        [H, G, S, S], together 1."""
        length = keys_HPK.shape[1]
        own_scores = self._scores(self.keys_HSK, length)
        later_SS = torch.ones(own_scores.shape[-2:], dtype=torch.bool, device=own_scores.device).triu(1)
        scores = torch.cat([self._scores(keys_HPK, 0), own_scores.masked_fill(later_SS, -math.inf)], -1)
        both = scores.softmax(-1)
        return both[..., :length], both[..., length:]

    def _scores(self, keys_HPK: Tensor, first: int) -> Tensor:
        """Scores of keys at the positions from `first` on, [H, G, S, P]."""
        scores = torch.einsum("hgsk,hpk->hgsp", self.query_HGSK, keys_HPK) * self.scaling
        if self.slopes_HG is not None:
            positions_P = first + torch.arange(keys_HPK.shape[1], device=keys_HPK.device)
            scores = scores + self.slopes_HG[..., None, None] * positions_P
        return scores


def _places(readings: Sequence[_Reading], keys_HTK: Tensor, length: int) -> Tensor:
    """The context's positions to keep in every head, [H, P], ascending: the first, and those of most attention.

    Attention is measured by its root mean square over all queries: a key that matters much to few texts counts."""
    squares_HT = keys_HTK.new_zeros(keys_HTK.shape[:2])
    for reading in readings:
        weights, _ = reading.weights(keys_HTK)
        squares_HT += weights.square().sum((1, 2))
    squares_HT[:, 0] = math.inf
    return squares_HT.topk(length, dim=1).indices.sort(1).values


def _solved(
    readings: Sequence[_Reading], keys_HTK: Tensor, values_HTK: Tensor, places_HP: Tensor, ridge: float
) -> Tensor:
    """Values of the kept keys [H, P, K] with which attention over them gives what attention over all keys gave."""
    kept_HPK, own_HPK = _taken(keys_HTK, places_HP), _taken(values_HTK, places_HP)
    length = places_HP.shape[1]
    gram_HPP = keys_HTK.new_zeros(len(keys_HTK), length, length, dtype=torch.float64)
    right_HPK = keys_HTK.new_zeros(len(keys_HTK), length, values_HTK.shape[-1], dtype=torch.float64)
    for reading in readings:
        whole, whole_own = reading.weights(keys_HTK)
        short, short_own = reading.weights(kept_HPK)
        # What the kept keys have to add: the output over everything, less the text's own part, which now weighs more.
        missing = torch.einsum("hgst,htk->hgsk", whole, values_HTK)
        missing += torch.einsum("hgst,htk->hgsk", whole_own - short_own, reading.values_HSK)
        short, missing = short.flatten(1, 2).double(), missing.flatten(1, 2).double()
        gram_HPP += short.transpose(1, 2) @ short
        right_HPK += short.transpose(1, 2) @ missing
    # Ridge towards the keys' own values, so that a key which no query looks at keeps its value.
    strength_H = ridge * gram_HPP.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram_HPP += strength_H[:, None, None] * torch.eye(length, dtype=torch.float64, device=gram_HPP.device)
    right_HPK += strength_H[:, None, None] * own_HPK.double()
    solved_HPK: Tensor = torch.linalg.solve(gram_HPP, right_HPK)
    return solved_HPK.float()


def _taken(tensor_HTK: Tensor, places_HP: Tensor) -> Tensor:
    return tensor_HTK.gather(1, places_HP[..., None].expand(-1, -1, tensor_HTK.shape[-1]))


def _groups(rows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    ordered = sorted(rows, key=len)
    return [ordered[first : first + ROWS_AT_ONCE] for first in range(0, len(ordered), ROWS_AT_ONCE)]


def _read(lm: FrozenLM, context: State, rows: Sequence[Sequence[int]]) -> list[list[_Reading]]:
    """Reads texts behind the context; for each of them what every layer saw."""
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=lm.device)
    cache, columns = batch_cache([context] * len(rows))
    positions_BS = columns + torch.arange(longest, device=lm.device).expand(len(rows), -1)
    lengths_B1 = torch.tensor([[columns + len(row)] for row in rows], device=lm.device)
    mask_BC = (torch.arange(columns + longest, device=lm.device) < lengths_B1).long()
    with RecordedQueries(lm) as queries:
        lm.states(Placed(lm.embed(ids_BS), mask_BC, positions_BS, cache), queries.body)
    layers: list[Any] = list(cache.layers)
    readings: list[list[_Reading]] = []
    for b, row in enumerate(rows):
        mine = []
        for asked, layer in zip(queries.seen, layers, strict=True):
            heads = layer.keys.shape[1]
            query_HGSK = torch.unflatten(asked.query_BHSK[b, :, : len(row)].float(), 0, (heads, -1))
            slopes_HG = None if asked.slopes_H is None else asked.slopes_H.view(heads, -1)
            keys, values = (
                tensor[b, :, columns : columns + len(row)].float() for tensor in (layer.keys, layer.values)
            )
            mine.append(_Reading(query_HGSK, keys, values, asked.scaling, slopes_HG))
        readings.append(mine)
    return readings
