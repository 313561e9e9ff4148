"""Input and output of every arm of a comparison: an assignment, and an arm that can answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.arm import ARMS
from softprompt.comparison.settings import Job
from softprompt.data.example import Splits
from softprompt.inference.compiled import CompiledPrompt
from softprompt.progress.events import Event
from softprompt.prompt.soft_prompt import Prompt
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import Task


@dataclass(frozen=True)
class Assignment:
    """The task that every arm gets: the base, the rows, and the job's settings."""

    lm: FrozenLM
    task: Task
    job: Job
    tell: Callable[[Event], None] = lambda event: None

    @property
    def recipe(self) -> Recipe:
        """The recipe with this arm's seed and folder."""
        tree = self.job.recipe.model_dump()
        tree["tune"]["seed"] = self.job.seed
        tree["out"] = str(self.job.folder / "prompt")
        return Recipe(**tree)

    @property
    def splits(self) -> Splits:
        """The rows to learn from and to choose by; those that are judged on were checked before any arm began."""
        return replace(self.task.splits, test=())

    @property
    def rate(self) -> float:
        """The learning rate of an arm that trains weights: the user's own, or the table's."""
        user_rates: Mapping[str, float] = {str(arm): rate for arm, rate in self.job.settings.rates.items()}
        return user_rates.get(self.job.arm, ARMS[self.job.arm].rate_at(self.lm.width))


@dataclass
class PreparedArm:
    """An arm that can answer: a model, the compiled prompt it reads, and what it took.

    `in_front` is what comes before text of any other task when the arm is on. `restore` returns the base's own
    model, switched off from the task; None if there is no such model any more.
    """

    lm: FrozenLM
    prompt: CompiledPrompt
    in_front: Prompt | str | None = None
    trained_parameters: int = 0
    stored_bytes: int = 0
    steps: int = 0
    best_step: int = 0
    learning_rate: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    restore: Callable[[], FrozenLM] | None = None
    about: dict[str, Any] = field(default_factory=dict)
