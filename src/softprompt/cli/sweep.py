"""`softprompt sweep`: many settings and seeds of one recipe side by side, the worse half stopped early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, figure, heading, line, screen
from softprompt.errors import RecipeError
from softprompt.progress.console import Screen, drawing
from softprompt.progress.runs import ShowTable
from softprompt.scale.cluster import workers_of
from softprompt.settings.cluster_settings import ClusterSettings
from softprompt.tuning.recipe import Recipe

if TYPE_CHECKING:
    from softprompt.tuning.sweep import SweepResult, Trial


EXAMPLE = "softprompt sweep my.yaml --grid tune.learning_rate=0.01,0.03,0.1 --seeds 2"


@takes(Recipe, ClusterSettings)
def command(
    recipe: Recipe,
    cluster: ClusterSettings,
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
        bool,
        typer.Option("--halving", help="Successive halving: stop the worse half early, again and again."),
    ] = False,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many prompts in one pass: 8, or on a cluster as few as give each worker some.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a sweep that was killed.")] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Learn under many settings in the same passes over the base; the best prompt is saved."""
    if not grid and not drawn:
        raise RecipeError(
            "Nothing is to be varied. Give --grid tune.learning_rate=0.01,0.03 or --random tune.learning_rate=0.001..1."
        )
    asked.demand_paths(recipe)
    for key, values in map(_split, grid or []):
        recipe.changed(
            [f"{key}={value}" for value in values.split(",")]
        )  # refuses what is no setting or no value
    from softprompt.tuning import sweep as sweeping

    settings = sweeping.grid({key: text.split(",") for key, text in map(_split, grid or [])})
    if drawn:
        random_settings = sweeping.drawn(dict(map(_split, drawn)), trials, recipe.tune.seed)
        settings = [(*chosen, *drawn_values) for chosen in settings for drawn_values in random_settings]
    settings = list(dict.fromkeys(settings))
    console = screen(as_json=as_json)
    table = ShowTable(console, "setting", [" ".join(setting) for setting in settings])

    def stretch(trials: Sequence[Trial]) -> None:
        table.gone = {_line(trial.name) for trial in trials if not trial.kept}
        for trial in trials:
            table.best[_line(trial.name), trial.name] = trial.nll
        table.show()

    try:
        with workers_of(cluster) as workers, drawing(table.live):
            swept = sweeping.sweep(
                recipe,
                settings,
                seeds=seeds,
                halving=halving,
                parallel=parallel,
                workers=workers,
                on_event=lambda trial, event: table.event(_line(trial), event, trial),
                on_stretch=stretch,
                progress=False,
                resume=resume,
            )
    except KeyboardInterrupt:
        line(console, asked.RESUME)
        raise
    heading(console, "all settings")
    console.print(table.ranked())
    _show(console, swept, seeds)
    if as_json:
        emit(swept.to_record())


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise RecipeError(f"found {text!r}, wanted KEY=VALUES such as tune.learning_rate=0.01,0.03.")
    return key.strip(), value


def _line(trial: str) -> int:
    """The number of a trial's setting, which its name begins with."""
    return int(trial[:3])


def _show(console: Screen, swept: SweepResult, seeds: int) -> None:
    heading(console, "result")
    error = f" ± {swept.nll_error:.4f} ({seeds} seeds)" if swept.nll_error == swept.nll_error else ""
    fact(console, "winner", " ".join(swept.setting))
    fact(console, swept.loss_name, f"{figure(swept.nll)}{error} nats per token")
    if swept.judged_on == "training":
        line(
            console,
            "Nothing was held out, so the winner is what fits its own training rows best. Set data.validation.",
        )
    fact(console, "prompt", swept.path)
    fact(console, "records", f"{swept.path}/sweep.jsonl")
