"""BLOOM's function written for training speed, on the parameters of a transformers BloomForCausalLM.

The same mathematics as transformers' forward (a test holds them together), with three differences in how: attention is
one fused call with ALiBi as distances from the diagonal, weights are cast to the compute dtype once a step, and the
output layer gives loss and gradient chunk by chunk, so that the logits of a batch never exist at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # positions whose logits are held at once: 512 x 8,192 x 4 bytes = 16 MB


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
            logits_NV = (hidden_ND[rows] @ weight_VD.T).float()
            logsum_N = logits_NV.logsumexp(-1)
            total += (logsum_N - logits_NV.gather(1, labels_N[rows, None])[:, 0]).sum()
            excess_NV = logits_NV.sub_(logsum_N[:, None]).exp_()
            excess_NV.scatter_add_(1, labels_N[rows, None], excess_NV.new_full((len(logsum_N), 1), -1.0))
            excess_NV = excess_NV.to(hidden_ND.dtype)
            grad_ND[rows] = excess_NV @ weight_VD
            grad_VD += excess_NV.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_ND, grad_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), grad_VD * grads[0].to(grad_VD.dtype), None


def head_loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed negative log-likelihood of the labels, in nats. fp32 scalar."""
    total: Tensor = HeadLoss.apply(hidden_ND, weight_VD, labels_N)  # type: ignore[no-untyped-call]
    return total


def hidden_BTD(
    weights: dict[str, Tensor], ids_BT: Tensor, bias_HTT: Tensor, layers: int, eps: float
) -> Tensor:
    """The last hidden states, after the final norm. `weights` by transformers' names, without `transformer.`."""
    B, T = ids_BT.shape
    H = bias_HTT.shape[0]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    x_BTD = norm(F.embedding(ids_BT, weights["word_embeddings.weight"]), "word_embeddings_layernorm")
    D = x_BTD.shape[-1]
    mask_1HTT = bias_HTT.to(x_BTD.dtype)[None]  # four dimensions: the fused CPU kernel takes no three
    for layer in range(layers):
        block = f"h.{layer}"
        qkv = linear(norm(x_BTD, f"{block}.input_layernorm"), f"{block}.self_attention.query_key_value")
        q, k, v = qkv.view(B, T, H, 3, D // H).permute(3, 0, 2, 1, 4)
        mixed_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_1HTT, scale=1 / math.sqrt(D // H))
        mixed_BTD = mixed_BHTK.transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + linear(mixed_BTD, f"{block}.self_attention.dense")
        inner = linear(norm(x_BTD, f"{block}.post_attention_layernorm"), f"{block}.mlp.dense_h_to_4h")
        x_BTD = x_BTD + linear(F.gelu(inner, approximate="tanh"), f"{block}.mlp.dense_4h_to_h")
    return norm(x_BTD, "ln_f")


def cast(parameters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters in the compute dtype, still connected to the fp32 ones."""
    return {name.removeprefix("transformer."): value.to(dtype) for name, value in parameters.items()}
