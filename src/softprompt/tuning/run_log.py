"""Recording and reporting of a run: events to its folder, to trackers and to the caller; time and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softprompt.progress.events import Event, Note
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.records import RunFolder
from softprompt.tuning.trackers import TRACKERS, Tracker, figures


class RunLog:
    """The run's log, called with each event. Counts the text tokens learned from, and seconds: of learning alone and of the run."""

    def __init__(self, recipe: Recipe, on_event: Callable[[Event], None]) -> None:
        self.recipe, self.on_event = recipe, on_event
        self.folder = RunFolder(Path(recipe.out), recipe)
        self.trackers: list[Tracker] = []
        self.tokens, self.seconds_learning = 0, 0.0
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self._step_began = self._began

    def begin(self, kept_bytes: int) -> None:
        """Opens the records, keeping the first `kept_bytes` of a run that is continued."""
        self.trackers = [TRACKERS[name](self.recipe) for name in self.recipe.tune.trackers]
        self.folder.begin(kept_bytes)

    def __call__(self, event: Event) -> None:
        """Records an event, and passes it on."""
        trouble = self.folder(event)
        if tracked := figures(event):
            for tracker in self.trackers:
                tracker.log(tracked[1], tracked[0])
        self.on_event(event)
        if trouble:
            self.on_event(Note(trouble))

    def note(self, text: str) -> None:
        """Records a sentence for the user."""
        self(Note(text))

    def step_begins(self) -> None:
        """Starts the clock of a step."""
        self._step_began = time.perf_counter()

    def count(self, tokens: int, seconds: float | None = None) -> float:
        """Counts a step's text tokens and its seconds (since `step_begins`, if not given). Tokens a second so far."""
        self.tokens += tokens
        self.seconds_learning += time.perf_counter() - self._step_began if seconds is None else seconds
        return self.tokens / self.seconds_learning

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, that before a kill included."""
        return self._seconds_before + time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that this log needs."""
        return {
            "tokens": self.tokens,
            "seconds_learning": self.seconds_learning,
            "seconds": self.seconds,
            "recorded_bytes": self.folder.recorded_bytes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the counts of a checkpoint."""
        self.tokens, self.seconds_learning = state["tokens"], state["seconds_learning"]
        self._seconds_before = state["seconds"]

    def close(self) -> None:
        """Closes the records."""
        self.folder.close()
        for tracker in self.trackers:
            tracker.close()
