"""Optimisers and schedules for a few vectors on a frozen base. No weight decay unless asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Optimiser = torch.optim.Optimizer

# A first AdamW step moves every number by about the rate. On the bundled draft and on Llama-like bases the best rates
# lay between 0.05 and 0.4 of the embedding table's root mean square.
RATE_PER_EMBEDDING_RMS = 0.3


def automatic_rate(embedding_VD: Tensor, optimizer: str) -> float:
    """The learning rate that suits a base's scale; 0.3 for Adafactor (Lester et al. 2021), whose step is relative."""
    if optimizer == "adafactor":
        return 0.3
    rms = embedding_VD[:5_000].float().square().mean().sqrt().item()
    return float(f"{RATE_PER_EMBEDDING_RMS * rms:.1e}")


def adamw(parameters: Sequence[Tensor], rate: float, weight_decay: float) -> Optimiser:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


def adafactor(parameters: Sequence[Tensor], rate: float, weight_decay: float) -> Optimiser:
    """Adafactor (Shazeer and Stern 2018), its step relative to the prompt's own scale."""
    return torch.optim.Adafactor(parameters, lr=rate, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], float, float], Optimiser]] = {
    "adamw": adamw,
    "adafactor": adafactor,
}


def linear(done: float) -> float:
    """Down to nothing at a steady pace; `done` is the share of the steps after the warm-up, 0 to 1."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Down to nothing along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def constant(done: float) -> float:
    """No decay, as in Lester et al. 2021."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The share of the full rate that step `step` (1 to `steps`) takes; rises over the first `warmup` of them."""
    warm = math.ceil(warmup * steps)
    if step <= warm:
        return step / (warm + 1)
    return SCHEDULES[schedule]((step - 1 - warm) / max(1, steps - warm))
