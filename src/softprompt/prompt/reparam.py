"""The forms in which a prompt is trained: whatever is trained, a call gives the plain prompt it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Plain = Tensor | tuple[Tensor, Tensor]
"""Vectors [P, D], or keys and values [L, P, H, K] each."""


class Form(Protocol):
    """What the optimiser moves (`parameters`), and the prompt that it stands for now (a call; differentiable)."""

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def __call__(self) -> Plain: ...


class Direct:
    """The prompt itself is trained: vectors, or keys and values."""

    def __init__(self, start: Plain) -> None:
        tensors = (start,) if isinstance(start, Tensor) else start
        self.parameters = [tensor.detach().float().clone().requires_grad_() for tensor in tensors]

    def __call__(self) -> Plain:
        if len(self.parameters) == 1:
            return self.parameters[0]
        keys_LPHK, values_LPHK = self.parameters
        return keys_LPHK, values_LPHK
