"""Rotary attention with grouped heads over packed rows, on a CPU, forward and backward written by hand.

Rows are short, so batched products over whole score matrices beat torch's fused attention several times, most of all in
the backward pass. Rotation, scores and softmax are computed in float32, the other products in the dtype of the base's
products. The probabilities are computed again in the backward pass: kept, those of all layers would pile up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base.hardware import product_dtype
from softprompt.loss.kernels.rms_norm import Norm, norm_backward, norm_forward
from softprompt.loss.kernels.workspace import row_chunks, scratch

SCORES_AT_ONCE = 2**23  # float32 scores of one chunk: 32 MB
QUERIES_AT_ONCE = 64  # shorter stretches leave out more columns that they cannot see, but cost more calls
COLUMNS_ALIGNED = 16  # a softmax over whole vectors of the CPU is a quarter faster


@dataclass(frozen=True)
class Padded:
    """Packed positions from `first` on, laid out as B rows of R.

    `at_BR` holds the packed positions, a row's last one again where it is shorter; `real_M` the places of the real ones
    among the B * R, in packed order."""

    at_BR: Tensor
    real_M: Tensor
    first: int = 0

    @property
    def packed(self) -> slice:
        """The packed positions that are laid out."""
        return slice(self.first, self.first + len(self.real_M))

    def laid_out(self, packed_NE: Tensor) -> Tensor:
        """Packed rows [N, E] as [B, R, E]."""
        return packed_NE.index_select(0, self.at_BR.view(-1)).view(*self.at_BR.shape, -1)

    def laid_out_with_zeros(self, packed_NE: Tensor) -> Tensor:
        """The same, with zeros where a row is shorter."""
        padded_RE = scratch("padded", self.at_BR.numel(), packed_NE.shape[1], dtype=packed_NE.dtype).zero_()
        padded_RE.index_copy_(0, self.real_M, packed_NE[self.packed])
        return padded_RE.view(*self.at_BR.shape, -1)


@dataclass(frozen=True)
class Attending:
    """The packed positions that attend to each other, for a block of B rows.

    `bias_BQT` ([B or 1, Q, T], 0 or -inf) decides; its T columns are those of the past (if there is one), the first
    `shared` packed positions, the row's own keys, and `behind` empty ones. A key that only fills up its row lies behind
    all real queries. Where `causal`, the queries are the row's own positions, none of which sees a later one."""

    queries: Padded
    keys: Padded
    bias_BQT: Tensor
    shared: int = 0
    behind: int = 0
    causal: bool = False


@dataclass(frozen=True)
class Positions:
    """The packed positions of a pass: rotary cosines and sines, float32 [N, K], and who attends to whom.

    `kept` are the packed positions that queries and results exist for, None for all."""

    cos_NK: Tensor
    sin_NK: Tensor
    blocks: tuple[Attending, ...]
    kept: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """Queries' heads, the fewer ones of keys and values, and what is done to each head before the scores."""

    queries: int
    keys: int
    scale: float
    query_norm: Norm | None = None  # as in Qwen3
    key_norm: Norm | None = None

    @property
    def group(self) -> int:
        """The number of query heads that share one head of keys."""
        return self.queries // self.keys


Saved = tuple[Tensor, ...]  # query, key and value of each block, then the projections whose heads are normed


def attention(
    query_ME: Tensor,
    key_NE: Tensor,
    value_NE: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    heads: Heads,
    positions: Positions,
) -> tuple[Tensor, Saved]:
    """The output of attention for each query, [M, Hq*K], and the tensors that the backward pass needs.

    `past_keys` and `past_values` are [B, Hkv, C, K], of the one block of rows."""
    context_ME = torch.empty_like(query_ME)
    rotated_ME = _rotated_heads(query_ME, heads.query_norm, heads.scale, positions, positions.kept)
    rotated_NE = _rotated_heads(key_NE, heads.key_norm, 1.0, positions, None)
    saved: list[Tensor] = []
    for block in positions.blocks:
        query = _by_head(block.queries.laid_out(rotated_ME), heads)
        key = _with_past(block, rotated_NE, past_keys, heads)
        value = _with_past(block, value_NE, past_values, heads)
        saved += [query, key, value]
        wide_query, wide_key = _wide("query", query), _wide("key", key)
        value = _for_products("value", value)
        context = scratch("context", *query.shape, dtype=value.dtype)
        for part in _parts(block, query, key, heads):
            wide = _probabilities(part, wide_query, wide_key, block, heads)
            probabilities = _for_products("probabilities", wide, value.dtype)
            context[part.batch, part.queries] = torch.bmm(probabilities, value[part.batch, part.columns])
        context_ME[block.queries.packed] = _packed(context, block.queries, heads.keys)
    if heads.query_norm is not None:
        saved.append(query_ME)
    if heads.key_norm is not None:
        saved.append(key_NE)
    return context_ME, tuple(saved)


def attention_backward(
    above_ME: Tensor,
    saved: Saved,
    past_keys: Tensor | None,
    heads: Heads,
    positions: Positions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients at the three projections and at the past's keys and values."""
    blocks = positions.blocks
    query_ME = saved[3 * len(blocks)] if heads.query_norm is not None else None
    key_NE = saved[-1] if heads.key_norm is not None else None
    on_query_ME = torch.empty_like(above_ME)
    count = len(positions.cos_NK)
    on_key_NE, on_value_NE = (
        scratch(use, count, above_ME.shape[1] // heads.group).zero_()
        for use in ("packed keys", "packed values")
    )
    on_past: list[Tensor | None] = [None, None]
    for index, block in enumerate(blocks):
        # Nothing comes from queries that only fill up their row.
        above = _by_head(block.queries.laid_out_with_zeros(above_ME), heads)
        on_query, on_key, on_value = _block_backward(above, saved[3 * index : 3 * index + 3], block, heads)
        on_query_ME[block.queries.packed] = _packed(on_query, block.queries, heads.keys)
        past = 0 if past_keys is None else past_keys.shape[2]
        before = past + block.shared
        own = slice(before, before + block.keys.at_BR.shape[1])
        for on, on_NE, which in ((on_key, on_key_NE, 0), (on_value, on_value_NE, 1)):
            on_NE[block.keys.packed] += _packed(on[:, own], block.keys, heads.keys)
            on_BHTK = on.view(-1, heads.keys, *on.shape[1:])
            if block.shared:  # every row read them: their gradients add up
                shared_HPK = on_BHTK[:, :, past:before].sum(0, dtype=torch.float32)
                on_NE[: block.shared] += shared_HPK.transpose(0, 1).flatten(1)
            if past_keys is not None:
                on_past[which] = on_BHTK[:, :, :past].to(past_keys.dtype, copy=True)
    on_query_ME = _rotated_backward(
        on_query_ME, query_ME, heads.query_norm, heads.scale, positions, positions.kept
    )
    on_key_NE = _rotated_backward(on_key_NE, key_NE, heads.key_norm, 1.0, positions, None)
    return on_query_ME, on_key_NE.to(above_ME.dtype), on_value_NE.to(above_ME.dtype), on_past[0], on_past[1]


def _block_backward(
    above: Tensor, saved: Sequence[Tensor], block: Attending, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at a block's queries, keys and values, by head, from that at its result; in scratch memory."""
    wide_query, wide_key = _wide("query", saved[0]), _wide("key", saved[1])
    query, key, value = (
        _for_products(use, tensor) for use, tensor in zip(("query", "key", "value"), saved, strict=True)
    )
    above = _for_products("above", above)
    on_query, on_key, on_value = (
        scratch(use, *tensor.shape, dtype=tensor.dtype)
        for use, tensor in (("on query", query), ("on key", key), ("on value", value))
    )
    for part in _parts(block, query, key, heads):
        wide = _probabilities(part, wide_query, wide_key, block, heads)
        probabilities = _for_products("probabilities", wide, value.dtype)
        above_part = above[part.batch, part.queries]
        on_probabilities = torch.bmm(above_part, value[part.batch, part.columns].transpose(1, 2))
        on_scores = torch._softmax_backward_data(_wide("scores", on_probabilities), wide, -1, torch.float32)
        on_scores = _for_products("on scores", on_scores, value.dtype)
        on_query[part.batch, part.queries] = torch.bmm(on_scores, key[part.batch, part.columns])
        for on, left, right in (
            (on_value, probabilities, above_part),
            (on_key, on_scores, query[part.batch, part.queries]),
        ):
            from_part = torch.bmm(left.transpose(1, 2), right)
            if part.is_first:  # it reads all columns
                on[part.batch] = from_part
            else:
                on[part.batch, part.columns] += from_part
    return on_query, on_key, on_value


@dataclass(frozen=True)
class _Part:
    """A stretch of queries of some rows and heads, and the columns that any of them may see."""

    batch: slice
    queries: slice  # of Q*G
    columns: slice
    is_first: bool


def _parts(block: Attending, query: Tensor, key: Tensor, heads: Heads) -> list[_Part]:
    """Parts that bound the memory of scores and leave out columns that lie behind all of a part's queries."""
    count, columns = query.shape[1] // heads.group, key.shape[1]
    size = max(1, SCORES_AT_ONCE // (query.shape[1] * columns))
    stretches = max(1, round(count / QUERIES_AT_ONCE)) if block.causal else 1
    ends = [count * (index + 1) // stretches for index in range(stretches)]
    parts = []
    for first in range(0, len(query), size):
        batch = slice(first, min(first + size, len(query)))
        # The last queries see all columns; they come first, so that nothing need be set to zero.
        for start, end in reversed(list(zip([0, *ends], ends, strict=False))):
            is_first = end == count
            seen = columns if is_first else min(columns, _rounded_up(columns - block.behind - count + end))
            parts.append(
                _Part(batch, slice(start * heads.group, end * heads.group), slice(0, seen), is_first)
            )
    return parts


def _probabilities(part: _Part, query: Tensor, key: Tensor, block: Attending, heads: Heads) -> Tensor:
    """Attention probabilities [b, q*G, t] of a part, float32, in memory that the next call takes again."""
    batch, columns = part.batch, part.columns
    # Scores in float32: rounded to bfloat16 they make the gradient worse than transformers' own.
    scores = scratch("scores", len(query[batch]), part.queries.stop - part.queries.start, columns.stop)
    torch.bmm(query[batch, part.queries], key[batch, columns].transpose(1, 2), out=scores)
    # One bias for all heads of a row: where rows differ, each batch of the part takes its row's.
    queries = slice(part.queries.start // heads.group, part.queries.stop // heads.group)
    by_query = scores.view(len(scores), -1, heads.group, scores.shape[2])
    bias_Bqt = block.bias_BQT[:, queries, columns]
    if len(bias_Bqt) > 1:
        bias_Bqt = bias_Bqt[torch.arange(batch.start, batch.stop) // heads.keys]
    by_query += bias_Bqt[:, :, None]
    return torch.softmax(scores, -1, out=scratch("wide probabilities", *scores.shape))


# Rotation


def _rotated_heads(
    projected_NE: Tensor, norm: Norm | None, scale: float, positions: Positions, kept: Tensor | None
) -> Tensor:
    """A projection with each head normed, rotated and scaled, [N, H*K] in its dtype."""
    if norm is not None:
        width = len(norm.weight_D)
        projected_NE = norm_forward(projected_NE.view(-1, width), norm).view(projected_NE.shape)
    cos_NK, sin_NK = _angles(positions, kept, scale)
    return _rotated(projected_NE, cos_NK, sin_NK)


def _rotated_backward(
    on_NE: Tensor,
    projected_NE: Tensor | None,
    norm: Norm | None,
    scale: float,
    positions: Positions,
    kept: Tensor | None,
) -> Tensor:
    """The gradient at the projection from that at rotated heads."""
    cos_NK, sin_NK = _angles(positions, kept, scale)
    # The transpose of a rotation is the rotation by the opposite angle (rotary halves share their angle).
    on_NE = _rotated(on_NE, cos_NK, sin_NK.neg_())
    if norm is not None and projected_NE is not None:
        width = len(norm.weight_D)
        on_NE = norm_backward(on_NE.view(-1, width), projected_NE.view(-1, width), norm, None).view(
            on_NE.shape
        )
    return on_NE


def _angles(positions: Positions, kept: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines times `scale`, [N, K], in new memory."""
    cos_NK, sin_NK = positions.cos_NK, positions.sin_NK
    if kept is not None:
        cos_NK, sin_NK = cos_NK.index_select(0, kept), sin_NK.index_select(0, kept)
    return cos_NK * scale, sin_NK * scale


def _rotated(projected_NE: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """x * cos + (-second half, first half) * sin, for each head."""
    width = cos_NK.shape[1]
    half = width // 2
    rotated_NE = torch.empty_like(projected_NE)
    for chunk in row_chunks(projected_NE):
        cos_n1K, sin_n1K = cos_NK[chunk, None], sin_NK[chunk, None]
        wide_nHK = _wide("heads", projected_NE[chunk]).view(len(cos_n1K), -1, width)
        output_nHK = torch.mul(wide_nHK, cos_n1K, out=scratch("rotated", *wide_nHK.shape))
        output_nHK[..., :half].addcmul_(wide_nHK[..., half:], sin_n1K[..., :half], value=-1)
        output_nHK[..., half:].addcmul_(wide_nHK[..., :half], sin_n1K[..., half:])
        rotated_NE[chunk] = output_nHK.view(len(cos_n1K), -1)
    return rotated_NE


# Layout and dtype


def _by_head(rows_BRE: Tensor, heads: Heads) -> Tensor:
    """Queries [B, R, H*G*K] as [B*H, R*G, K], contiguous: heads that share keys lie side by side."""
    rows, length, width = rows_BRE.shape
    apart = rows_BRE.view(rows, length, heads.keys, width // heads.keys)
    return apart.transpose(1, 2).reshape(rows * heads.keys, length * heads.group, -1)


def _packed(by_head: Tensor, padded: Padded, keys: int) -> Tensor:
    """[B*H, R*G, K] as packed rows [M, H*G*K]: the real ones."""
    rows, length = padded.at_BR.shape
    apart = by_head.reshape(rows, keys, length, -1)
    return apart.transpose(1, 2).reshape(rows * length, -1).index_select(0, padded.real_M)


def _with_past(block: Attending, packed_NE: Tensor, past_BHCK: Tensor | None, heads: Heads) -> Tensor:
    """Keys or values [B*H, T, K]: of the past, of the shared positions and of the row, then zeros."""
    rows, own = block.keys.at_BR.shape
    width = packed_NE.shape[1] // heads.keys
    past = 0 if past_BHCK is None else past_BHCK.shape[2]
    before = past + block.shared
    all_BHTK = packed_NE.new_empty(rows, heads.keys, before + own + block.behind, width)
    if past_BHCK is not None:
        all_BHTK[:, :, :past] = past_BHCK
    if block.shared:
        all_BHTK[:, :, past:before] = packed_NE[: block.shared].view(-1, heads.keys, width).transpose(0, 1)
    laid_out = block.keys.laid_out(packed_NE).view(rows, own, heads.keys, width)
    all_BHTK[:, :, before : before + own] = laid_out.transpose(1, 2)
    all_BHTK[:, :, before + own :] = 0
    return all_BHTK.flatten(0, 1)


def empty_columns(columns: int) -> int:
    """The number of columns to add so that a softmax over them works on whole vectors."""
    return _rounded_up(columns) - columns


def _rounded_up(columns: int) -> int:
    return -(-columns // COLUMNS_ALIGNED) * COLUMNS_ALIGNED


def _for_products(use: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor in the dtype of products, in scratch memory where that is another one."""
    dtype = product_dtype(tensor.dtype, tensor.device) if dtype is None else dtype
    return tensor if tensor.dtype == dtype else scratch(use, *tensor.shape, dtype=dtype).copy_(tensor)


def _wide(use: str, tensor: Tensor) -> Tensor:
    """The tensor in float32, in scratch memory where it is not."""
    if tensor.dtype == torch.float32:
        return tensor
    return scratch(f"wide {use}", *tensor.shape).copy_(tensor)
