"""Judging: from a predictor and examples to figures, with every row kept.

The seam is one function: `predict` takes examples and returns an Answer for each, so a fake is a lambda. No torch here.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from softprompt.base.workers import HERE, Tell, Workers
from softprompt.data.example import Example
from softprompt.data.labels import are_labels
from softprompt.data.template import Field, Messages, Soft, Template, Text
from softprompt.errors import DataError, GateFailed, RecipeError
from softprompt.evaluation.metric import METRICS, Confusion, Estimate, Metric, confusion
from softprompt.evaluation.record import SCHEMA, write_json
from softprompt.evaluation.references import References
from softprompt.evaluation.row_counts import RowCounts
from softprompt.evaluation.rows import SUMMARY, Row, RowFile, RowsWithoutFolder

LONGEST_LABEL = 60  # characters
CHUNK = 64  # rows between two writes: at most so many are lost in a kill


@dataclass(frozen=True)
class Answer:
    """A predictor's result on one example; `text` is None where only the loss was measured. Other fields as in Row."""

    text: str | None = None
    nll: float = math.nan
    tokens: int = 0
    text_bytes: int = 0
    new_tokens: int = 0
    finish_reason: str = ""
    scores: Mapping[str, float] | None = None


Predict = Callable[[Sequence[Example]], Sequence[Answer]]


@dataclass(frozen=True)
class Evaluation:
    """Every row, and a figure for every metric.

    `rows` are read from their file when they are asked for, once they are too many to hold (evaluation/rows.py).
    `reused` rows came from an earlier, unfinished run. `about` holds what the answers depend on: base, prompt, template,
    data and settings; `notes` are sentences on what had to be assumed of the data."""

    rows: Sequence[Row]
    estimates: Mapping[str, Estimate]
    confusion: Confusion | None
    seconds: float
    reused: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of what was judged: the prompt's, or base."""
        return str(self.about.get("name") or "base")

    def to_record(self) -> dict[str, Any]:
        """The figures as plain data; rows are kept apart, in rows.jsonl."""
        return as_record(self) | {"about": dict(self.about)}

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={estimate}" for name, estimate in self.estimates.items())
        return f"Evaluation({self.name!r}: {figures})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        lines = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(estimate))} {METRICS[name].unit}</td></tr>"
            for name, estimate in self.estimates.items()
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{lines}</table>"


def judge_rows(
    predict: Predict,
    examples: Sequence[Example],
    metrics: Sequence[Metric],
    layout: Template,
    *,
    out: Path | None = None,
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, rows: None,
    chunk: int = CHUNK,
    as_learned: Callable[[str], str] = lambda text: text,
    workers: Workers = HERE,
    same: Callable[[list[Row]], list[Row]] | None = None,
) -> Evaluation:
    """Judges every example by the answer that `predict` gives.

    `as_learned` turns a wanted text into the form that the base's tokenizer can write: it may change letters.
    With `out`, rows are appended to `out`/rows.jsonl, and the figures with `about` are written to `out`/evaluation.json.
    `about` holds everything that the answers depend on: a folder of the same evaluation is continued, one of another
    evaluation is refused with DataError. Chunks are answered by the `workers`, and kept in order.
    Where several processes judge together, the first one has the folder, and `same`
    gives all of them the rows that it holds.
    """
    if not examples:
        raise DataError("There is no example to judge on. Name another split or file.")
    started = time.perf_counter()
    about = about or {}
    keep = RowsWithoutFolder() if out is None else RowFile(out, digest_of(about, examples))
    try:
        references = _references(examples, layout, as_learned)
        is_known = bytearray(len(examples))
        counts = {metric.name: RowCounts() for metric in metrics}

        def count(row: Row) -> None:
            is_known[row.index] = True
            for metric in metrics:
                counts[metric.name].append(metric.counted(row))

        for row in keep.judged() if same is None else same(list(keep.judged())):
            if row.index < len(examples) and not is_known[row.index]:
                if out is None:  # another process read it
                    keep.add([row])
                count(row)
        reused = done = sum(is_known)
        on_progress(done, len(examples))
        under_way: deque[tuple[int, list[Example]]] = deque()

        def chunks() -> Iterator[list[Example]]:
            # An answer's last digits may depend on the rows that it was read with. So a chunk that was judged in part is
            # answered whole, and an evaluation that was interrupted ends as one that was not.
            for start in range(0, len(examples), chunk):
                if not all(is_known[start : start + chunk]):
                    under_way.append((start, list(examples[start : start + chunk])))
                    yield under_way[-1][1]

        for answers in workers.map(partial(_answered, predict), chunks()):
            start, asked = under_way.popleft()
            rows = [
                _with_references(
                    judged(index, example, layout, answer, as_learned(wanted_text(layout, example))),
                    references,
                )
                for index, (example, answer) in enumerate(zip(asked, answers, strict=True), start)
                if not is_known[index]
            ]
            keep.add(rows)
            for row in rows:
                count(row)
            done += len(rows)
            on_progress(done, len(examples))
        ordered = keep.rows()
    finally:
        keep.close()
    estimates = {metric.name: metric.estimate_of(counts[metric.name]) for metric in metrics}
    labelled = {"accuracy", "macro_f1"} & set(estimates)
    table = confusion(ordered) if labelled else None
    result = Evaluation(ordered, estimates, table, time.perf_counter() - started, reused, about, tuple(notes))
    if isinstance(keep, RowFile):
        write_json(keep.folder / SUMMARY, {"digest": keep.digest, "complete": True, **result.to_record()})
    return result


def _answered(predict: Predict, examples: Sequence[Example], tell: Tell) -> Sequence[Answer]:
    return predict(examples)


def judged(index: int, example: Example, layout: Template, answer: Answer, wanted: str) -> Row:
    """A row of the file: the example as text, and the answer to it."""
    fields = {"answer" if name == "text" else name: value for name, value in vars(answer).items()}
    return Row(index, example.row, shown_input(layout, example), wanted, **fields)


def _references(
    examples: Sequence[Example], layout: Template, as_learned: Callable[[str], str]
) -> References | None:
    """All right texts of each example that has more than its wanted one: those in its own row, and those of other rows
    with the same input."""
    if layout.target is None:
        return None

    def right(example: Example) -> list[str]:
        return [as_learned(text) for text in (wanted_text(layout, example), *example.references)]

    return References(examples, lambda example: shown_input(layout, example), right)


def _with_references(row: Row, references: References | None) -> Row:
    group = references[row.index] if references is not None else None
    if group is None:
        return row
    return replace(row, references=group.texts, repeated=row.index != group.first)


def as_record(evaluation: Evaluation) -> dict[str, Any]:
    """The figures as plain data, for a file or a report."""
    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "rows": len(evaluation.rows),
        "reused": evaluation.reused,
        "seconds": evaluation.seconds,
        "metrics": {
            name: {**asdict(estimate), "unit": METRICS[name].unit, "better": METRICS[name].better}
            for name, estimate in evaluation.estimates.items()
        },
        "confusion": None if evaluation.confusion is None else asdict(evaluation.confusion),
    }


def wanted_text(layout: Template, example: Example) -> str:
    """The wanted answer: the target, the assistant's last turn, or all of the text."""
    if layout.target is not None:
        return example.fields.get(layout.target, "")
    if layout.chat:
        answers = [message.content for message in example.messages or () if message.role == "assistant"]
        return answers[-1] if answers else ""
    return written_out(layout, example)


def shown_input(layout: Template, example: Example) -> str:
    """The text before the answer, without virtual tokens."""
    if layout.target is None and not layout.chat:
        return ""
    return written_out(layout, example)


def written_out(layout: Template, example: Example) -> str:
    """The filled-in template as plain text, without slots, up to the target if it has one."""
    parts: list[str] = []
    for piece in layout.pieces:
        match piece:
            case Text(text):
                parts.append(text)
            case Field(name) if name == layout.target:
                break
            case Field(name):
                parts.append(example.fields.get(name, ""))
            case Messages():
                turns = list(example.messages or ())
                if turns and turns[-1].role == "assistant":
                    turns.pop()
                parts.append("\n".join(f"{message.role}: {message.content}" for message in turns))
            case Soft():
                pass
    return "".join(parts)


def digest_of(about: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """A hash of everything that a row's result depends on."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for example in examples:
        content = [
            example.row,
            dict(example.fields),
            repr(example.messages),
            *([example.references] if example.references else []),
        ]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def default_metrics(layout: Template, examples: Iterable[Example]) -> list[str]:
    """Metrics that suit the task: labels (few, short, repeated), an answer, or running text. The first one ranks."""
    if layout.target is None:
        return ["nll", "perplexity", "bits_per_byte"]
    counts: Counter[int] = Counter()  # of hashes of the labels, since there may be a million
    short, numbered = True, True
    for example in examples:
        label = wanted_text(layout, example).strip()
        short = short and len(label) <= LONGEST_LABEL
        if short:
            counts[hash(label)] += 1
        numbered = numbered and "####" in label
    if short and (len(counts) <= 2 or are_labels(counts.values())):
        return ["accuracy", "macro_f1", "nll"]
    if numbered:
        return ["numeric_match", "nll", "bits_per_byte"]
    return ["rouge_l", "chrf", "nll", "bits_per_byte"]


def read_gates(texts: Sequence[str]) -> list[tuple[Metric, float]]:
    """Parses texts such as `accuracy=0.8` into metrics with their limits. Raises RecipeError."""
    gates = []
    for text in texts:
        name, equals, limit = text.partition("=")
        if name.strip() not in METRICS or not equals:
            raise RecipeError(
                f"--fail-under {text}: wanted METRIC=LIMIT such as accuracy=0.8, METRIC one of {', '.join(METRICS)}."
            )
        try:
            gates.append((METRICS[name.strip()], float(limit)))
        except ValueError:
            raise RecipeError(f"--fail-under {text}: {limit!r} is not a number.") from None
    return gates


def demand(gates: Sequence[tuple[Metric, float]], estimates: Mapping[str, Estimate]) -> None:
    """Raises GateFailed, with one line per failed gate, unless every figure is at least as good as its limit.

    For a loss that means at most the limit. An unknown figure fails."""
    failed = []
    for metric, limit in gates:
        estimate = estimates[metric.name]
        fine = estimate.value >= limit if metric.better == "higher" else estimate.value <= limit
        if not fine:
            wanted = "at least" if metric.better == "higher" else "at most"
            failed.append(f"{metric.name}: found {estimate}, wanted {wanted} {limit:g}.")
    if failed:
        raise GateFailed("\n".join(failed))
