"""Runs on disk to what a page shows, whatever wrote them. Records are read as they are; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt.errors import DataError
from softprompt.evaluation.rows import ROWS, SUMMARY, Row, read_rows
from softprompt.evaluation.summary import summarise

COMPARISON, METRICS, RECIPE, PROMPT = "comparison.json", "metrics.jsonl", "recipe.yaml", "softprompt.json"
SAMPLES = 24


@dataclass(frozen=True)
class Sample:
    """One input answered by every arm; `right` is None where right and wrong mean nothing."""

    input: str
    wanted: str
    said: Mapping[str, str]
    right: Mapping[str, bool | None]

    @property
    def differ(self) -> bool:
        """Whether the arms differ: some right and some wrong, or, where that means nothing, in what they said."""
        known = {one for one in self.right.values() if one is not None}
        if known:
            return len(known) > 1
        return len({one.strip() for one in self.said.values()}) > 1


@dataclass(frozen=True)
class Series:
    """A line of a learning curve: step and loss."""

    arm: str
    seed: int
    points: Sequence[tuple[float, float]]


@dataclass
class Run:
    """What one section of the report is made from. `record` is the comparison's, or one of the same shape."""

    title: str
    kind: str
    record: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    sampled_from: int = 0
    validation: list[Series] = field(default_factory=list)
    training: list[Series] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """A section for each comparison and each tuning run; evaluations on the same rows share one.

    Raises DataError for a folder that no command of softprompt wrote.
    """
    runs: list[Run] = []
    evaluations: list[Path] = []
    for folder in folders:
        if (folder / COMPARISON).exists():
            runs.append(_comparison(folder))
        elif (folder / SUMMARY).exists():
            evaluations.append(folder)
        elif (folder / METRICS).exists():
            runs.append(_tuning(folder))
        else:
            raise DataError(
                f"{folder}: holds no {COMPARISON}, {SUMMARY} or {METRICS}. Give folders that softprompt compare, "
                "evaluate --out or tune wrote."
            )
    return runs + _evaluations(evaluations)


def _comparison(folder: Path) -> Run:
    record = read_json(folder / COMPARISON)
    run = Run(f"{record['data']['source']} on {record['base']['name']}", "comparison", record)
    rows: dict[str, list[Row]] = {}
    for arm, results in record["runs"].items():
        first = results[0]
        path = folder / "arms" / f"{arm}-{first['seed']}" / ROWS
        if path.exists():
            rows[arm] = read_rows(path)
        for result in results:
            for name, lines in (("validation", run.validation), ("curve", run.training)):
                points = [
                    (one["step"], one["nll"]) for one in result.get(name) or [] if one["nll"] is not None
                ]
                if points:
                    lines.append(Series(arm, result["seed"], points))
    run.samples = _samples(rows) or _continued(record["runs"])
    run.sampled_from = len(next(iter(rows.values()), []))
    return run


def _evaluations(folders: Sequence[Path]) -> list[Run]:
    """Evaluations as arms of one comparison where all were judged on the same rows, else each by itself."""
    if not folders:
        return []
    found = [(folder, read_json(folder / SUMMARY), read_rows(folder / ROWS)) for folder in folders]
    unfinished = [str(folder) for folder, record, _ in found if not record.get("complete")]
    if unfinished:
        raise DataError(
            f"{unfinished[0]}: the evaluation was interrupted. Run the same command again to finish it."
        )
    judged = {tuple((row.index, row.input, row.wanted) for row in rows) for _, _, rows in found}
    if len(judged) > 1:
        return [run for folder in folders for run in _evaluations([folder])]
    names = [str(record["about"].get("name") or folder.name) for folder, record, _ in found]
    arms = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    first = found[0][1]
    metrics = [name for name in first["metrics"] if all(name in record["metrics"] for _, record, _ in found)]
    if not metrics:
        raise DataError("The evaluations share no metric. Evaluate them with the same --metric.")
    records = {arm: [record] for arm, (_, record, _) in zip(arms, found, strict=True)}
    rows = {arm: [judged] for arm, (_, _, judged) in zip(arms, found, strict=True)}
    about = first["about"]
    record = {
        "kind": "evaluations",
        "base": about.get("base") or {},
        "data": {
            **about.get("data", {}),
            "judged_on": about.get("data", {}).get("split"),
            "rows": {"judged": first["rows"]},
        },
        "template": about.get("template", ""),
        "target": about.get("target"),
        "metrics": metrics,
        "arm_names": {arm: _told(record["about"]) for arm, (_, record, _) in zip(arms, found, strict=True)},
        "summary": summarise(records, rows, metrics),
        "runs": records,
        "failed": {},
    }
    run = Run(f"{record['data'].get('source')} on {record['base'].get('name')}", "evaluations", record)
    run.samples = _samples({arm: one[0] for arm, one in rows.items()})
    run.sampled_from = int(first["rows"])
    return [run]


def _told(about: Mapping[str, Any]) -> str:
    kinds = {
        "none": "the base as it is",
        "text": "a text in front",
        "soft": "a soft prompt",
        "deep": "a deep prompt",
    }
    where = about.get("prompt_folder")
    return kinds.get(str(about.get("arm")), "") + (f", {where}" if where else "")


def _tuning(folder: Path) -> Run:
    """A tuning run: its events, and the prompt's own notes."""
    events = []
    for line in (folder / METRICS).read_text("utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed
    notes = read_json(folder / PROMPT) if (folder / PROMPT).exists() else {}
    started: dict[str, Any] = next((one for one in events if one.get("event") == "Started"), {})
    record = {
        "kind": "tuning",
        "base": notes.get("base") or {},
        "template": notes.get("template", ""),
        "target": notes.get("target"),
        "data": (notes.get("notes") or {}).get("data") or {},
        "metrics_of_run": (notes.get("notes") or {}).get("metrics") or {},
        "versions": (notes.get("notes") or {}).get("versions") or {},
        "recipe": (folder / RECIPE).read_text("utf-8") if (folder / RECIPE).exists() else "",
        "started": started,
        "length": notes.get("length"),
        "prompt_kind": notes.get("kind"),
    }
    run = Run(notes.get("name") or folder.name, "tuning", record)
    for event, lines in (("Validated", run.validation), ("Stepped", run.training)):
        points = [
            (one["step"], one["nll"])
            for one in events
            if one.get("event") == event and isinstance(one.get("nll"), float) and one["nll"] == one["nll"]
        ]
        if points:
            lines.append(Series(str(notes.get("kind") or "soft"), 0, points))
    return run


def _samples(rows: Mapping[str, Sequence[Row]]) -> list[Sample]:
    """Up to 24 rows, those where the arms differ first among them; in the order of the data."""
    if not rows or any(row.said is None for judged in rows.values() for row in judged):
        return []
    short = all(len(row.wanted) <= 60 and "\n" not in row.wanted for row in next(iter(rows.values())))
    found = []
    for place in range(len(next(iter(rows.values())))):
        group = {arm: judged[place] for arm, judged in rows.items()}
        one = next(iter(group.values()))
        found.append(
            Sample(
                one.input,
                one.wanted,
                {arm: row.said or "" for arm, row in group.items()},
                {
                    arm: (row.said or "").strip() == row.wanted.strip() if short else None
                    for arm, row in group.items()
                },
            )
        )
    differing = [i for i, one in enumerate(found) if one.differ][: SAMPLES * 3 // 4]
    rest = [i for i in range(len(found)) if i not in set(differing)][: SAMPLES - len(differing)]
    return [found[i] for i in sorted([*differing, *rest])]


def _continued(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Sample]:
    """Running text continued by each arm."""
    texts = {arm: results[0].get("samples") or [] for arm, results in runs.items()}
    if not texts or not all(texts.values()):
        return []
    first = next(iter(texts.values()))
    return [
        Sample(one["input"], "", {arm: said[i]["said"] for arm, said in texts.items()}, dict.fromkeys(texts))
        for i, one in enumerate(first)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A record. Raises DataError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the record cannot be read ({error}). Make the run again.") from error
    return found
