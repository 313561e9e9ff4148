"""The forms in which a prompt is trained: whatever is trained, a call gives the plain prompt that it stands for.

Saving folds: only that plain prompt is kept, so inference knows nothing of forms.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

Plain: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Vectors [P, D], or keys and values [L, P, H, K] each."""


class Form(nn.Module):
    """What the optimiser moves (`parameters()`), and the plain prompt that it stands for now (a call; differentiable).

    All float32 on the CPU: a prompt is small, and only its plain value and its gradient travel to the base."""

    def forward(self) -> Plain:
        raise NotImplementedError


class Direct(Form):
    """The prompt itself is trained: vectors, or keys and values."""

    def __init__(self, start: Plain) -> None:
        super().__init__()
        tensors = (start,) if isinstance(start, Tensor) else start
        self.values = nn.ParameterList(tensor.detach().float().cpu().clone() for tensor in tensors)

    def forward(self) -> Plain:
        return self.values[0] if len(self.values) == 1 else (self.values[0], self.values[1])
