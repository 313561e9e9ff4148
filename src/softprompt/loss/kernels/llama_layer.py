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

from softprompt.loss.kernels.grouped_attention import Heads, Positions, attention, attention_backward
from softprompt.loss.kernels.linear import FrozenLinear, Inputs
from softprompt.loss.kernels.rms_norm import Norm, norm_backward, norm_forward
from softprompt.loss.kernels.workspace import row_chunks, scratch


@dataclass(frozen=True)
class Layer:
    """The frozen weights of one layer."""

    before_attention: Norm
    query: FrozenLinear
    key: FrozenLinear
    value: FrozenLinear
    output: FrozenLinear
    before_mlp: Norm
    gate: FrozenLinear
    up: FrozenLinear
    down: FrozenLinear
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
        on_act_MF = layer.down.back(on_output_MD)
        on_gate_MF, on_up_MF = _swiglu_backward(on_act_MF, gate_MF, up_MF)
        on_normed_MD = layer.gate.back(on_gate_MF)
        on_normed_MD += layer.up.back(on_up_MF)
        on_middle_MD = norm_backward(on_normed_MD, middle_MD, layer.before_mlp, on_output_MD)
        # First half: middle = input + output(attention) of the normed input.
        on_context_ME = layer.output.back(on_middle_MD)
        on_query_ME, on_key_NE, on_value_NE, on_past_keys, on_past_values = attention_backward(
            on_context_ME, attended, past_keys, layer.heads, positions
        )
        if not ctx.needs_input_grad[0]:
            return None, on_past_keys, on_past_values, None, None, None
        on_normed_ND = layer.key.back(on_key_NE)
        on_normed_ND += layer.value.back(on_value_NE)
        on_query_normed_MD = layer.query.back(on_query_ME)
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
    normed = Inputs(norm_forward(hidden_ND, layer.before_attention))
    context_ME, attended = attention(
        layer.query.ahead(normed if kept is None else Inputs(normed.rows_NI[kept])),
        layer.key.ahead(normed),
        layer.value.ahead(normed),
        past_keys,
        past_values,
        layer.heads,
        positions,
    )
    middle_MD = layer.output.ahead(Inputs(context_ME))
    middle_MD += hidden_ND if kept is None else hidden_ND[kept]
    normed = Inputs(norm_forward(middle_MD, layer.before_mlp))
    gate_MF, up_MF = layer.gate.ahead(normed), layer.up.ahead(normed)
    saved = (middle_MD, gate_MF, up_MF, *attended)
    if not with_output:
        return saved, middle_MD
    output_MD = layer.down.ahead(Inputs(swiglu(gate_MF, up_MF)))
    output_MD += middle_MD
    return saved, output_MD


# SwiGLU, in the base's dtype: torch's own functions compute each number in float32


def swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """silu(gate) * up, in memory that the next layer takes again."""
    output_MF = scratch("swiglu", *gate_MF.shape, dtype=gate_MF.dtype)
    for chunk in row_chunks(gate_MF):
        torch.ops.aten.silu.out(gate_MF[chunk], out=output_MF[chunk])
        output_MF[chunk].mul_(up_MF[chunk])
    return output_MF


def _swiglu_backward(above_MF: Tensor, gate_MF: Tensor, up_MF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at gate and up; that at gate takes the memory of `above_MF`."""
    on_up_MF = scratch("swiglu", *gate_MF.shape, dtype=gate_MF.dtype)
    for chunk in row_chunks(gate_MF):
        above_mF, gate_mF, on_up_mF = above_MF[chunk], gate_MF[chunk], on_up_MF[chunk]
        torch.ops.aten.silu.out(gate_mF, out=on_up_mF)
        on_up_mF.mul_(above_mF)
        above_mF.mul_(up_MF[chunk])
        torch.ops.aten.silu_backward.grad_input(above_mF, gate_mF, grad_input=above_mF)
    return above_MF, on_up_MF
