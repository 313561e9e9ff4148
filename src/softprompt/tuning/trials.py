"""Trials of a sweep while they learn: all in this process, or in groups on a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from softprompt.base.from_settings import kept_base
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.workers import Tell, Workers
from softprompt.data.example import Splits
from softprompt.errors import SoftPromptError
from softprompt.loss.gradient import Loss
from softprompt.progress.events import Event
from softprompt.tuning.checkpoint import Checkpoints
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import settled_batch_size
from softprompt.tuning.together import Together


@dataclass(frozen=True)
class Figures:
    """How far a trial has come, and how good it is."""

    step: int
    nll_start: float
    nll: float
    best_step: int


class Trials(Protocol):
    """Trials while they learn. Each is known by its position; `failed` ones take part no more."""

    failed: dict[int, SoftPromptError]

    def advance(self, share: float, groups: Sequence[Sequence[int]]) -> dict[int, Figures]:
        """Takes every group to `share` of its steps in passes of its own, and writes checkpoints."""
        ...

    def drop(self, positions: Sequence[int]) -> None:
        """Ends trials early; their best prompts so far are saved."""
        ...

    def save(self) -> None:
        """Saves the trials that are left."""
        ...

    def close(self) -> None:
        """Closes all records."""
        ...


class InMemory:
    """All trials in this process, which stay in memory from stretch to stretch."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        lm: FrozenLM | None,
        splits: Splits | None,
        loss: Loss | None,
        tell: Callable[[int, Event], None],
        resume: bool,
    ) -> None:
        self.together = Together(recipes, lm=lm, splits=splits, loss=loss, on_event=tell, resume=resume)
        self.failed = self.together.failed

    def advance(self, share: float, groups: Sequence[Sequence[int]]) -> dict[int, Figures]:
        """Takes one group after the other to `share` of its steps."""
        figures: dict[int, Figures] = {}
        for group in groups:
            figures |= _advanced(self.together, share, group)
        self.together.checkpoint()
        return figures

    def drop(self, positions: Sequence[int]) -> None:
        """Ends trials early."""
        for position in positions:
            self.together.drop(position)

    def save(self) -> None:
        """Saves the trials that are left."""
        self.together.save()

    def close(self) -> None:
        """Closes all records."""
        self.together.close()


@dataclass(frozen=True)
class _Group:
    """Trials that share passes, as a worker is given them: to be taken to `share` of their steps, or dropped (None).

    `rows` is the bound on rows in a pass that all trials have together."""

    recipes: tuple[Recipe, ...]
    share: float | None
    rows: int
    splits: Splits | None


class Spread:
    """Trials on a cluster. Between stretches they are their checkpoints, so any worker can take any of them."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        splits: Splits | None,
        workers: Workers,
        tell: Callable[[int, Event], None],
        out: Path,
        resume: bool,
    ) -> None:
        self.recipes, self.splits, self.workers, self.tell, self.out = recipes, splits, workers, tell, out
        self.rows = sum(map(settled_batch_size, recipes))
        self.failed: dict[int, SoftPromptError] = {}
        if not resume:  # a group always continues from what it finds, also when it is done again after a loss
            for recipe in recipes:
                _checkpoints(recipe).clear()

    def advance(self, share: float, groups: Sequence[Sequence[int]]) -> dict[int, Figures]:
        """Takes all groups to `share` of their steps, each on some worker."""
        figures: dict[int, Figures] = {}
        for group, (measured, failed) in zip(groups, self._map(share, groups), strict=True):
            figures |= {group[number]: each for number, each in measured.items()}
            self.failed |= {group[number]: error for number, error in failed.items()}
        return figures

    def drop(self, positions: Sequence[int]) -> None:
        """Ends trials early, all of them on one worker."""
        for _ in self._map(None, [positions] if positions else []):
            pass

    def _map(self, share: float | None, groups: Sequence[Sequence[int]]) -> Iterator[_Outcome]:
        parts = [
            _Group(tuple(self.recipes[position] for position in group), share, self.rows, self.splits)
            for group in groups
        ]

        def tell(part: int, event: tuple[int, Event]) -> None:
            self.tell(groups[part][event[0]], event[1])

        return self.workers.map(_continued, parts, tell, folder=self.out)

    def save(self) -> None:
        """Nothing is left to do: the workers saved what came to its end."""

    def close(self) -> None:
        """Nothing is open here."""


_Outcome: TypeAlias = tuple[dict[int, Figures], dict[int, SoftPromptError]]


def _continued(group: _Group, tell: Tell) -> _Outcome:
    """Takes a group one stretch further from its checkpoints, and leaves new ones; at its end it is saved."""
    recipes = group.recipes
    numbers = range(len(recipes))
    together = Together(
        recipes,
        lm=kept_base(recipes[0]),
        splits=group.splits,
        on_event=lambda number, event: tell((number, event)),
        resume=any(_checkpoints(recipe).newest() is not None for recipe in recipes),
        rows=group.rows,
    )
    try:
        if group.share is None:
            for number in numbers:
                together.drop(number)
            return {}, {}
        figures = _advanced(together, group.share, numbers)
        together.checkpoint()
        if group.share < 1:
            together.save_failed()
        else:
            together.save()
        return figures, together.failed
    finally:
        together.close()


def _checkpoints(recipe: Recipe) -> Checkpoints:
    return Checkpoints(Path(recipe.out), recipe.tune, lambda text: None)


def _advanced(together: Together, share: float, group: Sequence[int]) -> dict[int, Figures]:
    """Takes a group to `share` of its steps, and measures it: a stretch may end between two validations."""
    together.advance(share, group)
    now = together.losses(group) if share < 1 else {}
    figures = {}
    for number in group:
        learner = together.runs[number].learner
        nll = math.nan if number in together.failed else min(learner.nll_best, now.get(number, math.inf))
        figures[number] = Figures(learner.steps_done, learner.nll_start, nll, learner.best_step)
    return figures
