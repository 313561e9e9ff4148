"""`softprompt sweep`: many settings and seeds of one recipe side by side, the worse half let go on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.flags import takes_recipe
from softprompt.cli.screen import emit, fact, figure, heading, screen
from softprompt.errors import RecipeError
from softprompt.tune.events import BatchHalved, Event, Started, Stepped, Validated
from softprompt.tune.recipe import Recipe

if TYPE_CHECKING:
    from softprompt.tune.sweep import Trial


@takes_recipe
def command(
    recipe: Recipe,
    *,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="KEY=A,B,C",
            help="Every value of a setting; several --grid give all combinations.",
        ),
    ] = None,
    drawn: Annotated[
        list[str] | None,
        typer.Option(
            "--random",
            metavar="KEY=LOW..HIGH",
            help="A setting to draw at random, from a range or from A,B,C.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many random settings to draw.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each setting, from tune.seed on.")] = 1,
    halving: Annotated[
        bool, typer.Option("--halving", help="Successive halving: let the worse half go, again and again.")
    ] = False,
    abreast: Annotated[int, typer.Option(min=1, help="At most so many prompts in one pass.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was killed.")] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Learn under many settings in the same passes over the base; the best prompt is saved."""
    from softprompt.tune import sweep as sweeping

    if not grid and not drawn:
        raise RecipeError(
            "Nothing is to be varied. Give --grid tune.learning_rate=0.01,0.03 or --random tune.learning_rate=0.001..1."
        )
    settings = sweeping.grid({key: text.split(",") for key, text in map(_split, grid or [])})
    if drawn:
        random_ones = sweeping.drawn(dict(map(_split, drawn)), trials, recipe.tune.seed)
        settings = [(*one, *other) for one in settings for other in random_ones]
    settings = list(dict.fromkeys(settings))
    console = screen(as_json=as_json)
    table = _Table(console, [" ".join(setting) for setting in settings], seeds)
    with table.live:
        swept = sweeping.sweep(
            recipe,
            settings,
            seeds=seeds,
            halving=halving,
            abreast=abreast,
            on_event=table.event,
            on_stretch=table.stretch,
            resume=resume,
        )
    record = swept.record(recipe.out)
    _show(console, record, seeds)
    if as_json:
        emit(record)


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise RecipeError(f"found {text!r}, wanted KEY=VALUES such as tune.learning_rate=0.01,0.03.")
    return key.strip(), value


class _Table:
    """A line a setting: how far its seeds are, their best held-out loss, and whether it is still going."""

    def __init__(self, console: Console, settings: Sequence[str], seeds: int) -> None:
        self.console, self.settings, self.seeds = console, settings, seeds
        self.steps: dict[str, tuple[int, int]] = {}
        self.best: dict[str, float] = {}
        self.gone: set[int] = set()
        self.live = Live(self.drawn(), console=console, refresh_per_second=4, transient=True)
        if not console.is_terminal:
            self.live.auto_refresh = False

    def event(self, trial: str, event: Event) -> None:
        """Take note of what a trial tells."""
        match event:
            case Started():
                self.steps[trial] = (0, event.steps)
            case Stepped():
                self.steps[trial] = (event.step, event.steps)
            case Validated() if event.best:
                self.best[trial] = event.nll
            case BatchHalved():
                self.console.print(
                    f"out of memory: from here on {event.batch_size} rows at a time", markup=False
                )
        if self.console.is_terminal:
            self.live.update(self.drawn())

    def stretch(self, trials: Sequence[Trial]) -> None:
        """Take note of who goes on; on a screen that is no terminal, print the table now."""
        self.gone = {int(trial.name[:3]) for trial in trials if not trial.kept}
        for trial in trials:
            self.best[trial.name] = trial.nll
        if not self.console.is_terminal:
            self.console.print(self.drawn())

    def drawn(self) -> Table:
        table = Table(
            "setting", "step", "best held-out loss", "", box=None, header_style="dim", pad_edge=False
        )
        for number, setting in enumerate(self.settings):
            names = [name for name in self.steps if int(name[:3]) == number]
            step, steps = min((self.steps[name] for name in names), default=(0, 0))
            nlls = [self.best[name] for name in names if name in self.best]
            mean = sum(nlls) / len(nlls) if nlls else math.nan
            gone = number in self.gone
            style = "dim" if gone else ""
            table.add_row(
                Text(setting, style),
                Text(f"{step}/{steps}", style),
                Text(figure(mean), style),
                "let go" if gone else "",
            )
        return table


def _show(console: Console, record: dict[str, Any], seeds: int) -> None:
    heading(console, "result")
    error = (
        f" ± {record['nll_error']:.4f} ({seeds} seeds)" if record["nll_error"] == record["nll_error"] else ""
    )
    fact(console, "winner", " ".join(record["setting"]))
    fact(console, "held-out loss", f"{figure(record['nll'])}{error} nats per token")
    fact(console, "prompt", record["path"])
    fact(console, "records", f"{record['path']}/sweep.jsonl")
