"""Optimisers and schedules for a few vectors on a frozen base. No weight decay unless asked for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Optimiser: TypeAlias = torch.optim.Optimizer
Parameters: TypeAlias = Sequence[Tensor] | Sequence[dict[str, Any]]
"""Tensors, or torch's parameter groups."""

# A step of any of these optimisers moves every number by about the rate. How large a share of the root mean square of
# what is learned that may be, for vectors and for keys and values. A bound: what a step takes is measured (rate.py).
RATE_PER_RMS = {
    "muon": {"soft": 3.0, "deep": 0.25},
    "adamw": {"soft": 0.5, "deep": 0.25},
    "adafactor": {"soft": 0.5, "deep": 0.25},
}
FAINT = 1e-2  # of the largest singular value: what is below is scaled down, since rounding is down there
MOMENTUM = 0.7  # 0.95, as for training whole models, is too slow for a hundred steps (LOG.md)


def automatic_rate(values: Tensor, share: float) -> float:
    """The learning rate that suits numbers of this scale: a share of their root mean square.

    For vectors it is that of embeddings, for keys and values that of the base's own after reading."""
    rms = values.detach().float().square().mean().sqrt().item()
    return float(f"{share * rms:.1e}")


class OneByOne(torch.optim.Optimizer):
    """A rule that moves each parameter by its own gradient and state alone: `update`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a step with every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step of one parameter, in place; `state` is empty at its first."""
        raise NotImplementedError


class Muon(OneByOne):
    """Muon (Jordan et al. 2024), for prompts: a step goes equally far along every direction of the momentum.

    The gradients of a prompt's vectors have much in common, and AdamW moves all vectors along that (figures in LOG.md).
    Here the momentum (Nesterov's) gets singular values that are all alike, by an exact decomposition: prompts are small,
    and torch.optim.Muon's five products in bfloat16 only come near it. A step's root mean square is `lr`, about as
    AdamW's is. A group's `parts` are matrices that lie side by side in its parameters, such as the keys and the values of
    a deep prompt's heads: each is a matrix for itself. A vector is a matrix of one row. Decay is AdamW's. A deep prompt's many matrices are decomposed
    on `device`, wherever the parameters lie: a GPU takes them all at once."""

    device = torch.device("cpu")

    def __init__(self, parameters: Parameters, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "parts": 1})

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        even = state.pop("even", None)
        if even is None:
            even = self._even(self._ahead(parameter, gradient, state), group)
        # AdamW's decay: apart from the gradient, scaled by the rate.
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * even)

    def _ahead(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Nesterov: the momentum takes in this gradient, and the step looks one such update further ahead."""
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1.0 - MOMENTUM)
        ahead: Tensor = state["momentum"].lerp(gradient, 1.0 - MOMENTUM)
        return ahead

    def _even(self, ahead: Tensor, group: dict[str, Any]) -> Tensor:
        device = self.device if group["parts"] > 1 else ahead.device
        return orthogonalised(ahead.to(device), group["parts"]).to(ahead.device)


@torch.no_grad()
def prepare_steps(optimisers: Sequence[Optimiser]) -> None:
    """Makes ready what the coming step of each takes most time for, of matrices of one shape at once.

    A few small decompositions cost little more than one. Each optimiser's `step` must follow; it gives what it gives without
    this, to rounding."""
    muons = [optimiser for optimiser in optimisers if isinstance(optimiser, Muon)]
    if len(muons) < 2:
        return
    alike: dict[torch.Size, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
    for muon in muons:
        for group in muon.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim == 2 and group["parts"] == 1:
                    state = muon.state[parameter]
                    ahead = muon._ahead(parameter, parameter.grad, state)
                    alike[ahead.shape].append((ahead, state))
    for pairs in alike.values():
        side_by_side = orthogonalised(torch.cat([ahead for ahead, _ in pairs], 1), len(pairs))
        for even, (_, state) in zip(side_by_side.chunk(len(pairs), 1), pairs, strict=True):
            state["even"] = even


def orthogonalised(matrix: Tensor, parts: int = 1) -> Tensor:
    """`matrix` [N, M] with singular values that are all alike but for faint ones; a root mean square of 1 at full rank.

    With `parts`, that many matrices [N, M / parts] side by side, each for itself. A vector [M] counts as [1, M].
    Through the eigenvalues of matrix @ matrix.T in float64: they take less time than singular values, and GPUs decompose
    many small symmetric matrices at once, any others one by one. Their squares keep `FAINT` apart by far."""
    rows = 1 if matrix.ndim == 1 else len(matrix)
    apart = matrix.reshape(rows, parts, -1).transpose(0, 1).double()  # [parts, N, M / parts]
    is_wide = apart.shape[1] <= apart.shape[2]
    wide = apart if is_wide else apart.transpose(1, 2)
    # wide = left @ diag(sizes) @ right, so wide @ wide.T = left @ diag(sizes^2) @ left.T, in rising order. The sizes say
    # how much the gradients of all rows have in common.
    squares, left = torch.linalg.eigh(wide @ wide.transpose(1, 2))
    sizes = squares.clamp(min=0).sqrt()
    # Wanted is left @ diag(shares) @ right, of shares that are 1 for clear directions and fall to 0 for faint ones, which
    # are rounding and would be blown up to full size: size / hypot(size, FAINT * largest). And right is
    # diag(1 / sizes) @ left.T @ wide. The clamp keeps a matrix of zeros at zero.
    factors = 1.0 / torch.hypot(sizes, FAINT * sizes[:, -1:]).clamp(min=torch.finfo(sizes.dtype).tiny)
    even: Tensor = ((left * factors[:, None]) @ left.transpose(1, 2)) @ wide
    # A matrix [N, M] of min(N, M) singular values of 1 has a root mean square of 1/sqrt(max(N, M)): scaled to 1.
    even = max(apart.shape[1:]) ** 0.5 * (even if is_wide else even.transpose(1, 2))
    return even.transpose(0, 1).reshape(matrix.shape).to(matrix.dtype)


def muon(parameters: Parameters, rate: float, weight_decay: float) -> Optimiser:
    """Muon by Jordan et al. 2024."""
    return Muon(parameters, rate, weight_decay)


def adamw(parameters: Parameters, rate: float, weight_decay: float) -> Optimiser:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


class Adafactor(OneByOne):
    """Adafactor (Shazeer and Stern 2018) as Lester et al. 2021 set it for prompts: the rate is absolute.

    Parameter scaling off, decay of the second moment 1 - step^-0.8, steps clipped to a root mean square of 1, and the
    second moment in full, since a prompt has fewer than 128 rows. Each step takes `weight_decay` of every value away,
    whatever the rate, as in T5X. torch.optim.Adafactor scales by the parameter and lowers the rate below 1/sqrt(step),
    so that a constant 0.3 means something else there. The published setting is learning_rate: 0.3, schedule: constant,
    warmup: 0, weight_decay: 1e-5, on T5, whose embeddings are tens of times larger than most."""

    def __init__(self, parameters: Parameters, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["step"], state["square"] = torch.tensor(0.0), torch.zeros_like(parameter)
        state["step"] += 1
        # The mean of squares forgets slower as steps go by: the first step takes it from this gradient alone.
        decay = 1.0 - float(state["step"]) ** -0.8
        state["square"].lerp_(gradient.square() + 1e-30, 1.0 - decay)
        change = gradient * state["square"].rsqrt()
        # Clipped to a root mean square of 1: a gradient far above its own past moves no further than others.
        change /= change.square().mean().sqrt().clamp(min=1.0)
        parameter.mul_(1.0 - group["weight_decay"]).sub_(group["lr"] * change)


def adafactor(parameters: Parameters, rate: float, weight_decay: float) -> Optimiser:
    """Adafactor by Lester et al. 2021."""
    return Adafactor(parameters, rate, weight_decay)


OPTIMIZERS: dict[str, Callable[[Parameters, float, float], Optimiser]] = {
    "muon": muon,
    "adamw": adamw,
    "adafactor": adafactor,
}


def linear(done: float) -> float:
    """Linear decay to zero; `done` is the share of the steps after the warm-up, 0 to 1."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Decay to zero along half a cosine."""
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
