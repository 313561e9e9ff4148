"""The course of learning: curves of any run, and the page of a tuning run by itself."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.progress.events import loss_name
from softprompt.report import charts, figures
from softprompt.report.curves import smoothed
from softprompt.report.parts import Block, Chart, Page, Section, Table
from softprompt.report.read import ReportedRun, Series, Tuning


def tuning_page(run: ReportedRun, tuning: Tuning, number: int) -> Page:
    """Losses before and after, curves, and how to reproduce it."""
    figures_of_run = tuning.metrics
    held_out = figures_of_run.get("judged_on") == "validation"
    rows = [
        [label, figures.number(figures_of_run.get(key))]
        for key, label in (
            ("nll_base", "the base alone"),
            ("nll_before", "the prompt at its start"),
            ("nll_after", "the prompt that is kept"),
        )
    ]
    result = Section(
        "result",
        "Result",
        tables=[
            Table(
                [
                    loss_name(held_out),
                    "nats per token",
                ],
                rows,
            )
        ],
        points=[
            f"{figures.count(figures_of_run.get('steps'))} steps, the best was step "
            f"{figures.count(figures_of_run.get('best_step'))}; {figures.seconds(figures_of_run.get('seconds'))}, peak memory "
            f"{figures.size(figures_of_run.get('peak_memory_bytes'))}.",
            "A run by itself says how far the loss fell, and not whether another way would do better: "
            "softprompt compare does.",
        ],
    )
    sections = [result, learning_curves(run.validation, run.training, held_out=held_out)]
    blocks = [Block(tuning.recipe.strip(), "Recipe")] if tuning.recipe else []
    versions = ", ".join(f"{name} {version}" for name, version in tuning.versions.items())
    base = tuning.base
    sections.append(
        Section(
            "reproduce",
            "How to reproduce",
            points=[
                f"Base: {base.name}, fingerprint {base.sha256 or 'unknown'}.",
                f"Data: {tuning.data.source}, revision {tuning.data.revision or 'unknown'}.",
                f"Versions: {versions or 'unknown'}.",
            ],
            blocks=blocks,
        )
    )
    before, after = figures_of_run.get("nll_base"), figures_of_run.get("nll_after")
    verdict = ""
    if before is not None and after is not None and figures.known(before) and figures.known(after):
        moved = "lowered" if after < before else "did not lower"
        verdict = f"The prompt {moved} the {loss_name(held_out)}: {before:.3f} nats per token for the base alone, {after:.3f} with it."
    facts = f"{tuning.kind} prompt, {tuning.length or 'unknown'} virtual tokens, base {base.name}."
    return Page(
        f"run{number}", run.title, facts, verdict, [section for section in sections if section is not None]
    )


def learning_curves(
    validation: Sequence[Series], training: Sequence[Series], *, held_out: bool = True
) -> Section | None:
    measured = ("Loss on the validation rows", "The step of the lowest loss is the one that is judged.")
    if not held_out:
        measured = (
            "Loss on the training rows",
            "No rows were held out, so the last step is the one that is kept.",
        )
    charts_of = []
    for given, title, note in (
        (validation, *measured),
        (training, "Loss on the training batches", "Smoothed over about a tenth of the steps."),
    ):
        smooth = given is training
        drawn = [
            charts.Line(
                series.arm, smoothed(series.points, 0.1) if smooth else series.points, faint=series.seed > 0
            )
            for series in sorted(given, key=lambda series: -series.seed)
        ]
        svg = charts.lines(drawn, title=title, x_axis="step", y_axis="nats per trained token")
        if svg:
            charts_of.append(Chart(title, svg, note))
    text = ["Thin lines are further seeds."] if any(series.seed for series in validation) else []
    return Section("curves", "Learning curves", text=text, charts=charts_of) if charts_of else None
