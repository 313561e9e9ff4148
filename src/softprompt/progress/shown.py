"""Progress for callers from Python: shown in a terminal or a notebook, silent elsewhere, off with `progress=False`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from softprompt.progress.bar import ShowJobs, is_wanted
from softprompt.progress.console import Screen, drawing
from softprompt.progress.events import Event
from softprompt.progress.runs import ShowProgress, ShowTable

OnEvent = Callable[[Event], None]
OnRunEvent = Callable[[str, Event], None]
OnJob = Callable[[str, str, int, int], None]
"""Called with a job's name, what it is doing, and how much of how much."""


@contextlib.contextmanager
def shown(
    on_event: OnEvent | None = None, progress: bool | None = None, *, console: Screen | None = None
) -> Iterator[OnEvent]:
    """Gives an `on_event` for one run that shows each event, and hands it to the caller's own.

    with shown(on_event, progress) as show:
        tune(recipe, on_event=show)
    """
    console = console or Screen(stderr=True)
    own = on_event or (lambda event: None)
    if not is_wanted(progress, console):
        yield own
        return
    with ShowProgress(console) as show:

        def both(event: Event) -> None:
            show(event)
            own(event)

        yield both


@contextlib.contextmanager
def shown_runs(
    names: Sequence[str],
    on_event: OnRunEvent | None = None,
    progress: bool | None = None,
    *,
    console: Screen | None = None,
) -> Iterator[OnRunEvent]:
    """The same for runs side by side, such as a sweep's: a line for each name, events by the name of their run."""
    console = console or Screen(stderr=True)
    own = on_event or (lambda name, event: None)
    if not is_wanted(progress, console):
        yield own
        return
    table = ShowTable(console, "run", names)

    def both(name: str, event: Event) -> None:
        if name in names:
            table.event(names.index(name), event)
        own(name, event)

    with drawing(table.live):
        yield both


@contextlib.contextmanager
def shown_jobs(
    names: Sequence[str],
    on_job: OnJob = lambda name, what, done, of: None,
    progress: bool | None = None,
    *,
    console: Screen | None = None,
) -> Iterator[OnJob]:
    """The same for jobs one after another, such as a comparison's arms."""
    console = console or Screen(stderr=True)
    if not is_wanted(progress, console):
        yield on_job
        return
    with ShowJobs(console, names) as show:

        def both(name: str, what: str, done: int, of: int) -> None:
            show(name, what, done, of)
            on_job(name, what, done, of)

        yield both
