"""The page's content, section by section, as plain records that HTML, Markdown and the other formats write out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import yaml

from softprompt.comparison.arm import in_words
from softprompt.comparison.records import ArmSummary, Comparison, Figure
from softprompt.evaluation.interval import NORMAL_975
from softprompt.report import charts, figures
from softprompt.report.learned import learning_curves, tuning_page
from softprompt.report.limits import limits
from softprompt.report.parts import Block, Card, Chart, Page, Section, Table
from softprompt.report.paths import without_folders
from softprompt.report.read import ReportedRun
from softprompt.report.verdict import against_base, cost_of, margin_of, picks, verdict


def page(run: ReportedRun, number: int) -> Page:
    """The page of one run, without the folders of absolute paths; texts of rows are shown as they are."""
    page = _page(run, number)
    for section in page.sections:
        section.text = without_folders(section.text)
        section.points = without_folders(section.points)
        section.blocks = [Block(without_folders(block.text), block.title) for block in section.blocks]
        section.tables = [replace(table, note=without_folders(table.note)) for table in section.tables]
    page.title, page.facts = without_folders(page.title), without_folders(page.facts)
    return page


def _page(run: ReportedRun, number: int) -> Page:
    if run.tuning is not None:
        return tuning_page(run, run.tuning, number)
    comparison = run.comparison
    assert comparison is not None  # a run is one or the other
    sections = [
        _quality(comparison),
        _costs(comparison),
        _against_cost(comparison),
        learning_curves(run.validation, run.training),
        _samples(run),
        _confusion(comparison),
        _health(comparison),
        _anatomy(comparison),
        _reproduce(comparison),
        Section("limits", "Limits", points=limits(comparison)),
    ]
    return Page(
        f"run{number}",
        run.title,
        _facts(comparison),
        verdict(comparison),
        [section for section in sections if section is not None],
        _cards(comparison),
    )


def _cards(comparison: Comparison) -> list[Card]:
    chosen = picks(comparison)
    if chosen is None:
        return []
    summary = comparison.summary
    margin = f"{margin_of(comparison):g}"
    titles = {
        f"Best {_named(summary.judged_by, '')}": chosen.best,
        f"Cheapest within {margin} of it": chosen.cheapest,
        "Recommended": chosen.recommended,
    }
    return [
        Card(
            title,
            arm,
            in_words(arm),
            figures.estimate(summary.arms[arm].metrics[summary.judged_by]),
            cost_of(summary.arms[arm]),
        )
        for title, arm in titles.items()
    ]


def _ranked(comparison: Comparison) -> dict[str, ArmSummary]:
    """The arms, the best figure first, those that are not known last."""
    summary = comparison.summary
    sign = -1 if summary.better == "higher" else 1

    def rank(arm: str) -> tuple[bool, float]:
        value = summary.arms[arm].metrics[summary.judged_by].value
        return not figures.known(value), sign * value if figures.known(value) else 0.0

    return {arm: summary.arms[arm] for arm in sorted(summary.arms, key=rank)}


def _facts(comparison: Comparison) -> str:
    data, base = comparison.data, comparison.base
    rows = data.rows
    parts = [
        f"{figures.count(rows['train'])} rows learned from" if "train" in rows else "",
        f"{figures.count(rows.get('judged'))} judged on ({data.judged_on})",
        f"base {(base.name or 'unknown').removeprefix('./')}, {figures.count(base.parameters)} weights, {base.dtype}",
        f"made {comparison.made.replace('T', ' ').replace('Z', ' UTC')}" if comparison.made else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def _quality(comparison: Comparison) -> Section:
    summary = comparison.summary
    arms, judge = _ranked(comparison), summary.judged_by
    names = list(comparison.metrics)
    rows = []
    for arm, arm_summary in arms.items():
        rows.append(
            [
                arm,
                figures.estimate(arm_summary.metrics[judge]),
                "best" if arm == summary.best else figures.difference(arm_summary.against_best),
                *([against_base(comparison, arm) or "\u2014"] if "base" in arms else []),
                *(figures.estimate(arm_summary.metrics[name]) for name in names if name != judge),
                f"{arm_summary.seeds}",
            ]
        )
    head = [
        "arm",
        _named(judge, summary.unit),
        "difference to the best [95\u00a0%]",
        *(["against the base"] if "base" in arms else []),
        *(_named(name, arms[summary.best].metrics[name].unit) for name in names if name != judge),
        "seeds",
    ]
    best = list(arms).index(summary.best)
    bars = []
    for arm, arm_summary in arms.items():
        figure = arm_summary.metrics[judge]
        low, high = _interval(figure)
        bars.append(charts.Bar(arm, arm, figure.value, low, high, figures.estimate(figure, rows=True)))
    chart = Chart(
        f"{_named(judge, summary.unit)}, {summary.better} is better",
        charts.bars(bars, title=f"{judge} of every arm with its interval", axis=_named(judge, summary.unit)),
        "Dots with 95 % intervals (Wilson's, where a figure lies between 0 and 1). Whether two arms differ is shown by the "
        "paired differences in the table, not by whether these intervals touch.",
    )
    by_seed = [
        [arm, *(figures.number(value) for value in arm_summary.metrics[judge].by_seed)]
        for arm, arm_summary in arms.items()
        if len(arm_summary.metrics[judge].by_seed) > 1
    ]
    seeds = max((len(row) for row in by_seed), default=1) - 1
    note = "; ".join(f"{arm}: {comparison.arm_names[arm]}" for arm in arms if comparison.arm_names.get(arm))
    for wording in comparison.runs.get("wording", ()):
        note += f"; the wording chosen: {wording.about.get('template')!r}"
    tables = [Table(head, rows, note=f"{note}." if note else "", best=best)]
    if by_seed:
        tables.append(
            Table(
                ["arm", *(f"seed {i}" for i in range(seeds))],
                by_seed,
                title=f"{_named(judge, summary.unit)} by seed",
            )
        )
    return Section(
        "quality",
        "Quality",
        text=[
            "Value ± standard error over the judged rows (and over seeds, if there are several). Differences are "
            "taken row by row on the same rows; one is significant if its 95 % interval excludes 0."
        ],
        charts=[chart],
        tables=tables,
        points=[f"{arm} failed: {reason}" for arm, reason in comparison.failed.items()],
    )


def _interval(figure: Figure) -> tuple[float, float]:
    """The 95 % interval; by the standard error in records of version 0.1, which keep none."""
    if figures.known(figure.low) and figures.known(figure.high):
        return figure.low, figure.high
    reach = NORMAL_975 * figure.stderr
    return figure.value - reach, figure.value + reach


def _named(name: str, unit: str) -> str:
    return f"{name.replace('_', ' ')}{f' ({unit})' if unit else ''}"


def _costs(comparison: Comparison) -> Section | None:
    arms = _ranked(comparison)
    if not any(figures.known(arm_summary.stored_bytes) for arm_summary in arms.values()):
        return None
    learning = [
        [
            arm,
            figures.count(arm_summary.trained_parameters),
            figures.count(arm_summary.steps) if arm_summary.steps else "\u2014",
            f"{arm_summary.rate:.2g}" if figures.known(arm_summary.rate) else "\u2014",
            figures.seconds(arm_summary.learning_seconds),
            figures.seconds(arm_summary.learning_cpu_seconds),
            figures.size(arm_summary.peak_learning_bytes),
        ]
        for arm, arm_summary in arms.items()
    ]
    clock = "CPU " if all(arm_summary.decode_clock == "cpu" for arm_summary in arms.values()) else ""
    using = [
        [
            arm,
            figures.size(arm_summary.stored_bytes),
            figures.count(arm_summary.added_tokens).replace("-", "\u2212"),
            figures.count(arm_summary.decode_tokens_per_second),
            figures.size(arm_summary.peak_judging_bytes),
        ]
        for arm, arm_summary in arms.items()
    ]
    before = next(iter(arms.values())).general_before
    kept = [
        [
            arm,
            "yes" if arm_summary.base_unchanged else "no: its own model",
            _change(arm_summary.general_on, before),
            _change(arm_summary.general_off, before),
        ]
        for arm, arm_summary in arms.items()
    ]
    best = list(arms).index(comparison.summary.best)
    own = "each run in its own process" if comparison.own_process else "all runs in one process"
    return Section(
        "costs",
        "Costs",
        tables=[
            Table(
                [
                    "arm",
                    "trained parameters",
                    "steps",
                    "learning rate",
                    "wall time",
                    "CPU time",
                    "peak memory",
                ],
                learning,
                title="To learn",
                note=f"Means over seeds, {own}. Peak memory is the highest of the process while it learned, the base, "
                "Python and its libraries included. Time includes choosing the best step on the validation rows.",
                best=best,
            ),
            Table(
                [
                    "arm",
                    "bytes kept for a task",
                    "tokens added to a request",
                    f"new tokens a {clock}second",
                    "peak memory",
                ],
                using,
                title="To keep and to use",
                note="Speed: 32 new tokens for each of 8 rows side by side, reading their texts included. Full fine-tuning decodes as the base does. A "
                "prompt's own keys and values are computed once and shared.",
                best=best,
            ),
            Table(
                ["arm", "base bit for bit the same", "general text, task on", "general text, task off"],
                kept,
                title="What happens to everything else",
                note=f"Loss on held-out general text in nats per token; the untouched base has {figures.number(before)}. "
                "On: with the prompt in front, the adapter active or the tuned weights. Off: what other users of the "
                "same model get; above zero is forgetting.",
                best=best,
            ),
        ],
    )


def _change(value: Any, before: Any) -> str:
    if not figures.known(value):
        return figures.UNKNOWN
    return f"{value:.3f} ({value - before:+.3f})".replace("-", "\u2212")


def _against_cost(comparison: Comparison) -> Section | None:
    summary = comparison.summary
    arms, judge = summary.arms, summary.judged_by
    drawn = []
    for key, title, axis in (
        ("stored_bytes", "Quality against bytes kept for a task", "bytes"),
        ("added_tokens", "Quality against positions in front of a request", "positions"),
        ("milliseconds", "Quality against time for a new token", "milliseconds"),
    ):
        if key == "added_tokens" and not {"context", "distil"} & set(arms):
            continue  # else it says little: most arms add some twenty positions or none
        points = []
        for arm, arm_summary in arms.items():
            figure = arm_summary.metrics[judge]
            speed = arm_summary.decode_tokens_per_second
            milliseconds = 1000 / speed if figures.known(speed) and speed > 0 else math.nan
            costs = {
                "stored_bytes": float(arm_summary.stored_bytes),
                "added_tokens": float(arm_summary.added_tokens),
                "milliseconds": milliseconds,
            }
            cost = costs[key]
            points.append(charts.Point(arm, arm, cost, figure.value, *_interval(figure)))
        svg = charts.scatter(
            points, title=title, x_axis=axis, y_axis=judge.replace("_", " "), better=summary.better
        )
        if svg:
            drawn.append(Chart(title, svg))
    text = "The dashed line joins the arms that no other arm beats in both: as good a figure or a better one, at a lower cost."
    return Section("tradeoff", "Quality against cost", text=[text], charts=drawn) if drawn else None


def _samples(run: ReportedRun) -> Section | None:
    if not run.samples:
        return None
    text = (
        f"{len(run.samples)} of the {run.sampled_from} judged rows, those where the arms differ preferred; seed 0."
        if run.samples[0].wanted
        else "The first words of some judged rows, continued by each arm; seed 0, the likeliest token every time."
    )
    if any(run.scaffold):
        text += " The template's own lines before and after each input are left out."
    return Section("samples", "Before and after, side by side", text=[text], samples=run.samples)


def _confusion(comparison: Comparison) -> Section | None:
    tables: list[Table] = []
    for arm in dict.fromkeys([comparison.summary.best, "soft", *comparison.runs]):
        if arm not in comparison.runs:
            continue
        confusion = comparison.runs[arm][0].confusion
        if not confusion or len(confusion.labels) > 20 or len(tables) == 2:
            continue
        rows = [
            [label, *(str(count) if count else "·" for count in (*counts, other))]
            for label, counts, other in zip(confusion.labels, confusion.table, confusion.other, strict=True)
        ]
        tables.append(
            Table(["wanted \\ said", *confusion.labels, "other text"], rows, title=f"{arm}, seed 0")
        )
    return (
        Section(
            "confusion",
            "Which labels are mistaken for which",
            text=["Rows are the wanted labels, columns what was said."],
            tables=tables,
        )
        if tables
        else None
    )


def _health(comparison: Comparison) -> Section | None:
    health = comparison.health
    if not health:
        return None
    head = [
        "rows",
        "count",
        "duplicates",
        "shortest",
        "median",
        "95 %",
        "longest",
        "cut",
        "left out",
        "answers",
    ]
    rows, labels = [], []
    for name, split in health.splits.items():
        lengths = split.lengths or {}
        rows.append(
            [
                name,
                figures.count(split.rows),
                figures.count(split.duplicates),
                *(figures.count(lengths.get(key)) for key in ("shortest", "median", "p95", "longest")),
                figures.count(split.truncated),
                figures.count(split.dropped),
                figures.count(split.answers) if split.answers is not None else "\u2014",
            ]
        )
        if split.labels is not None:
            labels.append((name, split.labels))
    tables = [Table(head, rows, note="Lengths in positions, virtual tokens included.")]
    if labels:
        label_names = list(labels[0][1])
        tables.append(
            Table(
                ["rows", *label_names],
                [
                    [name, *(figures.count(counts.get(label, 0)) for label in label_names)]
                    for name, counts in labels
                ],
                title="Label balance",
            )
        )
    points = [
        f"{health.judged_also_trained} judged rows ask the same as a training row (case and white space aside); "
        f"{health.judged_also_validated} the same as a validation row.",
        f"{health.validation_also_trained} validation rows ask the same as a training row.",
    ]
    if comparison.target:
        points.append(f"{health.contradictions} inputs occur in the training rows with different answers.")
    if health.labels_never_trained:
        points.append(f"Labels that are judged but never trained: {', '.join(health.labels_never_trained)}.")
    points += health.notes
    return Section("health", "Data health", tables=tables, points=points)


def _anatomy(comparison: Comparison) -> Section | None:
    section = Section("anatomy", "The prompt's anatomy")
    for arm in ("soft", "deep"):
        results = comparison.runs.get(arm)
        anatomy = results[0].anatomy if results else None
        if anatomy is None:
            continue
        if anatomy.kind == "deep":
            rows = [
                [str(i), figures.number(layer.keys), figures.number(layer.values)]
                for i, layer in enumerate(anatomy.layers)
            ]
            section.tables.append(
                Table(
                    ["layer", "keys", "values"],
                    rows,
                    title=f"Deep prompt, {anatomy.length} positions: mean norms",
                )
            )
            continue
        low, high = anatomy.table_norm_range
        values = [vector.norm for vector in anatomy.vectors]
        section.charts.append(
            Chart(
                f"Soft prompt: norms of its {anatomy.length} vectors (seed 0)",
                charts.norms(values, low, anatomy.table_norm_median, high, title="Norms of the vectors"),
            )
        )
        rows = [
            [
                str(i),
                figures.number(vector.norm),
                "   ".join(f"{near.token!r} {near.cosine:.2f}" for near in vector.nearest),
            ]
            for i, vector in enumerate(anatomy.vectors)
        ]
        section.tables.append(
            Table(
                ["vector", "norm", "nearest tokens by cosine"],
                rows,
                title="Nearest tokens",
                note="A hint and no translation: a vector may do what no token does, and a near token may mean nothing.",
                words=(2,),
            )
        )
    return section if section.tables or section.charts else None


def _reproduce(comparison: Comparison) -> Section:
    section = Section("reproduce", "How to reproduce", folded=True)
    if comparison.command:
        section.blocks.append(Block(comparison.command, "Command"))
    base, data, settings = comparison.base, comparison.data, comparison.settings
    lines = [
        f"Base: {base.name}, revision {base.revision or 'none'}, fingerprint {base.sha256}.",
        f"Data: {data.source}, revision {data.revision or 'unknown'}.",
        f"Template: {comparison.template!r}, target {comparison.target or 'none (all text)'}.",
    ]
    if settings is not None:
        lines.append(f"Seeds: {', '.join(map(str, range(settings.seeds)))}; rows held out by data.seed.")
        lines.append(
            f"Answers: {settings.answers}{', calibrated' if settings.calibrate else ''}; "
            f"few-shot examples: {settings.shots}."
        )
        if settings.text:
            lines.append(f"The user's own text: {settings.text!r}.")
    if comparison.versions:
        lines.append(
            "Versions: "
            + ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
            + "."
        )
    machine = comparison.machine
    if machine:
        lines.append(
            f"Machine: {machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads used, "
            f"{machine.get('device')}, {machine.get('system')}."
        )
    section.points = lines
    if comparison.recipe:
        section.blocks.append(
            Block(yaml.safe_dump(comparison.recipe, sort_keys=False, allow_unicode=True).strip(), "Recipe")
        )
    return section
