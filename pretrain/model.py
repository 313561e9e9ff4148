"""BLOOM's function written for training speed, on the parameters of a transformers BloomForCausalLM.

The same mathematics as transformers' forward (a test holds them together), with three differences in how: attention runs
over a few texts at a time with ALiBi as distances from the diagonal, weights are cast to the compute dtype once a step,
and the output layer gives loss and gradient chunk by chunk, so that the logits of a batch never exist at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # positions whose logits are held at once: 256 x 8,192 x 2 bytes = 4 MB, which stays in the cache
ROWS = 2  # texts whose attention scores are held at once, for the same reason


def slopes_H(heads: int) -> Tensor:
    """ALiBi's slopes for a power-of-two count of heads: 2^(-8/H), 2^(-16/H), ... (Press et al. 2021)."""
    if heads & (heads - 1):
        raise ValueError(f"found {heads} heads, wanted a power of two; choose n_head among 4, 8, 16")
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))


def alibi_HTT(heads: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """What attention adds to its scores: slope times minus the distance, -inf for the future. fp32."""
    at_T = torch.arange(length)
    distance_TT = at_T[:, None] - at_T[None, :]
    bias_HTT = -slopes_H(heads)[:, None, None] * distance_TT
    return bias_HTT.masked_fill(distance_TT < 0, -torch.inf).to(device)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy through the tied output layer; both gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(labels_N), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, labels_C1 = hidden_ND[rows], labels_N[rows, None]
            excess_CV = torch.softmax(hidden_CD @ weight_VD.T, -1)
            total -= excess_CV.gather(1, labels_C1).float().log().sum()
            excess_CV.scatter_add_(1, labels_C1, excess_CV.new_full(labels_C1.shape, -1.0))
            grad_ND[rows] = excess_CV @ weight_VD
            grad_VD += excess_CV.T @ hidden_CD
        ctx.save_for_backward(grad_ND, grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), grad_VD * grads[0].to(grad_VD.dtype), None


class Attention(torch.autograd.Function):
    """Causal attention from the fused projection [B, T, H*3*K] to [B, T, H*K], a few texts at a time."""

    @staticmethod
    def forward(ctx: Any, fused_BTE: Tensor, bias_HTT: Tensor) -> Tensor:
        B, T, E = fused_BTE.shape
        H = bias_HTT.shape[0]
        query, key, value = apart(fused_BTE, H)
        chances = fused_BTE.new_empty(B * H, T, T)
        mixed = torch.empty_like(query)
        for start in range(0, B * H, ROWS * H):
            rows = slice(start, start + ROWS * H)
            bias = bias_HTT.to(query.dtype).repeat(len(query[rows]) // H, 1, 1)
            scores = torch.baddbmm(
                bias, query[rows], key[rows].transpose(1, 2), alpha=query.shape[-1] ** -0.5
            )
            torch.softmax(scores, -1, out=chances[rows])
            torch.bmm(chances[rows], value[rows], out=mixed[rows])
        ctx.save_for_backward(query, key, value, chances)
        ctx.shape = (B, T, H, E)
        return mixed.view(B, H, T, E // 3 // H).transpose(1, 2).reshape(B, T, E // 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        query, key, value, chances = ctx.saved_tensors
        B, T, H, E = ctx.shape
        K = E // 3 // H
        slope = grads[0].view(B, T, H, K).transpose(1, 2).reshape(B * H, T, K)
        out = query.new_empty(3, B * H, T, K)
        for start in range(0, B * H, ROWS * H):
            rows = slice(start, start + ROWS * H)
            on_chances = torch.bmm(slope[rows], value[rows].transpose(1, 2))
            on_scores = torch._softmax_backward_data(on_chances, chances[rows], -1, query.dtype).mul_(K**-0.5)
            torch.bmm(on_scores, key[rows], out=out[0][rows])
            torch.bmm(on_scores.transpose(1, 2), query[rows], out=out[1][rows])
            torch.bmm(chances[rows].transpose(1, 2), slope[rows], out=out[2][rows])
        return out.view(3, B, H, T, K).permute(1, 3, 2, 0, 4).reshape(B, T, E), None


def attention(fused_BTE: Tensor, bias_HTT: Tensor) -> Tensor:
    """Four times as fast as torch's fused attention on a CPU, forward and backward; a GPU has a better one."""
    if fused_BTE.device.type == "cpu":
        return Attention.apply(fused_BTE, bias_HTT)  # type: ignore[no-any-return, no-untyped-call]
    B, T, _ = fused_BTE.shape
    query, key, value = (part.view(B, len(bias_HTT), T, -1) for part in apart(fused_BTE, len(bias_HTT)))
    mixed_BHTK = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_HTT.to(query.dtype)[None])
    return mixed_BHTK.transpose(1, 2).reshape(B, T, -1)


def apart(fused_BTE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [B*H, T, K] each: the fused projection holds them head by head."""
    B, T, E = fused_BTE.shape
    parts = fused_BTE.view(B, T, heads, 3, E // 3 // heads).permute(3, 0, 2, 1, 4)
    query, key, value = (part.reshape(B * heads, T, -1) for part in parts)
    return query, key, value


def head_loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed negative log-likelihood of the labels, in nats. fp32 scalar."""
    total: Tensor = HeadLoss.apply(hidden_ND, weight_VD, labels_N)  # type: ignore[no-untyped-call]
    return total


def hidden_BTD(
    weights: dict[str, Tensor], ids_BT: Tensor, bias_HTT: Tensor, layers: int, eps: float
) -> Tensor:
    """The last hidden states, after the final norm. `weights` by transformers' names, without `transformer.`."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    x_BTD = norm(F.embedding(ids_BT, weights["word_embeddings.weight"]), "word_embeddings_layernorm")
    for layer in range(layers):
        block = f"h.{layer}"
        qkv = linear(norm(x_BTD, f"{block}.input_layernorm"), f"{block}.self_attention.query_key_value")
        mixed_BTD = attention(qkv, bias_HTT)
        x_BTD = x_BTD + linear(mixed_BTD, f"{block}.self_attention.dense")
        inner = linear(norm(x_BTD, f"{block}.post_attention_layernorm"), f"{block}.mlp.dense_h_to_4h")
        x_BTD = x_BTD + linear(F.gelu(inner, approximate="tanh"), f"{block}.mlp.dense_4h_to_h")
    return norm(x_BTD, "ln_f")


def cast(parameters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters in the compute dtype, still connected to the fp32 ones."""
    return {name.removeprefix("transformer."): value.to(dtype) for name, value in parameters.items()}
