"""Optimisers and schedules for a few vectors on a frozen base. No weight decay unless asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Optimiser: TypeAlias = torch.optim.Optimizer
Parameters: TypeAlias = Sequence[Tensor] | Sequence[dict[str, Any]]
"""Tensors, or torch's parameter groups."""

# A step of either optimiser moves every number by about the rate. Seen on the bundled base, TinyStories-656K and in
# PEFT's notebooks: anything from 0.2 to 2 is nearly as good as the best, and 0.05 is clearly worse. See LOG.md.
RATE_PER_RMS = 0.5
RATE_PER_STATE_RMS = 0.25  # of keys and values: better than 0.5 in three of four comparisons (LOG.md)


def automatic_rate(values: Tensor, share: float = RATE_PER_RMS) -> float:
    """The learning rate that suits numbers of this scale: a share of their root mean square.

    For vectors it is that of embeddings, for keys and values that of the base's own after reading."""
    rms = values.detach().float().square().mean().sqrt().item()
    return float(f"{share * rms:.1e}")


def adamw(parameters: Parameters, rate: float, weight_decay: float) -> Optimiser:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018) as Lester et al. 2021 set it for prompts: the rate is absolute.

    Parameter scaling off, decay of the second moment 1 - step^-0.8, steps clipped to a root mean square of 1, and the
    second moment in full, since a prompt has fewer than 128 rows. Each step takes `weight_decay` of every value away,
    whatever the rate, as in T5X. torch.optim.Adafactor scales by the parameter and lowers the rate below 1/sqrt(step),
    so that a constant 0.3 means something else there. The published setting is learning_rate: 0.3, schedule: constant,
    warmup: 0, weight_decay: 1e-5, on T5, whose embeddings are tens of times larger than most."""

    def __init__(self, parameters: Parameters, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"], state["square"] = torch.tensor(0.0), torch.zeros_like(parameter)
                state["step"] += 1
                decay = 1.0 - float(state["step"]) ** -0.8
                state["square"].lerp_(parameter.grad.square() + 1e-30, 1.0 - decay)
                move = parameter.grad * state["square"].rsqrt()
                move /= move.square().mean().sqrt().clamp(min=1.0)
                parameter.mul_(1.0 - group["weight_decay"]).sub_(group["lr"] * move)


def adafactor(parameters: Parameters, rate: float, weight_decay: float) -> Optimiser:
    """Adafactor by Lester et al. 2021."""
    return Adafactor(parameters, rate, weight_decay)


OPTIMIZERS: dict[str, Callable[[Parameters, float, float], Optimiser]] = {
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
