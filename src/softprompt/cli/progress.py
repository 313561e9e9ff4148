"""A tuning run's events on the screen: a live line on a terminal, plain lines elsewhere; and many runs' in a table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from softprompt.cli.screen import figure
from softprompt.tuning.events import BatchHalved, Event, Said, Saved, Started, Stepped, Stopped, Validated

PLAIN_EVERY_SECONDS = 5.0


class ShowProgress:
    """Call it with each event; use it as a context so that the live line ends with the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.validated = ""
        self.judged = "held-out"
        self.saved: str | None = None
        self.last_plain = -math.inf
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("loading the base and the data", total=None)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.judged = "held-out" if event.validation_examples else "training rows'"
                self.bar.update(
                    self.task, total=event.steps, description="measuring the loss before the first step"
                )
                self._line(_plan(event))
            case Stepped():
                text = _step(event) + self.validated
                self.bar.update(self.task, completed=event.step, description=text)
                now = time.monotonic()
                if not self.live and (
                    now - self.last_plain > PLAIN_EVERY_SECONDS or event.step == event.steps
                ):
                    self.last_plain = now
                    self._line(f"step {event.step}/{event.steps}  {text}")
            case Validated():
                self.validated = f"  {self.judged} {event.nll:.3f}"
                if not self.live:
                    kept = "  best so far, kept" if event.best else ""
                    self._line(f"step {event.step}  {self.judged} loss {event.nll:.4f}{kept}")
            case BatchHalved():
                self._line(
                    f"out of memory: from here on {event.batch_size} rows at a time, {event.accumulation} times a step"
                )
            case Saved():
                self.saved = event.path  # the command says so, and how to use it
            case Stopped():
                self._line(_end(event))
            case Said():
                self._line(event.text)

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


class ShowTable:
    """Runs side by side, a line each: how far it is, its best held-out loss, and whether it is still going.

    Several runs may share a line, which then shows the slowest one's step and their mean loss. Live on a terminal
    while `live` is entered; elsewhere `show` prints it as it stands."""

    def __init__(self, console: Console, title: str, lines: Sequence[str]) -> None:
        self.console, self.title, self.lines = console, title, lines
        self.steps: dict[tuple[int, str], tuple[int, int]] = {}
        self.best: dict[tuple[int, str], float] = {}
        self.gone: set[int] = set()
        self.rows_at_a_time = 0
        self.live = Live(self._drawn(), console=console, refresh_per_second=4, transient=True)
        if not console.is_terminal:
            self.live.auto_refresh = False

    def event(self, line: int, event: Event, run: str = "") -> None:
        """Take note of what a run of a line tells."""
        match event:
            case Started():
                self.steps[line, run] = (0, event.steps)
            case Stepped():
                self.steps[line, run] = (event.step, event.steps)
            case Validated() if event.best:
                self.best[line, run] = event.nll
            case BatchHalved() if event.batch_size != self.rows_at_a_time:  # every run tells of it
                self.rows_at_a_time = event.batch_size
                self.console.print(
                    f"out of memory: from here on {event.batch_size} rows at a time", markup=False
                )
        if self.console.is_terminal:
            self.live.update(self._drawn())

    def show(self) -> None:
        """Print the table now, where it is not live."""
        if not self.console.is_terminal:
            self.console.print(self._drawn())

    def _drawn(self) -> Table:
        table = Table(
            self.title, "step", "best held-out loss", "", box=None, header_style="dim", pad_edge=False
        )
        for number, line in enumerate(self.lines):
            runs = [one for one in self.steps if one[0] == number]
            step, steps = min((self.steps[one] for one in runs), default=(0, 0))
            nlls = [self.best[one] for one in runs if one in self.best]
            mean = sum(nlls) / len(nlls) if nlls else math.nan
            gone = number in self.gone
            style = "dim" if gone else ""
            table.add_row(
                Text(line, style),
                Text(f"{step}/{steps}", style),
                Text(figure(mean), style),
                "let go" if gone else "",
            )
        return table


def _plan(event: Started) -> str:
    together = f" x {event.accumulation}" if event.accumulation > 1 else ""
    return (
        f"{event.steps} steps ({event.epochs:g} epochs of {event.examples} rows, {event.batch_size}{together} a step), "
        f"learning rate {event.learning_rate:.3g}, {event.trained_tokens:,} trained tokens an epoch, "
        f"{event.validation_examples} rows held out"
    )


def _step(event: Stepped) -> str:
    minutes, seconds = divmod(
        int(event.remaining_seconds) if math.isfinite(event.remaining_seconds) else 0, 60
    )
    return (
        f"loss {event.nll:.3f}  lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tokens/s  "
        f"{minutes}:{seconds:02} left"
    )


def _end(event: Stopped) -> str:
    why = {
        "finished": "finished",
        "patience": "stopped: no better held-out loss for a while",
        "interrupted": "interrupted",
    }.get(event.reason, event.reason)
    best = (
        f"; best loss {event.best_nll:.4f} at step {event.best_step}"
        if event.best_nll == event.best_nll
        else ""
    )
    return f"{why} after {event.step} steps{best}"
