"""Attention in two parts: rows under one long prompt read its keys and values where they lie, once for all of them.

A row's own columns are in the running cache; those of its prompt are not copied there. Each layer attends to both apart and
joins the two results by their log-sum-exp, which gives what one attention over all columns gives, up to rounding (Milakov and
Gimelshein 2018; "cascade" attention elsewhere). Rows share a prefix where it is one and the same state in memory, so a
prompt of other content is never taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask

from softprompt.base.attention_copy import OtherAttention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, batch_cache, new_cache, row_state
from softprompt.base.packed_weights import packed_body
from softprompt.base.placement import Placed

# Below it, copying the prompt's columns into each row costs less than a second attention in every layer.
SHARED_FROM = 128
FUSED_ON = frozenset(
    {"cpu"}
)  # torch has a kernel there that also gives the log-sum-exp of any masked attention


@dataclass(frozen=True)
class PrefixGroup:
    """Rows of a batch that have one prefix in front of their own columns."""

    prefix: State
    rows_N: Tensor


def prefix_groups(prefixes: Sequence[State], device: torch.device | str) -> list[PrefixGroup]:
    """Rows by their prefix, in memory the same one; rows without a prefix are in no group."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, prefix in enumerate(prefixes):
        if prefix.length:
            # Cuts of one state to one length are views of the same memory.
            rows.setdefault((prefix.keys[0].data_ptr(), prefix.length), []).append(row)
    return [
        PrefixGroup(prefixes[members[0]], torch.tensor(members, device=device)) for members in rows.values()
    ]


def hidden_in_parts(lm: FrozenLM, placed: Placed, groups: Sequence[PrefixGroup]) -> Tensor:
    """Last hidden states [B, T, D] of rows whose prefixes are not in the cache of `placed`.

    Its mask covers the rows' own columns; its positions count the prefix too."""
    if not groups:
        return lm.states(placed, packed_body(lm, lm.body))
    return _IN_PARTS.states(lm, placed, groups)


def can_share(lm: FrozenLM) -> bool:
    """Whether this base's attention can be taken in two parts (`OtherAttention.works_on`); elsewhere prompts are copied into each
    row."""
    return _IN_PARTS.works_on(lm)


def _probe(lm: FrozenLM) -> tuple[Tensor, Callable[[], Tensor]]:
    """Two rows behind a prefix: what they give in one part, and what they give in two."""
    ids_T = torch.arange(1, 8, device=lm.device) * 5 % lm.vocab_size
    front, rest = 4, len(ids_T) - 4
    cache = new_cache()
    lm.hidden(lm.embed(ids_T[None, :front]), past=cache)
    prefix = row_state(cache, 0, 0, front, ids_T[:front].tolist())
    embeddings_BTD = lm.embed(torch.stack([ids_T[front:], ids_T[front:].flip(0)]))
    positions_BT = torch.arange(front, front + rest, device=lm.device).expand(2, rest)
    whole, _ = batch_cache([prefix, prefix])
    mask_BS = torch.ones(2, front + rest, dtype=torch.int64, device=lm.device)
    in_one_BTD = lm.hidden(embeddings_BTD, mask_BS, positions_BT, past=whole)
    placed = Placed(embeddings_BTD, mask_BS[:, front:], positions_BT, new_cache())
    groups = prefix_groups([prefix, prefix], lm.device)
    return in_one_BTD, lambda: hidden_in_parts(lm, placed, groups)


def _attend(
    groups: Sequence[PrefixGroup],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    layer: int,
) -> Tensor:
    """One layer's attention over the rows' own columns, then over each group's prefix."""
    mask = None if mask is None else mask[..., : key.shape[2]]
    return attend_in_parts(query, key, value, mask, scaling, groups, layer).transpose(1, 2).contiguous()


_IN_PARTS = OtherAttention("softprompt_two_parts", _attend, _probe, mask=eager_mask)


def attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    groups: Sequence[PrefixGroup],
    layer: int,
) -> Tensor:
    """Attention [B, H, Q, K] over the rows' own columns, which an additive mask leaves, and over their prefixes."""
    rows, heads, new, width = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    # The heads that share keys become queries of one head: no copy of the keys for each of them.
    packed = query.reshape(rows, kv_heads, group * new, width)
    result, weight = attend(
        packed, key, value, None if mask is None else mask.repeat(1, 1, group, 1), scaling
    )
    joined = with_prefixes(packed, result, weight, scaling, groups, layer)
    return joined.reshape(rows, heads, new, -1)


def with_prefixes(
    query: Tensor,
    result: Tensor,
    weight: Tensor,
    scaling: float,
    groups: Sequence[PrefixGroup],
    layer: int,
) -> Tensor:
    """Joins the attention of queries [B, Hkv, Q, K] over their rows' own columns, `result` and the log-sum-exp `weight` of its
    scores, with that over the rows' prefixes."""
    _, kv_heads, queries_each, width = query.shape
    for members in groups:
        keys, values = members.prefix.keys[layer], members.prefix.values[layer]
        count = len(members.rows_N)
        # All queries of all rows in one product: the prefix's keys and values are read once.
        queries = query[members.rows_N].transpose(0, 1).reshape(1, kv_heads, count * queries_each, width)
        over, over_weight = attend(queries, keys[None], values[None], None, scaling)
        over = over.reshape(kv_heads, count, queries_each, -1).transpose(0, 1)
        over_weight = over_weight.reshape(kv_heads, count, queries_each).transpose(0, 1)
        own, own_weight = result[members.rows_N], weight[members.rows_N]
        # Each part is a mean under its softmax; its log-sum-exp says how much of the whole softmax it is.
        share = torch.sigmoid(over_weight - own_weight)[..., None]
        joined = own.float() * (1 - share) + over.float() * share
        result = result.index_copy(0, members.rows_N, joined.to(result.dtype))
    return result


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, Q, K] and the log-sum-exp of its scores, float32 [B, H, Q]. Queries see all columns that an
    additive mask leaves."""
    if query.device.type in FUSED_ON:
        result, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scaling
        )
        return result, weight
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask.float()
    weight = scores.logsumexp(-1)
    return ((scores - weight[..., None]).exp() @ value.float()).to(query.dtype), weight


def with_shared_prefix(lm: FrozenLM, state: State) -> tuple[State, State]:
    """The part of a row's known state that it shares, and the part that is its own."""
    return (state, EMPTY) if state.length >= SHARED_FROM and can_share(lm) else (EMPTY, state)
