"""`softprompt evaluate`: figures with their errors for the base, a text or a learned prompt; every row kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, heading, line, screen, table
from softprompt.errors import RecipeError
from softprompt.evaluation.evaluate import demand, read_gates
from softprompt.evaluation.settings import JudgedRows, JudgeSettings
from softprompt.progress.console import Screen
from softprompt.scale.cluster import workers_of
from softprompt.settings.base_settings import BaseSettings
from softprompt.settings.cluster_settings import ClusterSettings

if TYPE_CHECKING:
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.metric import Confusion

EXAMPLE = "softprompt evaluate --prompt runs/mine --out runs/judged"
MOST_LABELS = 12  # a confusion table of more is not readable in a terminal


@takes(BaseSettings, JudgedRows, JudgeSettings, ClusterSettings)
def command(
    base: BaseSettings,
    rows: JudgedRows,
    settings: JudgeSettings,
    cluster: ClusterSettings,
    *,
    prompt_folder: Annotated[
        Path | None, typer.Option("--prompt", help="The learned prompt's folder.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="An engineered prompt instead: a text in front of every input.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Keep every row here; run again to continue after an interruption.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=LIMIT", help="Exit with 100 if a figure is worse.")
    ] = None,
    resume: asked.ContinuesByItself = False,
    as_json: asked.AsJson = False,
) -> None:
    """Measure the base, a text or a learned prompt on held-out rows."""
    gates = read_gates(fail_under or [])
    if prompt_folder is not None and text is not None:
        raise RecipeError(
            "--prompt and --text are both given. Judge one at a time; `softprompt compare` takes both."
        )
    if resume and out is None:
        raise RecipeError(
            "--resume: there is nothing to continue, since rows are kept only with --out FOLDER."
        )
    asked.demand_folders([] if prompt_folder is None else [prompt_folder])
    from softprompt.evaluation.judge import evaluate, with_recorded_hardware
    from softprompt.inference.compiled import TextPrompt
    from softprompt.store.artifact import load_prompt

    prompts = [] if prompt_folder is None else [load_prompt(prompt_folder)]
    if rows.data.source is None:
        asked.demand_local_data(*prompts)
    console = screen(as_json=as_json)
    try:
        with workers_of(cluster) as workers:
            evaluation = evaluate(
                prompt_folder if text is None else TextPrompt(text),
                base=asked.load_base(with_recorded_hardware(base, *prompts), *prompts),
                settings=settings,
                reading=rows.data,
                extra_metrics=[metric.name for metric, _ in gates],
                out=out,
                workers=workers,
                progress=False if console.quiet else None,
            )
    except KeyboardInterrupt:
        if out is None:
            line(console, "Nothing is kept. With --out FOLDER, an interrupted evaluation can continue.")
        else:
            line(console, f"{asked.RESUME} Rows that were judged are kept in {out}.")
        raise
    about = evaluation.about
    show(console, evaluation, f"{evaluation.name} on {about['data']['source']}, {about['data']['split']}")
    if out is not None:
        fact(console, "rows", Path(out) / "rows.jsonl")
    if as_json:
        record = evaluation.to_record()
        del record["about"]
        emit({**record, **{key: about[key] for key in ("name", "template", "data", "answers")}})
    demand(gates, evaluation.estimates)


def show(console: Screen, evaluation: Evaluation, title: str) -> None:
    """The figures, and the confusion table where it is small enough to read."""
    from softprompt.evaluation.metric import METRICS

    heading(console, title)
    for name, figure in evaluation.estimates.items():
        metric = METRICS[name]
        said = f"{figure} {metric.unit}".rstrip()
        if figure.stderr == 0 and math.isfinite(metric.bounds[1]):  # all rows agree, which is not certainty
            low, high = metric.interval_of(figure)
            said += f", 95 % interval {low:.3f} to {high:.3f}"
        fact(console, name.replace("_", " "), said)
    if evaluation.reused:
        fact(console, "kept", f"{evaluation.reused} rows of an earlier run were not judged again")
    for note in evaluation.notes:
        line(console, note)
    left_out = evaluation.about.get("left_out")
    if left_out:
        fact(
            console, "left out", f"{left_out} rows are longer than the base reads (data.on_overflow is drop)"
        )
    confusion = evaluation.confusion
    if confusion is not None and len(confusion.labels) <= MOST_LABELS:
        show_confusion(console, confusion)


def show_confusion(console: Screen, confusion: Confusion) -> None:
    """The wanted labels in rows and the answers in columns; by number where their names are too wide for the screen."""
    counts = [
        [str(count) if count else "·" for count in (*row, other)]
        for row, other in zip(confusion.table, confusion.other, strict=True)
    ]
    numbers = [str(number) for number in range(1, len(counts) + 1)]
    numbered = [f"{number} {label}" for number, label in zip(numbers, confusion.labels, strict=True)]

    def fits(labels: Sequence[str], heads: Sequence[str]) -> bool:
        columns = zip(heads, zip(*counts, strict=True), strict=True)
        widest = sum(2 + max(map(len, (head, *column))) for head, column in columns)
        return max(map(len, (*labels, corner))) + widest <= console.width

    corner = "wanted \\ answered"
    labels, heads = list(confusion.labels), [*confusion.labels, "other"]
    if not fits(labels, heads):
        labels, heads = numbered, [*numbers, "other"]
    if not fits(labels, heads):
        labels, corner = numbers, ""
        line(console, f"Wanted in rows, answered in columns: {', '.join(numbered)}.", "dim")
    rows = [(label, *row) for label, row in zip(labels, counts, strict=True)]
    console.print(table((corner, *heads), rows, width=console.width))
