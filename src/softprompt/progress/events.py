"""Events of a tuning run: small frozen records, handed to `on_event` one by one.

Losses are in nats per trained token, times in seconds. A figure that is not known is nan, never 0. No torch here, so
that a progress bar, a log file or a tracker can read them without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import TypeAlias


@dataclass(frozen=True)
class Started:
    """The run's plan, settled: nothing in it is `auto` any more."""

    steps: int
    epochs: float
    batch_size: int
    accumulation: int
    learning_rate: float
    examples: int
    validation_examples: int
    trained_tokens: int
    prompt_values: int
    baseline_nll: float = nan
    """Loss of the untouched base on the validation examples, without any prompt."""


@dataclass(frozen=True)
class Stepped:
    """One optimiser step was taken."""

    step: int
    steps: int
    epoch: float
    nll: float
    learning_rate: float
    tokens_per_second: float
    remaining_seconds: float


def loss_name(held_out: bool) -> str:
    """The name of the losses that `Validated` tells: without held-out rows they are those of the training rows."""
    return "held-out loss" if held_out else "training loss"


@dataclass(frozen=True)
class Validated:
    """The held-out loss was measured, or without held-out rows that of the training rows; `best` says that this is the best so
    far, and that this prompt is kept.

    `score` is what the best is chosen by, where that is not the loss (`tune.select`)."""

    step: int
    nll: float
    best: bool
    score: float = nan


@dataclass(frozen=True)
class BatchHalved:
    """A batch did not fit into memory: from here on smaller ones are used, and more of them a step. Where prompts are
    learned side by side, these are batches of all their rows."""

    batch_size: int
    accumulation: int


@dataclass(frozen=True)
class Saved:
    """The prompt was written to disk."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Stopped:
    """The run is over; `reason` is one of finished, patience, dropped, interrupted, failed."""

    reason: str
    step: int
    best_step: int
    best_nll: float


@dataclass(frozen=True)
class Note:
    """One sentence for the user, such as why a dtype was chosen or how many texts were cut."""

    text: str


Event: TypeAlias = Started | Stepped | Validated | BatchHalved | Saved | Stopped | Note
