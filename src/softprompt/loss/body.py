"""The frozen body as learning runs it: the same weights and the same results, in less time.

The body is copied without its weights, which both share, and parts of the copy are exchanged: attention that keeps no
scores, a fused activation, products in the dtype that is fast here. The model itself stays as transformers made it.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralModel, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm

from softprompt.base.hardware import has_int8_products, product_dtype
from softprompt.base.quantised import is_quantised
from softprompt.base.split import is_dispatched, is_split
from softprompt.loss.kernels.attention import SHORT, fused_attention
from softprompt.loss.kernels.gelu import SmallGelu
from softprompt.loss.kernels.grouped_attention import Heads
from softprompt.loss.kernels.linear import FloatLinear, FrozenLinear, Int8Linear, LinearModule
from softprompt.loss.kernels.llama_layer import Layer
from softprompt.loss.kernels.rms_norm import Norm
from softprompt.loss.packed_body import PackedBody

Products = Literal["float", "int8"]
MIN_WEIGHTS = 2**16  # of a linear layer; for smaller ones a call costs more than its product


def learning_body(body: nn.Module, products: Products = "float") -> Any:
    """Returns a faster copy of `body` that shares its weights, or `body` itself where nothing can be gained.

    Its results are equal up to rounding, unless int8 products are asked for."""
    if is_quantised(body) or getattr(getattr(body, "config", None), "quantization_config", None) is not None:
        return body
    if is_split(body) or is_dispatched(body):
        return body  # other processes or devices hold the rest of its weights
    shared = {id(tensor): tensor for tensor in (*body.parameters(), *body.buffers())}
    twin = copy.deepcopy(body, shared)
    on_cpu = next(body.parameters()).device.type == "cpu"
    bias = _Bias()
    changed = False
    for module in list(twin.modules()):
        if isinstance(module, BloomAttention):
            module.forward = MethodType(_bloom_attention, module)  # type: ignore[method-assign]
            module.bias = bias  # type: ignore[assignment]
            changed = True
        for name, child in list(module.named_children()):
            exchanged = _exchanged(child, products, on_cpu)
            if exchanged is not None:
                setattr(module, name, exchanged)
                changed = True
    fast = twin.eval().requires_grad_(False) if changed else body
    return _packed(body, fast) or fast if on_cpu else fast


# Bodies whose every layer is norm, rotary attention with grouped heads, norm, SwiGLU; a subclass may differ.
LLAMA_TYPE = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


def _packed(body: Any, fast: Any) -> PackedBody | None:
    """The body that reads packed rows, None where the architecture is not one that it knows in every part."""
    if type(body) not in LLAMA_TYPE or body.config.hidden_act not in ("silu", "swish"):
        return None
    linears = [child for module in body.layers for child in module.modules() if not list(child.children())]
    plain = (nn.Linear, nn.SiLU, type(body.norm), type(body.layers[0].mlp.act_fn))
    if any(type(child) not in plain for child in linears):
        return None  # layers that hold packed or adapted weights
    layers = [_layer(module) for module in fast.layers]
    return PackedBody(fast, layers, [_window(body, module) for module in body.layers], _norm(body.norm))


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        before_attention=_norm(module.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        before_mlp=_norm(module.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        heads=Heads(
            queries=attention.q_proj.out_features // attention.head_dim,
            keys=attention.k_proj.out_features // attention.head_dim,
            scale=attention.scaling,
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
    )


def _linear(module: Any) -> FrozenLinear:
    if isinstance(module, LinearModule):
        return module.linear
    return FloatLinear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def _window(body: Any, module: Any) -> int | None:
    """A layer's sliding window: of all layers in Mistral, of those of that type in Qwen, of none in Llama."""
    if isinstance(body, MistralModel):
        return getattr(body.config, "sliding_window", None)
    return getattr(module.self_attn, "sliding_window", None)


# Norms that are weight * x / sqrt(mean(x^2) + epsilon); a subclass may differ.
RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


class FusedNorm(nn.Module):
    """A root-mean-square norm with the weight of `module`: one kernel of torch in place of the eight that transformers starts."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = module.weight, float(module.variance_epsilon)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return functional.rms_norm(hidden_BSD, self.weight.shape, self.weight, self.epsilon)


def _exchanged(module: nn.Module, products: Products, on_cpu: bool) -> nn.Module | None:
    if isinstance(module, BloomGelu):
        return SmallGelu() if on_cpu else nn.GELU(approximate="tanh")  # the same function, fused
    if type(module) in RMS_NORMS and not on_cpu:
        return FusedNorm(module)
    if type(module) is not nn.Linear or module.weight.numel() < MIN_WEIGHTS:
        return None
    weight_OI = module.weight
    if products == "int8" and on_cpu and has_int8_products():
        return LinearModule(module, Int8Linear)
    if product_dtype(weight_OI.dtype, weight_OI.device) != weight_OI.dtype:
        return LinearModule(module, FloatLinear)
    return None


def _bloom_attention(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Replaces BloomAttention.forward: fused attention with ALiBi and mask as one bias, made once for all layers."""
    rows, length, width = hidden_states.shape
    fused = self.query_key_value(hidden_states)
    short = layer_past is None and length <= SHORT and fused.device.type == "cpu"
    bias_BHST = self.bias.of(alibi, attention_mask, self.num_heads, length if short else None, fused.dtype)
    if short:
        context = fused_attention(fused, bias_BHST, self.num_heads, self.inv_norm_factor)
        return self.dense(context) + residual, None
    query, key, value = self._reshape(fused)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    dtype = product_dtype(fused.dtype, fused.device)
    context = functional.scaled_dot_product_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        attn_mask=bias_BHST.to(dtype),
        scale=self.inv_norm_factor,
    ).to(fused.dtype)
    return self.dense(context.transpose(1, 2).reshape(rows, length, width)) + residual, None


class _Bias:
    """The attention bias of the latest forward pass: every layer is given the same ALiBi and mask."""

    def __init__(self) -> None:
        self.made_of: tuple[Tensor, Tensor | None, int | None] | None = None
        self.bias_BHST = torch.empty(0)

    def of(
        self, alibi: Tensor, mask: Tensor | None, heads: int, square: int | None, dtype: torch.dtype
    ) -> Tensor:
        """The bias [B, H, S or 1, T]; with a length as `square` float32 and in full, [B, H, S, S]."""
        latest = self.made_of
        if latest is not None and latest[0] is alibi and latest[1] is mask and latest[2] == square:
            return self.bias_BHST
        bias_BHST = alibi.view(-1, heads, 1, alibi.shape[-1])
        if square is not None:
            bias_BHST = bias_BHST.float().expand(-1, -1, square, -1)
        if mask is not None:
            bias_BHST = bias_BHST + mask
        self.made_of, self.bias_BHST = (alibi, mask, square), bias_BHST.contiguous()
        return self.bias_BHST
