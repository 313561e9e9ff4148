"""Rows of unlike length read in one pass without padding: their positions lie in one list, and each row attends to itself.

A rectangle computes as many positions for every row as its longest row has, and a pass for each length reads the weights
again. Here the linear layers see one list of real positions [1, N, D]; only attention, a twentieth of the work, is done by
groups of rows of like length, each padded to its own longest. Results equal those of one row alone up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.base.attention_copy import OtherAttention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, batch_cache, new_cache, row_state
from softprompt.base.placement import Placed
from softprompt.base.shared_prefix import (
    PrefixGroup,
    attend_in_parts,
    prefix_groups,
)

# Rows up to this length hold their scores: 9 rows of 60 take 0.9 ms a layer so, and 2.6 in torch's kernel, in bfloat16 on a
# CPU with nine heads in three groups; 4 rows of 200 take longer.
SHORT = 128
MAX_ROUNDING = (
    32  # in units of the dtype's last place: two layers of Qwen3 differ by 18, a wrong attention by millions
)


@dataclass(frozen=True)
class Known:
    """What is known of a row: a prefix that it shares, its own state behind that, and the positions that it reads now."""

    prefix: State
    state: State
    rest: int


@dataclass
class RaggedGroup:
    """Rows of like length in a pass. After it `layers` holds keys and values of each layer, [B, H, C + T, K]: `columns`
    of known state, right-aligned, then the rest of each row."""

    columns: int
    positions_BT: Tensor  # places in the list; a row's last one is repeated to the group's length
    real_M: Tensor  # of the group's padded positions [B * T], those that are real
    mask_BQS: Tensor  # additive
    known: Any
    prefixes: list[PrefixGroup]
    holds_scores: bool
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Known], start: int, lm: FrozenLM) -> RaggedGroup:
        """The group of rows whose rests begin at `start` of the list, one after the other."""
        known, columns = batch_cache([row.state for row in rows])
        device, longest = lm.device, max(row.rest for row in rows)
        rest_B1 = torch.tensor([[row.rest] for row in rows], device=device)
        own_B1 = torch.tensor([[row.state.length] for row in rows], device=device)
        ends_B1 = start + rest_B1.cumsum(0)
        place_T = torch.arange(longest, device=device)
        positions_BT = ends_B1 - rest_B1 + torch.minimum(place_T[None], rest_B1 - 1)
        # A query sees its row's known columns and, of the new ones, those up to its own.
        column_S = torch.arange(columns + longest, device=device)
        is_own_BS = (column_S >= columns - own_B1) & (column_S < columns + rest_B1)
        is_before_TS = column_S[None] <= columns + place_T[:, None]
        visible_BTS = is_own_BS[:, None] & is_before_TS[None]
        mask_BTS = torch.zeros(visible_BTS.shape, dtype=lm.dtype, device=device)
        mask_BTS.masked_fill_(~visible_BTS, torch.finfo(lm.dtype).min)
        prefixes = prefix_groups([row.prefix for row in rows], device)
        real_M = (place_T[None] < rest_B1).flatten().nonzero()[:, 0]
        holds_scores = not prefixes and longest <= SHORT
        return cls(columns, positions_BT, real_M, mask_BTS[:, None], known, prefixes, holds_scores)

    @property
    def cache(self) -> DynamicCache:
        """The keys and values as a transformers cache."""
        return DynamicCache(self.layers)

    def attend(self, query_1HNK: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """Attention of the group's real positions, [M, H, K] in the order of the list."""
        query_BHTK, key_BHSK, value_BHSK = (self._rows(each) for each in (query_1HNK, key, value))
        if self.columns:
            before = self.known.layers[layer]
            key_BHSK = torch.cat([before.keys, key_BHSK], 2)
            value_BHSK = torch.cat([before.values, value_BHSK], 2)
        self.layers.append((key_BHSK, value_BHSK))
        if self.holds_scores:
            result_BHTK = attend_short(query_BHTK, key_BHSK, value_BHSK, self.mask_BQS, scaling)
        else:
            result_BHTK = attend_in_parts(
                query_BHTK, key_BHSK, value_BHSK, self.mask_BQS, scaling, self.prefixes, layer
            )
        return result_BHTK.transpose(1, 2).flatten(0, 1).index_select(0, self.real_M)

    def _rows(self, list_1HNK: Tensor) -> Tensor:
        """The group's positions of the list as rows [B, H, T, K]."""
        # Whole positions are copied, which lie together in memory as the linear layers wrote them.
        taken_HK = list_1HNK[0].transpose(0, 1).index_select(0, self.positions_BT.flatten())
        return taken_HK.view(*self.positions_BT.shape, *taken_HK.shape[1:]).transpose(1, 2)


def attend_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention [B, H, T, K] whose scores are held whole: two products and a softmax in float32."""
    rows, heads, new, width = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # The heads that share keys become queries of one head: no copy of the keys for each of them.
    packed = query.reshape(rows, kv_heads, group * new, width)
    scores = (packed @ key.transpose(2, 3)).view(rows, kv_heads, group, new, columns)
    weights = (scores.float() * scaling + mask[:, :, None].float()).softmax(-1).to(query.dtype)
    result: Tensor = weights.view(rows, kv_heads, group * new, columns) @ value
    return result.view(rows, heads, new, -1)


def hidden_ragged(
    lm: FrozenLM, embeddings_1ND: Tensor, positions_1N: Tensor, groups: Sequence[RaggedGroup]
) -> Tensor:
    """Last hidden states [1, N, D] of the rows of all groups, whose rests lie one after the other in the list."""
    return _RAGGED.states(lm, Placed(embeddings_1ND, None, positions_1N), groups)


def can_read_ragged(lm: FrozenLM) -> bool:
    """Whether this base's rows can be read so (`OtherAttention.works_on`). Not on an accelerator, where padding costs little."""
    return _RAGGED.works_on(lm)


def _attend(
    groups: Sequence[RaggedGroup],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    layer: int,
) -> Tensor:
    """One layer's attention, group by group; the mask of the whole list is not read, since each group has its own."""
    return torch.cat([group.attend(query, key, value, scaling, layer) for group in groups])[None]


def _probe(lm: FrozenLM) -> tuple[Tensor, Callable[[], Tensor]]:
    """Two rows, of which one goes on from a known state: what each gives alone, and what both give in one list."""
    ids_T = torch.arange(1, 10, device=lm.device) * 5 % lm.vocab_size
    front = 4
    cache = new_cache()
    lm.hidden(lm.embed(ids_T[None, :front]), past=cache)
    state = row_state(cache, 0, 0, front, ids_T[:front].tolist())
    other_T = ids_T.flip(0)[:3]
    alone_ND = torch.cat([lm.hidden(lm.embed(ids[None]))[0] for ids in (ids_T, other_T)])[front:]
    rest = len(ids_T) - front
    rows = [Known(EMPTY, state, rest), Known(EMPTY, EMPTY, len(other_T))]
    groups = [RaggedGroup.of(rows[:1], 0, lm), RaggedGroup.of(rows[1:], rest, lm)]
    groups[1].holds_scores = False  # so that both ways to attend are tried
    positions_N = torch.cat([torch.arange(front, len(ids_T)), torch.arange(len(other_T))])
    embeddings_1ND = lm.embed(torch.cat([ids_T[front:], other_T]))[None]
    return alone_ND, lambda: hidden_ragged(lm, embeddings_1ND, positions_N[None], groups)[0]


_RAGGED = OtherAttention(
    "softprompt_ragged",
    _attend,
    _probe,
    suits=lambda lm: torch.device(lm.device).type == "cpu",
    rounding=MAX_ROUNDING,
)
