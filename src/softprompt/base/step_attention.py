"""Attention of a decode step, one new position a row, over the whole buffers of a running cache.

Rows have their keys and values in buffers of somewhat more columns than they use. torch's kernel for masked attention takes 1.6 ms
a layer for 64 rows of 87 columns (bfloat16, 9 heads in 3 groups) on a CPU; two products over all of 128 columns, unused ones
masked, take 0.8. Products over the used columns alone would first copy them. Results equal those of the base's own attention
up to rounding. A base that can be stepped so always is, whatever the rows: a row's bits do not depend on the way its
company is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt.base.attention_copy import body_with_attention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import new_cache
from softprompt.base.packed_weights import packed_body
from softprompt.base.placement import Placed
from softprompt.base.shared_prefix import PrefixGroup, demand_plain, sees_everything, with_prefixes

STEPPED = frozenset({torch.bfloat16})  # in float32 torch's kernel is as fast
_NAME = "softprompt_step"

Buffers = Callable[[int], tuple[Tensor, Tensor]]  # of a layer: keys and values [B, H, C, K], contiguous


def hidden_of_step(
    lm: FrozenLM, placed: Placed, buffers: Buffers, real_BC: Tensor, groups: Sequence[PrefixGroup] = ()
) -> Tensor:
    """Last hidden states [B, 1, D] of a step, whose cache writes into `buffers`; `real_BC` marks each row's own columns.

    Columns that are not marked must hold finite numbers. Prefixes of `groups` are attended to where they lie."""
    body = _BODIES[lm]
    assert body is not None, "the base was not asked whether it can step so"
    bias_BC = torch.zeros(real_BC.shape, device=real_BC.device).masked_fill_(~real_BC, -torch.inf)
    _own.buffers, _own.bias_B11C, _own.groups = buffers, bias_BC[:, None, None], groups
    try:
        return lm.states(
            Placed(placed.embeddings_BSD, None, placed.positions_BS, placed.past), packed_body(lm, body)
        )
    finally:
        del _own.buffers, _own.bias_B11C, _own.groups


def can_step(lm: FrozenLM) -> bool:
    """Whether this base's steps can be taken so: tried once, on a few tokens, against its own attention.

    On a CPU in bfloat16 alone: in float32 torch's kernel is as fast. Not where a layer looks at some columns only, adds a bias
    by distance (ALiBi), or has an attention of its own."""
    if lm not in _BODIES:
        _BODIES[lm] = None
        is_slow = torch.device(lm.device).type == "cpu" and lm.dtype in STEPPED
        if is_slow and lm.is_whole and sees_everything(lm.config):
            AttentionInterface.register(_NAME, _attention)
            AttentionMaskInterface.register(_NAME, _no_mask)
            _BODIES[lm] = body_with_attention(lm, _NAME)
            if not _is_exact(lm):
                _BODIES[lm] = None
    return _BODIES[lm] is not None


_BODIES: WeakKeyDictionary[FrozenLM, Any] = WeakKeyDictionary()
_own = threading.local()


def _no_mask(*sizes: Any, **options: Any) -> None:
    """The mask of the used columns, which nothing reads: the bias covers all columns of the buffers."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it; the cache has written the new column by now."""
    demand_plain(options)
    _own.calls = getattr(_own, "calls", 0) + 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = _own.buffers(module.layer_idx)
    rows, heads, new, width = query.shape
    # The heads that share keys become queries of one head: no copy of the keys for each of them.
    queries = query.reshape(rows, keys.shape[1], heads // keys.shape[1], width)
    result, weight = attend_step(queries, keys, values, _own.bias_B11C, scaling, rated=bool(_own.groups))
    if weight is not None:
        result = with_prefixes(queries, result, weight, scaling, _own.groups, module.layer_idx)
    return result.reshape(rows, new, heads, -1), None


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


@torch.inference_mode()
def _is_exact(lm: FrozenLM) -> bool:
    """Whether a step of two rows, of which one has a masked column, gives what the base's own attention gives."""
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
    own_BTD = lm.hidden(last[0], real_BT.long(), last[1], past=caches[0]).float()
    layers: Any = caches[1].layers

    def buffers(layer: int) -> tuple[Tensor, Tensor]:
        return layers[layer].keys, layers[layer].values

    _own.calls = 0
    try:
        step_BTD = hidden_of_step(lm, Placed(last[0], None, last[1], caches[1]), buffers, real_BT).float()
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False  # an attention that takes or gives something else
    scale = max(1.0, float(own_BTD.abs().max()))
    difference = float((step_BTD - own_BTD).abs().max())
    return bool(_own.calls == lm.num_layers and difference <= 16 * torch.finfo(lm.dtype).eps * scale)
