"""The forms in which a prompt is trained: whatever is trained, a call gives the plain prompt.

Saving folds: only that plain prompt is kept, so that inference knows nothing of forms. Every form starts exactly at the
start that it is given, and sees a prompt as a matrix of one row a virtual token: vectors [P, D] as they are, keys and
values [L, P, H, K] with all that belongs to a token side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softprompt.prompt.soft_prompt import Plain


class Trained(NamedTuple):
    """A parameter, its share of the learning rate, and how many matrices it holds side by side (a deep prompt's keys and values
    of each head)."""

    parameter: nn.Parameter
    factor: float
    parts: int


class Form(nn.Module):
    """The tensors that the optimiser updates (`parameters()`), and the plain prompt they produce (a call; differentiable).

    All float32 on the CPU: a prompt is small, and only its plain value and its gradient travel to the base. A deep prompt
    keeps its start in the layers below `first_layer`. `lowest_share` is that of a measured rate below which no step goes: 1, or less
    where the tokens start nearly alike, so that the first slope is mostly one direction that all of them share, and the rate that
    suits it is soon too high for what sets them apart."""

    start_PW: Tensor
    first_layer: int = 0
    lowest_share: float = 1.0

    def __init__(self, start: Plain) -> None:
        super().__init__()
        self.deep_shape = tuple(start[0].shape) if len(start) == 2 else None
        self.register_buffer("start_PW", as_rows(start))

    def rows(self) -> Tensor:
        """The prompt as a matrix [P, W]."""
        raise NotImplementedError

    def forward(self) -> Plain:
        plain = as_plain(self.rows(), self.deep_shape)
        if not self.first_layer:
            return plain
        below = as_plain(self.start_PW, self.deep_shape)
        return tuple(
            torch.cat([start[: self.first_layer], learned[self.first_layer :]])
            for start, learned in zip(below, plain, strict=True)
        )

    @property
    def trained_values(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def trained(self) -> list[Trained]:
        """All that the optimiser moves, with shares of the rate by which the prompt moves about as fast as in `Direct`."""
        width = self.start_PW.shape[1]
        # Keys and values are matrices of their own: together, the one of steeper slopes would leave the other little of a step.
        matrices = 2 * self.deep_shape[0] * self.deep_shape[2] if self.deep_shape else 1
        return [
            Trained(parameter, factor, matrices if parameter.ndim == 2 and parameter.shape[1] == width else 1)
            for parameter, factor in self._rate_factors()
        ]

    def _rate_factors(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter, and its share of the learning rate."""
        return [(parameter, 1.0) for parameter in self.parameters()]


class Direct(Form):
    """The prompt itself is trained (Lester et al. 2021)."""

    def __init__(self, start: Plain) -> None:
        super().__init__(start)
        self.value_PW = nn.Parameter(self.start_PW.clone())

    def rows(self) -> Tensor:
        return self.value_PW

    @property
    def trained_values(self) -> int:
        layers = self.deep_shape[0] if self.deep_shape else 1
        return self.value_PW.numel() * (layers - self.first_layer) // layers


class Residual(Form):
    """The vectors, plus what one small network makes of each: down to `width`, ReLU, up, layer norm.

    Razdaibiedina et al. 2023, section 3. The norm's gain starts at 0 here, so that the start is kept."""

    def __init__(self, start: Plain, width: int, generator: torch.Generator) -> None:
        super().__init__(start)
        W = self.start_PW.shape[1]
        self.value_PW = nn.Parameter(self.start_PW.clone())
        self.down, self.up = _linear(W, width, generator), _linear(width, W, generator)
        self.norm = nn.LayerNorm(W)
        nn.init.zeros_(self.norm.weight)

    def rows(self) -> Tensor:
        change_PW: Tensor = self.norm(self.up(torch.relu(self.down(self.value_PW))))
        return self.value_PW + change_PW

    def _rate_factors(self) -> list[tuple[nn.Parameter, float]]:
        whole = [(parameter, 1.0) for parameter in (self.value_PW, self.norm.weight, self.norm.bias)]
        with torch.no_grad():
            inner = _share(torch.relu(self.down(self.value_PW)))
        return whole + [(weight, inner) for layer in (self.down, self.up) for weight in layer.parameters()]


class Network(Form):
    """P-tuning's prompt encoder: trained vectors through a network, whose change since the start moves the prompt.

    Liu et al. 2021 ("GPT understands, too"); `inner` maps [P, W] to the last layer's input."""

    first_PW: Tensor

    def __init__(self, start: Plain, inner: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__(start)
        self.value_PW = nn.Parameter(torch.randn(self.start_PW.shape, generator=generator))
        self.inner, self.last = inner, _linear(width, self.start_PW.shape[1], generator)
        # With gradients on, as in `rows`: without them torch computes an LSTM in another order and rounds differently.
        self.register_buffer("first_PW", self.last(self.inner(self.value_PW)).detach())

    def rows(self) -> Tensor:
        moved_PW: Tensor = self.last(self.inner(self.value_PW)) - self.first_PW
        return self.start_PW + moved_PW

    def _rate_factors(self) -> list[tuple[nn.Parameter, float]]:
        with torch.no_grad():
            share = _share(self.inner(self.value_PW))
        return [(weight, 1.0 if weight is self.value_PW else share) for weight in self.parameters()]


class LowRank(Form):
    """The start plus a product of two thin matrices, [P, rank] and [rank, W] (Xiao et al. 2023)."""

    def __init__(self, start: Plain, width: int, generator: torch.Generator) -> None:
        super().__init__(start)
        P, W = self.start_PW.shape
        self.left_Pr = nn.Parameter(torch.randn(P, width, generator=generator) / width**0.5)
        self.right_rW = nn.Parameter(torch.zeros(width, W))

    def rows(self) -> Tensor:
        return self.start_PW + self.left_Pr @ self.right_rW


class Superposition(Form):
    """The start plus a weighted sum of `table_mW`, the same sampled embeddings for all tokens; the weights are trained.

    Sadraei Javaheri et al. 2024 (SuperPos-Prompt)."""

    table_mW: Tensor

    def __init__(self, start: Plain, table_mW: Tensor) -> None:
        super().__init__(start)
        table_mW = table_mW.detach().float().cpu()
        scale = table_mW.square().mean().sqrt() * len(table_mW) ** 0.5
        self.register_buffer("table_mW", table_mW / scale)
        self.weights_Pm = nn.Parameter(torch.zeros(len(self.start_PW), len(table_mW)))

    def rows(self) -> Tensor:
        return self.start_PW + self.weights_Pm @ self.table_mW


class SharedTimesLowRank(Form):
    """A prompt shared by tasks, times a low-rank part of each task's own: shared * (columns @ rows).

    Wang et al. 2023 (multitask prompt tuning), the form of PEFT's MULTITASK_PROMPT_TUNING. `of_tasks` gives the forms
    of several tasks that hold one and the same shared part: the first one's optimiser moves it, along the sum of all
    gradients."""

    def __init__(self, start: Plain, width: int, generator: torch.Generator) -> None:
        super().__init__(start)
        P, W = self.start_PW.shape
        self.shared_PW = nn.Parameter(self.start_PW.clone())
        # The product is 1 everywhere at the start: the first of the columns and of the rows, the others add nothing.
        left_Pr = torch.randn(P, width, generator=generator) * 0.1
        left_Pr[:, 0] = 1.0
        right_rW = torch.zeros(width, W)
        right_rW[0] = 1.0
        self.left_Pr, self.right_rW = nn.Parameter(left_Pr), nn.Parameter(right_rW)
        self.moves_shared = True

    @classmethod
    def of_tasks(
        cls, start: Plain, tasks: int, width: int, generator: torch.Generator
    ) -> list[SharedTimesLowRank]:
        """One form a task."""
        forms = [cls(start, width, generator) for _ in range(tasks)]
        for form in forms[1:]:
            form.shared_PW, form.moves_shared = forms[0].shared_PW, False
        return forms

    def rows(self) -> Tensor:
        return self.shared_PW * (self.left_Pr @ self.right_rW)

    def _rate_factors(self) -> list[tuple[nn.Parameter, float]]:
        scale = max(float(self.start_PW.square().mean().sqrt()), 1e-8)
        # A factor's change moves the prompt by as much times the prompt's own scale.
        own = [(self.left_Pr, 0.5 / scale), (self.right_rW, 0.5 / scale)]
        return [(self.shared_PW, 1.0), *own] if self.moves_shared else own


class _Mlp(nn.Module):
    def __init__(self, W: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = _linear(W, width, generator), _linear(width, width, generator)

    def forward(self, value_PW: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(value_PW))))


class _Lstm(nn.Module):
    def __init__(self, W: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.lstm = nn.LSTM(W, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        for parameter in self.lstm.parameters():
            _uniform(parameter, width // 2, generator)
        self.second = _linear(width, width, generator)

    def forward(self, value_PW: Tensor) -> Tensor:
        states_PH, _ = self.lstm(value_PW)
        return torch.relu(self.second(states_PH))


def direct(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """The values themselves."""
    return Direct(start)


def residual(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is the network's bottleneck: 400 in the paper, at most a row's own width here."""
    return Residual(start, width or min(400, as_rows(start).shape[1]), generator)


def mlp(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is that of the hidden layers; as wide as a row, at most 512, if not given."""
    W = as_rows(start).shape[1]
    width = width or min(512, W)
    return Network(start, _Mlp(W, width, generator), width, generator)


def lstm(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is both directions together; as wide as a row, at most 512, if not given."""
    W = as_rows(start).shape[1]
    width = max(2, (width or min(512, W)) // 2 * 2)
    return Network(start, _Lstm(W, width, generator), width, generator)


def low_rank(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is the rank, 10 if not given (Xiao et al. 2023)."""
    return LowRank(start, width or 10, generator)


def superposition(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is how many of the table's rows are added up, 128 if not given."""
    return Superposition(start, table_mW[: width or 128])


def multitask(start: Plain, table_mW: Tensor, width: int | None, generator: torch.Generator) -> Form:
    """`width` is the rank of the task's own part, 1 if not given (Wang et al. 2023)."""
    return SharedTimesLowRank(start, width or 1, generator)


FORMS: Mapping[str, Callable[[Plain, Tensor, int | None, torch.Generator], Form]] = {
    form.__name__: form for form in (direct, residual, mlp, lstm, low_rank, superposition, multitask)
}
"""Each by the recipe's name. The table holds sampled rows as wide as a prompt's."""


def as_rows(plain: Plain) -> Tensor:
    """A plain prompt as a matrix of one row a virtual token, float32 on the CPU."""
    if len(plain) == 1:
        return plain[0].detach().float().cpu().clone()
    both_LPHX = torch.cat([tensor.detach().float().cpu() for tensor in plain], -1)
    return both_LPHX.transpose(0, 1).flatten(1).clone()


def as_plain(rows_PW: Tensor, deep_shape: tuple[int, ...] | None) -> Plain:
    """The inverse of `as_rows`; `deep_shape` is [L, P, H, K] of the keys for a deep prompt."""
    if deep_shape is None:
        return (rows_PW,)
    layers, length, heads, width = deep_shape
    both_LPHX = rows_PW.view(length, layers, heads, -1).transpose(0, 1)
    return both_LPHX[..., :width], both_LPHX[..., width:]


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    for parameter in layer.parameters():
        _uniform(parameter, inputs, generator)
    return layer


def _uniform(parameter: Tensor, inputs: int, generator: torch.Generator) -> None:
    """torch's own start of such layers, drawn from our generator."""
    bound = inputs**-0.5
    with torch.no_grad():
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


def _share(inner_PH: Tensor) -> float:
    """A step changes each weight by about the rate, so an output by the rate times the sum of its inputs."""
    return 1.0 / max(1.0, float(inner_PH.abs().sum(-1).mean()))
