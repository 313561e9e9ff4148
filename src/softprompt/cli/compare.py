"""`softprompt compare`: prompt tuning against fine-tuning and prompt engineering, on the user's own task."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, heading, screen, size
from softprompt.comparison.settings import ARM_NAMES, Job, Settings
from softprompt.errors import RecipeError
from softprompt.evaluation.evaluate import demand, read_gates
from softprompt.evaluation.metric import Estimate
from softprompt.report.figures import difference, estimate
from softprompt.report.verdict import verdict
from softprompt.tuning.recipe import Recipe

EXAMPLE = "softprompt compare my.yaml --arms base,few-shot,soft --seeds 3"


@takes(Recipe)
def command(
    recipe: Recipe,
    *,
    arms: Annotated[str, typer.Option(help=f"Some of {', '.join(ARM_NAMES)}.")] = "base,few-shot,soft",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every arm that a seed changes.")] = 1,
    text: Annotated[
        str | None, typer.Option(help="The arm prompt: your own text in front of every input.")
    ] = None,
    text_file: Annotated[Path | None, typer.Option(help="The same from a file.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="The arm few-shot: examples in front.")] = 4,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="The first one judges; may be repeated.", show_default="what suits the data"),
    ] = None,
    answers: Annotated[
        Literal["generate", "rank"],
        typer.Option(help="generate: over the whole vocabulary. rank: the likeliest of the labels."),
    ] = "generate",
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Divide each label's probability by what it has without input."),
    ] = False,
    judge_rows: Annotated[
        int | None, typer.Option(min=1, help="Judge on the first N test rows alone.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Learn for about this long in place of the recipe's steps, each arm at its own pace."
        ),
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(metavar="ARM=RATE", help="An arm's learning rate; may be repeated.")
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(help="Held-out general text, to measure forgetting.", show_default="a bundled one"),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", help="Run all arms in this process: quicker to start, memory is not honest."
        ),
    ] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=LIMIT", help="Exit with 100 if the best arm's figure is worse."),
    ] = None,
    as_json: asked.AsJson = False,
) -> None:
    """Compare a soft prompt with other prompts, LoRA and full fine-tuning, in one report."""
    gates = read_gates(fail_under or [])
    settings = Settings(
        recipe=recipe,
        arms=tuple(one.strip() for one in arms.split(",") if one.strip()),
        seeds=seeds,
        metrics=tuple(metric or ()),
        text=_text(text, text_file),
        shots=shots,
        limit=judge_rows,
        answers=answers,
        calibrated=calibrate,
        seconds=seconds,
        rates=_rates(rate or []),
        general_text=None if general is None else str(general),
    )
    for one, _ in gates:
        if settings.metrics and one.name not in settings.metrics:
            raise RecipeError(f"--fail-under {one.name}: it is not measured. Add --metric {one.name}.")
    console = screen(as_json=as_json)
    out = Path(recipe.out)

    from softprompt.comparison.compare import compare
    from softprompt.report.render import write_reports

    with _Shown(console, settings) as shown:
        record = compare(
            settings,
            out,
            own_process=not in_process,
            tell=shown,
            command=f"softprompt {shlex.join(sys.argv[1:])}" if sys.argv[1:] else "",
        )
    written = write_reports([out], out)
    show(console, record)
    fact(console, "report", written[0])
    if as_json:
        emit(record)
    best = record["summary"]["arms"][record["summary"]["best"]]["metrics"]
    known = {name: Estimate(one["value"], one["stderr"], one["n"]) for name, one in best.items()}
    for one, _ in gates:
        if one.name not in known:
            raise RecipeError(
                f"--fail-under {one.name}: only {', '.join(known)} were measured. Add --metric {one.name}."
            )
    demand(gates, known)


def show(console: Console, record: dict[str, Any]) -> None:
    """The central table in short, and the verdict."""
    summary = record["summary"]
    heading(console, f"{summary['judged_by']} on {record['data']['source']}, {record['data']['judged_on']}")
    table = Table(
        "arm", summary["judged_by"], "difference to the best", "a task takes", "learned in", box=None
    )
    for arm, one in summary["arms"].items():
        table.add_row(
            arm,
            estimate(one["metrics"][summary["judged_by"]]),
            "best" if arm == summary["best"] else difference(one["against_best"]),
            size(one["stored_bytes"]),
            f"{one['learning_seconds']:.1f} s" if one["trained_parameters"] else "",
        )
    console.print(table)
    for arm, reason in record["failed"].items():
        console.print(f"{arm} failed: {reason}", markup=False, soft_wrap=True)
    console.print()
    console.print(verdict(record), markup=False, soft_wrap=True)
    console.print()


def _text(text: str | None, path: Path | None) -> str | None:
    if text is not None and path is not None:
        raise RecipeError("--text and --text-file are both given. Keep one.")
    if path is None:
        return text
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--text-file {path}: cannot be read ({error}). Give a UTF-8 text file.") from None


def _rates(given: list[str]) -> dict[str, float]:
    rates = {}
    for one in given:
        arm, equals, rate = one.partition("=")
        try:
            rates[arm.strip()] = float(rate)
        except ValueError:
            equals = ""
        if not equals or not rates[arm.strip()] > 0:
            raise RecipeError(f"--rate {one}: wanted ARM=RATE such as lora=1e-3.")
    return rates


class _Shown:
    """The comparison's progress: a live line for the arm at work, plain lines elsewhere."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None)
        self.runs = [f"{arm}-{seed}" for arm in settings.arms for seed in settings.seeds_of(arm)]
        self.last = ""

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, job: Job, what: str, done: int, of: int) -> None:
        name = job.folder.name
        place = self.runs.index(name) + 1
        self.bar.update(
            self.task, description=f"{place}/{len(self.runs)} {name}: {what}", completed=done, total=of
        )
        if not self.console.is_terminal and (now := f"{name}: {what}") != self.last:
            self.last = now
            self.console.print(f"{place}/{len(self.runs)}  {now}", markup=False)
