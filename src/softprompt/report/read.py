"""Runs on disk to what a page shows, whatever wrote them; nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt.comparison.records import ArmResult, BaseFacts, Comparison, DataFacts, MetricFigure
from softprompt.comparison.summary import summarise
from softprompt.data.template import Field, Piece, Soft, Template, Text
from softprompt.errors import DataError, RecipeError
from softprompt.evaluation.metric import METRICS, Confusion
from softprompt.evaluation.record import read_json, typed
from softprompt.evaluation.rows import ROWS, SUMMARY, Row, read_rows
from softprompt.report.curves import EVENTS, read_curves
from softprompt.store.ownership import run_of
from softprompt.store.plain_file import read_bytes

COMPARISON, RECIPE, PROMPT = "comparison.json", "recipe.yaml", "softprompt.json"
SAMPLES = 24


@dataclass(frozen=True)
class Sample:
    """One input answered by every arm; `right` is None where right and wrong mean nothing."""

    input: str
    wanted: str
    answers: Mapping[str, str]
    right: Mapping[str, bool | None]

    def mark(self, arm: str) -> str:
        """right, wrong, or says more: the wanted words and others too, upper and lower case alike. "" where it means
        nothing."""
        is_right = self.right[arm]
        if is_right is None:
            return ""
        wanted = self.wanted.strip().casefold()
        if is_right:
            return "right"
        return "says more" if wanted and wanted in self.answers[arm].casefold() else "wrong"

    @property
    def differ(self) -> bool:
        """Whether the arms differ: some right and some wrong, or, where that means nothing, in what they said."""
        known_answers = {is_right for is_right in self.right.values() if is_right is not None}
        if known_answers:
            return len(known_answers) > 1
        return len({answer.strip() for answer in self.answers.values()}) > 1


@dataclass(frozen=True)
class Series:
    """A line of a learning curve: step and loss."""

    arm: str
    seed: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tuning:
    """A tuning run by itself: what the prompt's own notes say of it."""

    name: str
    kind: str = "soft"
    length: int | None = None
    template: str = ""
    target: str | None = None
    base: BaseFacts = field(default_factory=BaseFacts)
    data: DataFacts = field(default_factory=DataFacts)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: str = ""


@dataclass
class ReportedRun:
    """The source of one section of the report: a comparison, or a tuning run."""

    title: str
    kind: str
    comparison: Comparison | None = None
    tuning: Tuning | None = None
    samples: list[Sample] = field(default_factory=list)
    sampled_from: int = 0
    scaffold: tuple[str, str] = ("", "")
    validation: list[Series] = field(default_factory=list)
    training: list[Series] = field(default_factory=list)


@dataclass(frozen=True)
class _Evaluated:
    """An evaluation.json as far as the report reads it."""

    rows: int = 0
    complete: bool = False
    metrics: dict[str, MetricFigure] = field(default_factory=dict)
    confusion: Confusion | None = None
    about: _About = field(default_factory=lambda: _About())


@dataclass(frozen=True)
class _About:
    name: str | None = None
    arm: str | None = None
    base: BaseFacts = field(default_factory=BaseFacts)
    data: _JudgedData = field(default_factory=lambda: _JudgedData())
    template: str = ""
    target: str | None = None
    prompt_folder: str | None = None


@dataclass(frozen=True)
class _JudgedData:
    source: str | None = None
    revision: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class _PromptNotes:
    """A softprompt.json as far as the report reads it."""

    name: str | None = None
    kind: str = "soft"
    length: int | None = None
    template: str = ""
    target: str | None = None
    base: BaseFacts = field(default_factory=BaseFacts)
    notes: _Notes = field(default_factory=lambda: _Notes())


@dataclass(frozen=True)
class _Notes:
    data: DataFacts = field(default_factory=DataFacts)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    run: str | None = None


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """A section for each comparison and each tuning run; evaluations on the same rows share one.

    Raises DataError for a folder that no command of softprompt wrote.
    """
    runs: list[ReportedRun] = []
    evaluations: list[Path] = []
    for folder in folders:
        if (folder / COMPARISON).exists():
            runs.append(_comparison(folder))
        elif (folder / SUMMARY).exists():
            evaluations.append(folder)
        elif (folder / EVENTS).exists():
            runs.append(_tuning(folder))
        else:
            raise DataError(
                f"{folder}: holds no {COMPARISON}, {SUMMARY} or {EVENTS}. Give folders that softprompt compare, "
                "evaluate --out or tune wrote."
            )
    return runs + _evaluations(evaluations)


def _comparison(folder: Path) -> ReportedRun:
    comparison = Comparison.read(folder / COMPARISON)
    run = ReportedRun(_title(comparison), "comparison", comparison)
    rows: dict[str, Sequence[Row]] = {}
    for arm, results in comparison.runs.items():
        path = folder / "arms" / f"{arm}-{results[0].seed}" / ROWS if results else folder
        if path.is_file():
            rows[arm] = read_rows(path)
        for result in results:
            for points, lines in ((result.validation, run.validation), (result.curve, run.training)):
                points_known = [(point.step, point.nll) for point in points if math.isfinite(point.nll)]
                if points_known:
                    lines.append(Series(arm, result.seed, points_known))
    run.scaffold = _scaffold(comparison)
    run.samples = _samples(rows, run.scaffold) or _continued(comparison)
    run.sampled_from = len(next(iter(rows.values()), []))
    return run


def _evaluations(folders: Sequence[Path]) -> list[ReportedRun]:
    """Evaluations as arms of one comparison where all were judged on the same rows, else each by itself."""
    if not folders:
        return []
    records: list[_Evaluated] = []
    for folder in folders:
        record = typed(_Evaluated, read_json(folder / SUMMARY), str(folder / SUMMARY))
        if not record.complete:
            raise DataError(
                f"{folder}: the evaluation was interrupted. Run the same command again to finish it."
            )
        records.append(record)
    judged_rows = [read_rows(folder / ROWS) for folder in folders]
    if len({tuple((row.index, row.input, row.wanted) for row in rows) for rows in judged_rows}) > 1:
        return [run for folder in folders for run in _evaluations([folder])]
    names = [record.about.name or folder.name for folder, record in zip(folders, records, strict=True)]
    arms = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    first = records[0]
    metrics = [
        name
        for name in first.metrics
        if name in METRICS and all(name in record.metrics for record in records)
    ]
    if not metrics:
        raise DataError("The evaluations share no metric. Evaluate them with the same --metric.")
    results: dict[str, tuple[ArmResult, ...]] = {
        arm: (ArmResult(arm, rows=record.rows, metrics=record.metrics, confusion=record.confusion),)
        for arm, record in zip(arms, records, strict=True)
    }
    rows = {arm: [judged] for arm, judged in zip(arms, judged_rows, strict=True)}
    data = first.about.data
    comparison = Comparison(
        summary=summarise(results, rows, metrics),
        runs=results,
        metrics=tuple(metrics),
        base=first.about.base,
        data=DataFacts(data.source, data.revision, data.split, {"judged": len(judged_rows[0])}),
        kind="evaluations",
        template=first.about.template,
        target=first.about.target,
        arm_names={arm: _described(record.about) for arm, record in zip(arms, records, strict=True)},
    )
    run = ReportedRun(_title(comparison), "evaluations", comparison)
    run.scaffold = _scaffold(comparison)
    run.samples = _samples({arm: judged for arm, (judged,) in rows.items()}, run.scaffold)
    run.sampled_from = len(judged_rows[0])
    return [run]


def _title(comparison: Comparison) -> str:
    """The task, in words: what is told from what, in which data, on which base."""
    target = comparison.target
    try:
        inputs = Template.parse(comparison.template, target=target).inputs
    except RecipeError:
        inputs = ()
    learned = f"{target} from {' and '.join(inputs)}" if target and inputs else target or ""
    rows = f"{comparison.data.source or 'rows'} on {(comparison.base.name or 'an unknown base').removeprefix('./')}"
    return f"{learned[:1].upper()}{learned[1:]}: {rows}" if learned else rows


def _described(about: _About) -> str:
    kinds = {
        "none": "the base as it is",
        "text": "a text in front",
        "soft": "a soft prompt",
        "deep": "a deep prompt",
    }
    folder = about.prompt_folder
    return kinds.get(str(about.arm), "") + (f", {Path(folder).name}" if folder else "")


def _tuning(folder: Path) -> ReportedRun:
    """A tuning run: its events, and the prompt's own notes.

    A run that was killed before it saved leaves a former run's prompt beside its own recipe and events: that prompt is
    not shown with them. Folders of version 0.1 have no run id."""
    path = folder / PROMPT
    prompt = typed(_PromptNotes, read_json(path), str(path)) if path.exists() else _PromptNotes()
    run_id = run_of(folder, "run")
    if path.exists() and run_id and prompt.notes.run != run_id:
        prompt = _PromptNotes(f"{folder.name} (not finished; the prompt in this folder is of a former run)")
    recipe = folder / RECIPE
    tuning = Tuning(
        prompt.name or folder.name,
        prompt.kind,
        prompt.length,
        prompt.template,
        prompt.target,
        prompt.base,
        prompt.notes.data,
        prompt.notes.metrics,
        prompt.notes.versions,
        _recipe_text(recipe),
    )
    curves = read_curves(folder)
    run = ReportedRun(tuning.name, "tuning", tuning=tuning)
    for points, lines in ((curves.held_out, run.validation), (curves.training, run.training)):
        if points:
            lines.append(Series(prompt.kind, 0, points))
    return run


def _recipe_text(path: Path) -> str:
    """The recipe as it was written; empty where there is none, or none that can be read."""
    try:
        return read_bytes(path).decode("utf-8", "replace")
    except OSError:
        return ""


def _scaffold(comparison: Comparison) -> tuple[str, str]:
    """The fixed text before and after a row's own, where it is lines (a chat template's marks): every sample would repeat it."""
    try:
        template = Template.parse(comparison.template, target=comparison.target)
    except RecipeError:
        return "", ""
    pieces = [piece for piece in template.pieces if not isinstance(piece, Soft)]
    target = Field(comparison.target or "")
    pieces = pieces[: pieces.index(target)] if target in pieces else pieces
    opening, ending = "".join(_leading_texts(pieces)), "".join(reversed(_leading_texts(pieces[::-1])))
    return opening if "\n" in opening else "", ending if "\n" in ending else ""


def _leading_texts(pieces: Sequence[Piece]) -> list[str]:
    texts: list[str] = []
    for piece in pieces:
        if not isinstance(piece, Text):
            break
        texts.append(piece.text)
    return texts


def _samples(rows: Mapping[str, Sequence[Row]], scaffold: tuple[str, str] = ("", "")) -> list[Sample]:
    """Samples of up to 24 rows, preferring those where the arms differ; in the order of the data. What `scaffold` says
    that every input begins and ends with is left out."""
    if not rows or any(row.answer is None for judged in rows.values() for row in judged):
        return []
    short = all(len(row.wanted) <= 60 and "\n" not in row.wanted for row in next(iter(rows.values())))
    samples = []
    for index in range(len(next(iter(rows.values())))):
        group = {arm: judged[index] for arm, judged in rows.items()}
        first = next(iter(group.values()))
        samples.append(
            Sample(
                first.input.removeprefix(scaffold[0]).removesuffix(scaffold[1]),
                first.wanted,
                {arm: row.answer or "" for arm, row in group.items()},
                {
                    arm: (row.answer or "").strip() == row.wanted.strip() if short else None
                    for arm, row in group.items()
                },
            )
        )
    differing = [i for i, sample in enumerate(samples) if sample.differ][: SAMPLES * 3 // 4]
    rest = [i for i in range(len(samples)) if i not in set(differing)][: SAMPLES - len(differing)]
    return [samples[i] for i in sorted([*differing, *rest])]


def _continued(comparison: Comparison) -> list[Sample]:
    """Running text continued by each arm."""
    texts = {arm: results[0].samples for arm, results in comparison.runs.items()}
    if not texts or not all(texts.values()):
        return []
    first = next(iter(texts.values()))
    return [
        Sample(
            start.input, "", {arm: samples[i].text for arm, samples in texts.items()}, dict.fromkeys(texts)
        )
        for i, start in enumerate(first)
    ]
