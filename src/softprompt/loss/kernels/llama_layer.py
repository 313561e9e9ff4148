"""One frozen layer of a Llama-type body on a CPU: RMSNorm, rotary attention with grouped heads, SwiGLU.

Forward and backward are written by hand for rows that are packed without padding, [N, D]. The weights have no gradient,
so the backward pass needs far less than autograd would keep: the layer's input, rotated queries and keys, values, the
input of the second half, and the two inputs of SwiGLU. Everything else is cheap and computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.hardware import product_dtype
from softprompt.loss.kernels.grouped_attention import Heads, Positions, attention, attention_backward
from softprompt.loss.kernels.rms_norm import Norm, norm_backward, norm_forward
from softprompt.loss.kernels.workspace import scratch

Linear = tuple[Tensor, Tensor | None]  # weight [O, I], bias [O]


@dataclass(frozen=True)
class Layer:
    """The frozen weights of one layer."""

    before_attention: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    before_mlp: Norm
    gate: Linear
    up: Linear
    down: Linear
    heads: Heads


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
        middle_MD, gate_MF, up_MF, *attended = kept
        on_output_MD = upstream[0]
        # Second half: output = middle + down(silu(gate) * up) of the normed middle.
        on_act_MF = product(on_output_MD, layer.down[0])
        on_gate_MF, on_up_MF = _swiglu_backward(on_act_MF, gate_MF, up_MF)
        on_normed_MD = product(on_gate_MF, layer.gate[0])
        on_normed_MD += product(on_up_MF, layer.up[0])
        on_middle_MD = norm_backward(on_normed_MD, middle_MD, layer.before_mlp, on_output_MD)
        # First half: middle = input + output(attention) of the normed input.
        on_context_ME = product(on_middle_MD, layer.output[0])
        on_query_ME, on_key_NE, on_value_NE, on_past_keys, on_past_values = attention_backward(
            on_context_ME, attended, past_keys, layer.heads, positions
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
        on_hidden_ND = norm_backward(on_normed_ND, hidden_ND, layer.before_attention, residual_ND)
        return on_hidden_ND, on_past_keys, on_past_values, None, None, None


def _forward(
    hidden_ND: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    layer: Layer,
    positions: Positions,
    with_output: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tensors that the backward pass needs (middle, gate, up, and those of attention), and the output."""
    kept = positions.kept
    normed_ND = norm_forward(hidden_ND, layer.before_attention)
    context_ME, attended = attention(
        linear(normed_ND if kept is None else normed_ND[kept], layer.query),
        linear(normed_ND, layer.key),
        linear(normed_ND, layer.value),
        past_keys,
        past_values,
        layer.heads,
        positions,
    )
    middle_MD = linear(context_ME, layer.output)
    middle_MD += hidden_ND if kept is None else hidden_ND[kept]
    normed_MD = norm_forward(middle_MD, layer.before_mlp)
    gate_MF, up_MF = linear(normed_MD, layer.gate), linear(normed_MD, layer.up)
    saved = (middle_MD, gate_MF, up_MF, *attended)
    if not with_output:
        return saved, middle_MD
    output_MD = linear(swiglu(gate_MF, up_MF), layer.down)
    output_MD += middle_MD
    return saved, output_MD


# Products


def linear(rows_NI: Tensor, weights: Linear) -> Tensor:
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


# SwiGLU, in the base's dtype: torch's own functions compute each number in float32


def swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """silu(gate) * up, in memory that the next layer takes again."""
    output_MF = scratch("swiglu", *gate_MF.shape, dtype=gate_MF.dtype)
    torch.ops.aten.silu.out(gate_MF, out=output_MF)
    return output_MF.mul_(up_MF)


def _swiglu_backward(above_MF: Tensor, gate_MF: Tensor, up_MF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at gate and up; that at gate takes the memory of `above_MF`."""
    on_up_MF = scratch("swiglu", *gate_MF.shape, dtype=gate_MF.dtype)
    torch.ops.aten.silu.out(gate_MF, out=on_up_MF)
    on_up_MF.mul_(above_MF)
    above_MF.mul_(up_MF)
    torch.ops.aten.silu_backward.grad_input(above_MF, gate_MF, grad_input=above_MF)
    return above_MF, on_up_MF
