"""Counted work on the screen: a bar for one call, and a line for the job at work if there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from softprompt.progress.console import Screen, drawing, visible

Advance: TypeAlias = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


def is_wanted(progress: bool | None, console: Screen) -> bool:
    """Whether to show anything: as asked (True, False); with None where someone watches."""
    return console.is_watched if progress is None else progress


@contextmanager
def progress_bar(
    progress: bool | Advance | None, description: str, *, console: Screen | None = None
) -> Iterator[Advance]:
    """The function to call as work advances: the given one, else one that shows a bar, or none (see `is_wanted`)."""
    if callable(progress):
        yield progress
        return
    console = console or Screen(stderr=True)
    if not is_wanted(progress, console):
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    with drawing(bar):
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ShowJobs:
    """Jobs one after another, each with its own count of work: a live line for the job at work, plain lines elsewhere.

    Call it with a job's name, what it is doing, and how much of how much; use it as a context."""

    def __init__(self, console: Screen, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_watched,
        )
        self.task = self.bar.add_task("starting", total=None)
        self.last: dict[str, str] = {}
        self.drawn = drawing(self.bar)

    def __enter__(self) -> Self:
        self.drawn.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.drawn.__exit__(*raised)

    def __call__(self, name: str, what: str, done: int, of: int) -> None:
        count = f"{self.names.index(name) + 1}/{len(self.names)}"
        self.bar.update(self.task, description=f"{count} {name}: {what}", completed=done, total=of)
        if not self.console.is_watched and self.last.get(name) != what:
            self.last[name] = what
            self.console.print(Text(visible(f"{count}  {name}: {what}")), soft_wrap=True)
