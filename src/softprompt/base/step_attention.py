"""Attention of a decode step, one new position a row, over the whole buffers of a running cache.

Rows have their keys and values in buffers of somewhat more columns than they use. torch's kernel for masked attention takes 1.6 ms
a layer for 64 rows of 87 columns (bfloat16, 9 heads in 3 groups) on a CPU; two products over all of 128 columns, unused ones
masked, take 0.8. Products over the used columns alone would first copy them. Results equal those of the base's own attention
up to rounding. A base that can be stepped so always is, whatever the rows: a row's bits do not depend on the way its
company is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.attention_copy import OtherAttention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import new_cache
from softprompt.base.placement import Placed
from softprompt.base.shared_prefix import PrefixGroup, with_prefixes

STEPPED = frozenset({torch.bfloat16})  # in float32 torch's kernel is as fast

Buffers = Callable[[int], tuple[Tensor, Tensor]]  # of a layer: keys and values [B, H, C, K], contiguous


def hidden_of_step(
    lm: FrozenLM, placed: Placed, buffers: Buffers, real_BC: Tensor, groups: Sequence[PrefixGroup] = ()
) -> Tensor:
    """Last hidden states [B, 1, D] of a step, whose cache writes into `buffers`; `real_BC` marks each row's own columns.

    Columns that are not marked must hold finite numbers. Prefixes of `groups` are attended to where they lie."""
    bias_BC = torch.zeros(real_BC.shape, device=real_BC.device).masked_fill_(~real_BC, -torch.inf)
    step = _Step(buffers, bias_BC[:, None, None], groups)
    return _STEP.states(lm, Placed(placed.embeddings_BSD, None, placed.positions_BS, placed.past), step)


def can_step(lm: FrozenLM) -> bool:
    """Whether this base's steps can be taken so (`OtherAttention.works_on`). On a CPU in bfloat16 alone: in float32 torch's kernel
    is as fast."""
    return _STEP.works_on(lm)


@dataclass(frozen=True)
class _Step:
    """What every layer of a step is given."""

    buffers: Buffers
    bias_B11C: Tensor
    groups: Sequence[PrefixGroup]


def _attend(
    step: _Step,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    layer: int,
) -> Tensor:
    """One layer's attention over the buffers, into which the cache has written the new column by now. The mask of the used
    columns is not read: the bias covers all columns of the buffers."""
    keys, values = step.buffers(layer)
    rows, heads, new, width = query.shape
    # The heads that share keys become queries of one head: no copy of the keys for each of them.
    queries = query.reshape(rows, keys.shape[1], heads // keys.shape[1], width)
    result, weight = attend_step(queries, keys, values, step.bias_B11C, scaling, rated=bool(step.groups))
    if weight is not None:
        result = with_prefixes(queries, result, weight, scaling, step.groups, layer)
    return result.reshape(rows, new, heads, -1)


def attend_step(
    query: Tensor, keys: Tensor, values: Tensor, bias_B11C: Tensor, scaling: float, *, rated: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, Hkv, G, K] of the G heads of each group, one query each, over contiguous keys and values
    [B, Hkv, C, K], with a float32 bias; where `rated` also the log-sum-exp of the scores, float32 [B, Hkv, G]."""
    rows, kv_heads, group, width = query.shape
    columns = keys.shape[2]
    # Rows and heads become one batch of small products.
    products = torch.bmm(query.flatten(0, 1), keys.view(rows * kv_heads, columns, width).transpose(1, 2))
    scores = torch.add(bias_B11C, products.view(rows, kv_heads, group, columns), alpha=scaling)  # float32
    weights = scores.softmax(-1).to(values.dtype).view(rows * kv_heads, group, columns)
    result = torch.bmm(weights, values.view(rows * kv_heads, columns, -1))
    return result.view(rows, kv_heads, group, -1), scores.logsumexp(-1) if rated else None


def _probe(lm: FrozenLM) -> tuple[Tensor, Callable[[], Tensor]]:
    """A step of two rows, of which one has a masked column: by the base's own attention, and by this one."""
    ids_T = torch.arange(1, 10, device=lm.device) * 5 % lm.vocab_size
    ids_BT = torch.stack([ids_T, ids_T.flip(0)])
    known = ids_BT.shape[1] - 1
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    real_BT[1, 0] = False
    positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    caches = [new_cache(), new_cache()]
    for cache in caches:
        lm.hidden(lm.embed(ids_BT[:, :known]), real_BT[:, :known].long(), positions_BT[:, :known], past=cache)
    last = lm.embed(ids_BT[:, known:]), positions_BT[:, known:]
    own_BTD = lm.hidden(last[0], real_BT.long(), last[1], past=caches[0])
    layers: Any = caches[1].layers

    def buffers(layer: int) -> tuple[Tensor, Tensor]:
        return layers[layer].keys, layers[layer].values

    return own_BTD, lambda: hidden_of_step(lm, Placed(last[0], None, last[1], caches[1]), buffers, real_BT)


_STEP = OtherAttention(
    "softprompt_step",
    _attend,
    _probe,
    suits=lambda lm: torch.device(lm.device).type == "cpu" and lm.dtype in STEPPED,
)
