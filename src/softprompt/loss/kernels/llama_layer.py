"""One frozen layer of a Llama-type body on a CPU: RMSNorm, rotary attention with grouped heads, SwiGLU.

Forward and backward are written by hand for rows that are packed without padding, [N, D]. The weights have no gradient,
so the backward pass needs far less than autograd would keep: the layer's input, queries, keys and values before
rotation, the input of the second half, and the two inputs of SwiGLU. Everything else is cheap and computed again.
Norms, rotation, softmax and SwiGLU are computed in float32; products are in the dtype that is fast here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.hardware import product_dtype
from softprompt.loss.kernels.workspace import scratch

NUMBERS_AT_ONCE = 2**17  # float32 numbers of one chunk: half a megabyte stays in a core's cache
SCORES_AT_ONCE = 2**23  # float32 scores of one chunk: 32 MB


@dataclass(frozen=True)
class Attending:
    """The packed positions that attend to each other, for a block of B rows; indices are into the packed rows.

    `query_at` [B, Q] and `key_at` [B, S] repeat some real position where a row is shorter than the block; of the queries
    `is_query` marks the real ones. `bias_BQT` ([B or 1, Q, T], 0 or -inf) decides; its T columns are those of the past
    (if there is one), the first `shared` packed positions, and the row's own keys."""

    query_at: Tensor
    is_query: Tensor
    key_at: Tensor
    bias_BQT: Tensor
    shared: int = 0


@dataclass(frozen=True)
class Norm:
    """RMSNorm as Llama has it: weight * (x / rms)."""

    weight_D: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """The frozen weights of one layer; linears are (weight [O, I], bias [O] or None)."""

    before_attention: Norm
    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    before_mlp: Norm
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    heads: int
    kv_heads: int
    scale: float
    query_norm: Norm | None = None  # of each head, as in Qwen3
    key_norm: Norm | None = None


@dataclass(frozen=True)
class Positions:
    """The packed positions of a pass: rotary cosines and sines, float32 [N, K], and who attends to whom.

    `kept` are the packed positions that the layer gives results for, None for all."""

    cos_NK: Tensor
    sin_NK: Tensor
    blocks: tuple[Attending, ...]
    kept: Tensor | None = None


def layer_output(
    hidden_ND: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
    positions: Positions,
    recompute: bool,
) -> Tensor:
    """The layer's output for packed rows, [N or kept, D]; differentiable towards `hidden_ND` and the past.

    `past_keys` and `past_values` are [B, Hkv, C, K], of the one block of rows. With `recompute` only the input is kept
    for the backward pass."""
    output: Tensor = _Layer.apply(hidden_ND, past_keys, past_values, layer, positions, recompute)  # type: ignore[no-untyped-call]
    return output


def normed(hidden_ND: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of packed rows, differentiable towards them."""
    output: Tensor = _Norm.apply(hidden_ND, norm)  # type: ignore[no-untyped-call]
    return output


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        past_keys: Tensor | None,
        past_values: Tensor | None,
        layer: Layer,
        positions: Positions,
        recompute: bool,
    ) -> Tensor:
        kept, output_MD = _forward(hidden_ND, past_keys, past_values, layer, positions)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(hidden_ND, past_keys, past_values, *(() if recompute else kept))
        ctx.layer, ctx.positions = layer, positions
        return output_MD

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        layer, positions = ctx.layer, ctx.positions
        hidden_ND, past_keys, past_values, *kept = ctx.saved_tensors
        if not kept:
            kept, _ = _forward(hidden_ND, past_keys, past_values, layer, positions, with_output=False)
        query_ME, key_NE, value_NE, middle_MD, gate_MF, up_MF = kept
        on_output_MD = upstream[0]
        # Second half: output = middle + down(silu(gate) * up) of the normed middle.
        on_act_MF = product(on_output_MD, layer.down[0])
        on_gate_MF, on_up_MF = _swiglu_backward(on_act_MF, gate_MF, up_MF)
        on_normed_MD = product(on_gate_MF, layer.gate[0])
        on_normed_MD += product(on_up_MF, layer.up[0])
        on_middle_MD = _norm_backward(on_normed_MD, middle_MD, layer.before_mlp, on_output_MD)
        # First half: middle = input + output(attention) of the normed input.
        on_context_ME = product(on_middle_MD, layer.output[0])
        on_query_ME, on_key_NE, on_value_NE, on_past_keys, on_past_values = _attention_backward(
            on_context_ME, query_ME, key_NE, value_NE, past_keys, past_values, layer, positions
        )
        if not ctx.needs_input_grad[0]:
            return None, on_past_keys, on_past_values, None, None, None
        on_normed_ND = product(on_key_NE, layer.key[0])
        on_normed_ND += product(on_value_NE, layer.value[0])
        on_query_normed_MD = product(on_query_ME, layer.query[0])
        if positions.kept is None:
            on_normed_ND += on_query_normed_MD
            residual_ND = on_middle_MD
        else:  # queries and the residual exist at kept positions alone
            on_normed_ND.index_add_(0, positions.kept, on_query_normed_MD)
            residual_ND = torch.zeros_like(hidden_ND).index_add_(0, positions.kept, on_middle_MD)
        on_hidden_ND = _norm_backward(on_normed_ND, hidden_ND, layer.before_attention, residual_ND)
        return on_hidden_ND, on_past_keys, on_past_values, None, None, None


def _forward(
    hidden_ND: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
    positions: Positions,
    with_output: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tensors that the backward pass needs (query, key, value, middle, gate, up), and the output."""
    kept = positions.kept
    normed_ND = _normed(hidden_ND, layer.before_attention)
    key_NE = linear(normed_ND, layer.key)
    value_NE = linear(normed_ND, layer.value)
    query_ME = linear(normed_ND if kept is None else normed_ND[kept], layer.query)
    context_ME = _attention(query_ME, key_NE, value_NE, past_keys, past_values, layer, positions)
    middle_MD = linear(context_ME, layer.output)
    middle_MD += hidden_ND if kept is None else hidden_ND[kept]
    normed_MD = _normed(middle_MD, layer.before_mlp)
    gate_MF, up_MF = linear(normed_MD, layer.gate), linear(normed_MD, layer.up)
    saved = (query_ME, key_NE, value_NE, middle_MD, gate_MF, up_MF)
    if not with_output:
        return saved, middle_MD
    output_MD = linear(swiglu(gate_MF, up_MF), layer.down)
    output_MD += middle_MD
    return saved, output_MD


# Products


def linear(rows_NI: Tensor, weights: tuple[Tensor, Tensor | None]) -> Tensor:
    """rows @ weight.T + bias."""
    weight_OI, bias_O = weights
    output_NO = product(rows_NI, weight_OI.T)
    if bias_O is not None:
        output_NO += bias_O
    return output_NO


def product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """left @ right in left's dtype, computed in the dtype of products, by the faster of the two libraries at hand."""
    dtype = product_dtype(right_KM.dtype, right_KM.device)
    if dtype != right_KM.dtype:
        # Convert into memory that the next product takes again; a transposed view is copied in its memory order.
        turned = right_KM.stride(0) == 1
        plain = right_KM.T if turned else right_KM
        wide = scratch("right", *plain.shape).copy_(plain)
        right_KM, wide_NK = wide.T if turned else wide, scratch("left", *left_NK.shape).copy_(left_NK)
        return _float32_product(wide_NK, right_KM).to(left_NK.dtype)
    return _float32_product(left_NK, right_KM) if dtype == torch.float32 else left_NK @ right_KM


def _float32_product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """oneDNN's product where torch has it: a tenth faster than MKL's on AMD, without a packed copy of the weights."""
    if _HAS_ONEDNN and left_NK.device.type == "cpu":
        with_right: Tensor = torch.ops.mkldnn._linear_pointwise(
            left_NK.contiguous(), right_KM.T, None, "none", [], ""
        )
        return with_right
    return left_NK @ right_KM


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


# RMSNorm


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, norm: Norm) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(hidden_ND)
        ctx.norm = norm
        return _normed(hidden_ND, norm)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (hidden_ND,) = ctx.saved_tensors
        return _norm_backward(upstream[0], hidden_ND, ctx.norm, None), None


def _normed(hidden_ND: Tensor, norm: Norm) -> Tensor:
    output_ND = torch.empty_like(hidden_ND)
    for chunk in _chunks(hidden_ND):
        wide_nD, scale_n1 = _wide_and_scale(hidden_ND[chunk], norm.eps)
        # As transformers does: x / rms is rounded to the dtype, then multiplied by the weight.
        torch.mul(wide_nD, scale_n1, out=wide_nD)
        if hidden_ND.dtype == torch.float32:
            torch.mul(wide_nD, norm.weight_D, out=output_ND[chunk])
        else:
            output_ND[chunk] = wide_nD
            output_ND[chunk] *= norm.weight_D
    return output_ND


def _norm_backward(above_ND: Tensor, hidden_ND: Tensor, norm: Norm, residual_ND: Tensor | None) -> Tensor:
    """The gradient at the norm's input, plus that of the residual branch beside it."""
    output_ND = torch.empty_like(hidden_ND)
    width = hidden_ND.shape[1]
    weight_D = norm.weight_D.float()
    for chunk in _chunks(hidden_ND):
        wide_nD, scale_n1 = _wide_and_scale(hidden_ND[chunk], norm.eps)
        weighed_nD = scratch("weighed", *wide_nD.shape)
        weighed_nD.copy_(above_ND[chunk]).mul_(weight_D)
        # y = s x with s = (mean x^2 + eps)^-1/2 has the gradient s g - x s^3 (g . x) / D.
        along_n1 = torch.linalg.vecdot(weighed_nD, wide_nD)[:, None]
        along_n1 *= scale_n1.pow(3).mul_(-1 / width)
        weighed_nD.mul_(scale_n1).addcmul_(wide_nD, along_n1)
        if residual_ND is not None:
            weighed_nD += residual_ND[chunk]
        output_ND[chunk] = weighed_nD
    return output_ND


def _wide_and_scale(hidden_nD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows in float32, in scratch memory, and 1 / rms of each, [n, 1]."""
    wide_nD = scratch("wide", *hidden_nD.shape).copy_(hidden_nD)
    mean_n = torch.linalg.vecdot(wide_nD, wide_nD).div_(hidden_nD.shape[1])
    return wide_nD, mean_n.add_(eps).rsqrt_()[:, None]


def _chunks(rows_ND: Tensor) -> list[slice]:
    """Slices of rows that are small enough for the cache."""
    size = max(1, NUMBERS_AT_ONCE // rows_ND.shape[1])
    return [slice(first, first + size) for first in range(0, len(rows_ND), size)]


# SwiGLU


def swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """silu(gate) * up."""
    output_MF = torch.empty_like(gate_MF)
    for chunk in _chunks(gate_MF):
        wide_mF = scratch("wide", *gate_MF[chunk].shape).copy_(gate_MF[chunk])
        torch.nn.functional.silu(wide_mF, inplace=True)
        output_MF[chunk] = wide_mF.mul_(up_MF[chunk])
    return output_MF


def _swiglu_backward(above_MF: Tensor, gate_MF: Tensor, up_MF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at gate and up; that at gate takes the memory of `above_MF`."""
    on_up_MF = torch.empty_like(up_MF)
    for chunk in _chunks(gate_MF):
        above_mF = above_MF[chunk]
        wide_mF = scratch("wide", *above_mF.shape).copy_(gate_MF[chunk])
        sigmoid_mF = torch.sigmoid(wide_mF, out=scratch("sigmoid", *above_mF.shape))
        silu_mF = wide_mF.mul_(sigmoid_mF)
        on_up_MF[chunk] = torch.mul(silu_mF, above_mF, out=scratch("weighed", *above_mF.shape))
        # silu'(g) = sigmoid + silu (1 - sigmoid) = sigmoid + silu - silu * sigmoid
        slope_mF = silu_mF.addcmul_(silu_mF, sigmoid_mF, value=-1).add_(sigmoid_mF)
        above_mF.copy_(slope_mF.mul_(up_MF[chunk]).mul_(above_mF))
    return above_MF, on_up_MF


# Attention


def _attention(
    query_ME: Tensor,
    key_NE: Tensor,
    value_NE: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
    positions: Positions,
) -> Tensor:
    """The output of attention for each query, [M, Hq*K]; inputs are projections before head norms and rotation."""
    context_ME = torch.empty_like(query_ME)
    query_MHK, key_NHK, value_NHK = _heads(query_ME, key_NE, value_NE, layer, positions)
    for block in positions.blocks:
        rows, count = block.query_at.shape
        query, key, value = _laid_out(block, query_MHK, key_NHK, value_NHK, past_keys, past_values, layer)
        context = scratch("context", *query.shape)
        for part in _parts(query, key):
            chances = _chances(part, query, key, block.bias_BQT, layer)
            torch.bmm(chances, value[part], out=context[part])
        _put_rows(context_ME, block, _as_rows(context, rows, count))
    return context_ME


def _attention_backward(
    above_ME: Tensor,
    query_ME: Tensor,
    key_NE: Tensor,
    value_NE: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
    positions: Positions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients at the three projections and at the past's keys and values."""
    query_MHK, key_NHK, value_NHK = _heads(query_ME, key_NE, value_NE, layer, positions)
    on_query_MHK = torch.empty_like(query_MHK)
    on_key_NHK, on_value_NHK = torch.zeros_like(key_NHK), torch.zeros_like(value_NHK)
    on_past: list[Tensor | None] = [None, None]
    for block in positions.blocks:
        rows, count = block.query_at.shape
        query, key, value = _laid_out(block, query_MHK, key_NHK, value_NHK, past_keys, past_values, layer)
        above_BQE = above_ME[block.query_at.view(-1)].view(rows, count, -1).float()
        # Nothing comes from queries that only fill up their row.
        above_BQE.mul_(block.is_query[:, :, None])
        above = scratch("above", *query.shape)
        groups = layer.heads // layer.kv_heads
        _by_group(above, rows, groups, count).copy_(
            above_BQE.view(rows, count, layer.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
        )
        on_query, on_key, on_value = (
            scratch(use, *tensor.shape)
            for use, tensor in (("on query", query), ("on key", key), ("on value", value))
        )
        for part in _parts(query, key):
            # The probabilities again: kept, those of all layers would pile up.
            chances = _chances(part, query, key, block.bias_BQT, layer)
            torch.bmm(chances.transpose(1, 2), above[part], out=on_value[part])
            on_chances = torch.bmm(
                above[part], value[part].transpose(1, 2), out=scratch("scores", *chances.shape)
            )
            on_scores = torch._softmax_backward_data(on_chances, chances, -1, torch.float32)
            torch.bmm(on_scores, key[part], out=on_query[part])
            torch.bmm(on_scores.transpose(1, 2), query[part], out=on_key[part])
        on_query.mul_(layer.scale)  # `query` holds the scale already, and with it `on_key`
        _put_rows(on_query_MHK.flatten(1), block, _as_rows(on_query, rows, count))
        before = key.shape[1] - block.key_at.shape[1]
        for on, on_NHK, which in ((on_key, on_key_NHK, 0), (on_value, on_value_NHK, 1)):
            on_BHTK = on.view(rows, layer.kv_heads, key.shape[1], -1)
            own = on_BHTK[:, :, before:].transpose(1, 2).flatten(0, 1)
            on_NHK.index_add_(0, block.key_at.view(-1), own)
            if block.shared:  # every row read them: their gradients add up
                on_NHK[: block.shared] += on_BHTK[:, :, before - block.shared : before].sum(0).transpose(0, 1)
            if past_keys is not None:
                on_past[which] = on_BHTK[:, :, : past_keys.shape[2]].to(past_keys.dtype, copy=True)
    on_query_ME, on_key_NE = _heads_backward(on_query_MHK, on_key_NHK, query_ME, key_NE, layer, positions)
    return on_query_ME, on_key_NE, on_value_NHK.flatten(1).to(value_NE.dtype), on_past[0], on_past[1]


def _heads(
    query_ME: Tensor, key_NE: Tensor, value_NE: Tensor, layer: Layer, positions: Positions
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of each head, normed and rotated, and values, float32 [N, H, K]."""
    rotated = []
    for tensor_NE, heads, norm, kept in (
        (query_ME, layer.heads, layer.query_norm, positions.kept),
        (key_NE, layer.kv_heads, layer.key_norm, None),
    ):
        if norm is not None:
            tensor_NE = _normed(tensor_NE.view(len(tensor_NE) * heads, -1), norm).view(tensor_NE.shape)
        cos_N1K, sin_N1K = _angles(positions, kept)
        rotated.append(_rotated(tensor_NE.float().view(len(tensor_NE), heads, -1), cos_N1K, sin_N1K))
    return rotated[0], rotated[1], value_NE.float().view(len(value_NE), layer.kv_heads, -1)


def _heads_backward(
    on_query_MHK: Tensor,
    on_key_NHK: Tensor,
    query_ME: Tensor,
    key_NE: Tensor,
    layer: Layer,
    positions: Positions,
) -> tuple[Tensor, Tensor]:
    """The gradients at the projections from those at rotated heads."""
    results = []
    for on_NHK, tensor_NE, norm, kept in (
        (on_query_MHK, query_ME, layer.query_norm, positions.kept),
        (on_key_NHK, key_NE, layer.key_norm, None),
    ):
        cos_N1K, sin_N1K = _angles(positions, kept)
        # The transpose of a rotation is the rotation by the opposite angle (rotary halves share their angle).
        on_NE = _rotated(on_NHK, cos_N1K, -sin_N1K).flatten(1)
        if norm is not None:
            by_head = (len(on_NE) * on_NHK.shape[1], on_NHK.shape[2])
            on_NE = _norm_backward(on_NE.view(by_head), tensor_NE.view(by_head), norm, None).view(on_NE.shape)
        results.append(on_NE.to(tensor_NE.dtype))
    return results[0], results[1]


def _angles(positions: Positions, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    cos_NK, sin_NK = positions.cos_NK, positions.sin_NK
    if kept is not None:
        cos_NK, sin_NK = cos_NK[kept], sin_NK[kept]
    return cos_NK[:, None], sin_NK[:, None]


def _rotated(heads_NHK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> Tensor:
    """x * cos + (-second half, first half) * sin."""
    half = heads_NHK.shape[2] // 2
    output_NHK = heads_NHK * cos_N1K
    output_NHK[..., :half].addcmul_(heads_NHK[..., half:], sin_N1K[..., :half], value=-1)
    output_NHK[..., half:].addcmul_(heads_NHK[..., :half], sin_N1K[..., half:])
    return output_NHK


def _laid_out(
    block: Attending,
    query_MHK: Tensor,
    key_NHK: Tensor,
    value_NHK: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batches for bmm, float32: scaled queries [B*Hkv, G*Q, K] (a group shares its keys), keys and values [B*Hkv, T, K].

    Keys are those of the past, of the shared positions and of the row, one after the other."""
    rows, count = block.query_at.shape
    groups, width = layer.heads // layer.kv_heads, query_MHK.shape[2]
    query = scratch("query", rows * layer.kv_heads, groups * count, width)
    gathered = query_MHK[block.query_at.view(-1)].view(rows, count, layer.kv_heads, groups, width)
    torch.mul(gathered.permute(0, 2, 3, 1, 4), layer.scale, out=_by_group(query, rows, groups, count))
    past = 0 if past_keys is None else past_keys.shape[2]
    before = past + block.shared
    both = []
    for use, tensor_NHK, past_BHCK in (("key", key_NHK, past_keys), ("value", value_NHK, past_values)):
        all_BHTK = scratch(use, rows, layer.kv_heads, before + block.key_at.shape[1], width)
        if past_BHCK is not None:
            all_BHTK[:, :, :past] = past_BHCK
        if block.shared:
            all_BHTK[:, :, past:before] = tensor_NHK[: block.shared].transpose(0, 1)
        own = tensor_NHK[block.key_at.view(-1)].view(rows, -1, layer.kv_heads, width)
        all_BHTK[:, :, before:] = own.transpose(1, 2)
        both.append(all_BHTK.flatten(0, 1))
    return query, both[0], both[1]


def _chances(part: slice, query: Tensor, key: Tensor, bias_BQT: Tensor, layer: Layer) -> Tensor:
    """Attention probabilities [part of B*Hkv, G*Q, T], in memory that the next call takes again."""
    scores = scratch("scores", *query[part].shape[:2], key.shape[1])
    torch.bmm(query[part], key[part].transpose(1, 2), out=scores)
    # One bias for all heads of a row: where rows differ, each batch of `part` takes its row's.
    by_group = scores.view(len(scores), -1, *bias_BQT.shape[1:])
    if len(bias_BQT) == 1:
        by_group += bias_BQT
    else:
        row_of = torch.arange(part.start, part.start + len(scores)) // layer.kv_heads
        by_group += bias_BQT[row_of][:, None]
    return torch.softmax(scores, -1, out=scratch("chances", *scores.shape))


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """Slices of the batch that bound the memory of scores."""
    size = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[1]))
    return [slice(first, min(first + size, len(query))) for first in range(0, len(query), size)]


def _by_group(grouped: Tensor, rows: int, groups: int, count: int) -> Tensor:
    """[B*Hkv, G*Q, K] as [B, Hkv, G, Q, K], a view."""
    return grouped.view(rows, -1, groups, count, grouped.shape[-1])


def _as_rows(grouped: Tensor, rows: int, count: int) -> Tensor:
    """[B*Hkv, G*Q, K] as [B, Q, Hq*K], a view where it can be."""
    width = grouped.shape[-1]
    return grouped.view(rows, -1, count, width).transpose(1, 2).reshape(rows, count, -1)


def _put_rows(target_ME: Tensor, block: Attending, rows_BQE: Tensor) -> None:
    """Writes the real queries of a block to their packed positions."""
    target_ME[block.query_at[block.is_query]] = rows_BQE[block.is_query].to(target_ME.dtype)
