"""Tuning runs on the screen: one as a live line on a terminal and plain lines elsewhere, many as a table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from softprompt.progress.console import Screen, drawing, figure, table, visible
from softprompt.progress.events import (
    BatchHalved,
    Event,
    Note,
    Saved,
    Started,
    Stepped,
    Stopped,
    Validated,
    loss_name,
)

PLAIN_EVERY_SECONDS = 5.0


class ShowProgress:
    """An `on_event` that shows progress; as a context manager it ends the live line with the run."""

    def __init__(self, console: Screen) -> None:
        self.console = console
        self.live = console.is_watched
        self.validated = ""
        self.judged = "held-out"
        self.saved: str | None = None
        self.last_plain = -math.inf
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24 if console.width >= 80 else 6),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not self.live,
        )
        self._bar_drawn = ExitStack()
        self.task = self.bar.add_task(self._short("loading", " the base and the data"), total=None)

    def __enter__(self) -> Self:
        self._bar_drawn.enter_context(drawing(self.bar))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar_drawn.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.judged = "held-out" if event.validation_examples else "training rows'"
                measuring = self._short("measuring", " the loss before the first step")
                self.bar.update(self.task, total=event.steps, description=measuring)
                self._line(_plan(event))
            case Stepped():
                pieces = _step(event)
                if self.validated:
                    pieces.insert(1, self.validated)
                text = "  ".join(pieces)
                self.bar.update(
                    self.task, completed=event.step, description=_fitting(pieces, self.console.width - 50)
                )
                now = time.monotonic()
                if not self.live and (
                    now - self.last_plain > PLAIN_EVERY_SECONDS or event.step == event.steps
                ):
                    self.last_plain = now
                    self._line(f"step {event.step}/{event.steps}  {text}")
            case Validated():
                self.validated = f"{self.judged} {event.nll:.3f}"
                if not self.live:
                    held_out = self.judged == "held-out"  # else the latest is kept, better or not
                    kept = ("  best so far, kept" if held_out else "  kept") if event.best else ""
                    self._line(f"step {event.step}  {self.judged} loss {event.nll:.4f}{kept}")
            case BatchHalved():
                self._line(
                    f"out of memory: from here on {event.batch_size} rows at a time, {event.accumulation} times a step"
                )
            case Saved():
                self.saved = event.path  # the command says so, and how to use it
            case Stopped():
                self._line(_end(event, "best" if self.judged == "held-out" else self.judged))
            case Note():
                self._line(event.text)

    def _short(self, text: str, more: str) -> str:
        return text + (more if self.console.width >= 80 else "")

    def _line(self, text: str) -> None:
        self.console.print(Text(visible(text)), soft_wrap=not self.console.is_terminal)


class ShowTable:
    """Runs side by side, a line each: how far it is, its best held-out loss, and whether it was stopped early.

    Several runs may share a line, which then shows the slowest run's step and their mean loss. Live on a terminal
    while `live` is entered; elsewhere `show` prints its present state. `ranked` is the table to keep at the end."""

    def __init__(self, console: Screen, title: str, lines: Sequence[str]) -> None:
        self.console, self.title, self.lines = console, title, lines
        self.steps: dict[tuple[int, str], tuple[int, int]] = {}
        self.best: dict[tuple[int, str], float] = {}
        self.gone: set[int] = set()
        self.rows_at_a_time = 0
        self.held_out = True  # until a run says that it has no rows to judge by
        self.live = Live(self._drawn(), console=console, refresh_per_second=4, transient=True)
        if not console.is_watched:
            self.live.auto_refresh = False

    def event(self, line: int, event: Event, run: str = "") -> None:
        """Records an event of a run of this line."""
        match event:
            case Started():
                self.steps[line, run] = (0, event.steps)
                self.held_out = self.held_out and event.validation_examples > 0
            case Stepped():
                self.steps[line, run] = (event.step, event.steps)
            case Validated() if event.best:
                self.best[line, run] = event.nll
            case BatchHalved() if event.batch_size != self.rows_at_a_time:  # every run reports it
                self.rows_at_a_time = event.batch_size
                self.console.print(f"out of memory: from here on {event.batch_size} rows at a time")
        if self.console.is_watched:
            self.live.update(self._drawn())

    def show(self) -> None:
        """Prints the table now, where it is not live."""
        if not self.console.is_watched:
            self.console.print(self._drawn())

    def ranked(self) -> RenderableType:
        """All lines, the lowest loss first, those without one last."""
        return self._drawn(sorted(range(len(self.lines)), key=self._rank))

    def _rank(self, number: int) -> tuple[bool, bool, float]:
        mean = self._mean(number)
        return math.isnan(mean), number in self.gone, mean

    def _mean(self, number: int) -> float:
        """The mean over a line's runs of their best losses; nan where none is known."""
        nlls = [nll for (line, _), nll in self.best.items() if line == number]
        return sum(nlls) / len(nlls) if nlls else math.nan

    def _drawn(self, order: Sequence[int] | None = None) -> RenderableType:
        rows = []
        for number in order if order is not None else range(len(self.lines)):
            steps = [progress for (line, _), progress in self.steps.items() if line == number]
            step, of = min(steps, default=(0, 0))
            gone = number in self.gone
            words = (
                self.lines[number],
                f"{step}/{of}",
                figure(self._mean(number)),
                "stopped early" if gone else "",
            )
            rows.append([Text(visible(word), "dim" if gone else "") for word in words])
        loss = f"{'best ' if self.held_out else ''}{loss_name(self.held_out)}"
        return table((self.title, "step", loss, ""), rows, width=self.console.width)


def _fitting(pieces: Sequence[str], width: int) -> str:
    """The leading pieces that fit: a figure is shown whole or not at all."""
    text = pieces[0]
    for piece in pieces[1:]:
        if len(text) + 2 + len(piece) > width:
            break
        text += f"  {piece}"
    return text


def _plan(event: Started) -> str:
    together = f" x {event.accumulation}" if event.accumulation > 1 else ""
    epochs = "1 epoch" if event.epochs == 1 else f"{event.epochs:g} epochs"
    return (
        f"{event.steps} steps ({epochs} of {event.examples} rows, {event.batch_size}{together} a step), "
        f"learning rate {event.learning_rate:.3g}, {event.trained_tokens:,} trained tokens an epoch, "
        f"{event.validation_examples} rows held out"
    )


def _step(event: Stepped) -> list[str]:
    """A step's figures, the most important first."""
    minutes, seconds = divmod(
        int(event.remaining_seconds) if math.isfinite(event.remaining_seconds) else 0, 60
    )
    return [
        f"loss {event.nll:.3f}",
        f"{minutes}:{seconds:02} left",
        f"lr {event.learning_rate:.2e}",
        f"{event.tokens_per_second:,.0f} tokens/s",
    ]


def _end(event: Stopped, judged: str) -> str:
    """The last line of a run; `judged` is the loss of the prompt that is kept: best, or training."""
    why = {
        "finished": "finished",
        "patience": "stopped: no better held-out loss for a while",
        "interrupted": "interrupted",
    }.get(event.reason, event.reason)
    kept = (
        f"; {judged} loss {event.best_nll:.4f} at step {event.best_step}"
        if event.best_nll == event.best_nll
        else ""
    )
    return f"{why} after {event.step} steps{kept}"
