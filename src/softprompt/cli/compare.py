"""`softprompt compare`: prompt tuning against fine-tuning and prompt engineering, on the user's own task."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, heading, line, screen, table
from softprompt.comparison.records import Comparison
from softprompt.comparison.settings import CompareSettings
from softprompt.errors import RecipeError
from softprompt.evaluation.evaluate import demand, read_gates
from softprompt.evaluation.metric import Estimate
from softprompt.progress.bar import ShowJobs
from softprompt.progress.console import Screen
from softprompt.report.figures import difference, estimate, size
from softprompt.report.verdict import verdict
from softprompt.scale.cluster import workers_of
from softprompt.settings.cluster_settings import ClusterSettings
from softprompt.tuning.recipe import Recipe

EXAMPLE = "softprompt compare my.yaml --arms base,few-shot,soft --seeds 3"


@takes(Recipe, CompareSettings, ClusterSettings)
def command(
    recipe: Recipe,
    settings: CompareSettings,
    cluster: ClusterSettings,
    *,
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
    resume: asked.ContinuesByItself = False,
    as_json: asked.AsJson = False,
) -> None:
    """Compare a soft prompt with other prompts, LoRA and full fine-tuning, in one report."""
    gates = read_gates(fail_under or [])
    for gate, _ in gates:
        if settings.metrics and gate.name not in settings.metrics:
            raise RecipeError(f"--fail-under {gate.name}: it is not measured. Add --metric {gate.name}.")
    console = screen(as_json=as_json)
    asked.demand_paths(recipe)

    from softprompt.comparison.compare import compare
    from softprompt.report.render import FILES, write_reports
    from softprompt.store.ownership import check_replaceable

    out = check_replaceable(recipe.out, FILES, kind="report")  # before hours are spent
    try:
        with workers_of(cluster) as workers, ShowJobs(console, settings.job_names) as bar:
            comparison = compare(
                recipe,
                settings,
                own_process=not in_process,
                workers=workers,
                tell=lambda job, what, done, of: bar(job.folder.name, what, done, of),
                progress=False,
                command=f"softprompt {shlex.join(sys.argv[1:])}" if sys.argv[1:] else "",
            )
    except KeyboardInterrupt:
        line(console, f"{asked.RESUME} Arms that were finished are kept in {out}.")
        raise
    written = write_reports([out], out)
    show(console, comparison)
    fact(console, "report", written[0])
    if as_json:
        emit(comparison.to_record())
    best = comparison.summary.arms[comparison.summary.best].metrics
    estimates = {name: Estimate(figure.value, figure.stderr, figure.n) for name, figure in best.items()}
    for gate, _ in gates:
        if gate.name not in estimates:
            raise RecipeError(
                f"--fail-under {gate.name}: only {', '.join(estimates)} were measured. Add --metric {gate.name}."
            )
    demand(gates, estimates)


def show(console: Screen, comparison: Comparison) -> None:
    """The central table in short, and the verdict."""
    summary, data = comparison.summary, comparison.data
    judge = summary.judged_by
    heading(console, f"{judge} on {data.source}, {data.judged_on}")
    rows = [
        (
            name,
            estimate(arm.metrics[judge]),
            "best" if name == summary.best else difference(arm.against_best),
            size(arm.stored_bytes),
            f"{arm.learning_seconds:.1f} s" if arm.trained_parameters else "",
        )
        for name, arm in summary.arms.items()
    ]
    headers = ("arm", judge, "difference to the best", "size per task", "training time")
    console.print(table(headers, rows, width=console.width))
    for arm_name, reason in comparison.failed.items():
        line(console, f"{arm_name} failed: {reason}")
    for note in comparison.health.notes if comparison.health is not None else ():
        line(console, note)
    console.print()
    line(console, verdict(comparison))
    console.print()
