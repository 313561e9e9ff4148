"""Data health: what in the rows themselves would make a comparison say less than it seems to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import wanted_text
from softprompt.tuning.task import Task

LABELS = 60  # longer answers, or more of them, are texts and not labels
SHOWN = 20


def health(task: Task, judged: Sequence[Example]) -> dict[str, Any]:
    """Lengths, truncation, duplicates within and between splits, contradictions, label balance, as plain data."""
    splits, layout = task.splits, task.template
    parts: dict[str, Sequence[Example]] = {
        "train": splits.train,
        "validation": splits.validation,
        "judged": judged,
    }
    keys = {name: [_key(layout, one) for one in rows] for name, rows in parts.items()}
    found: dict[str, Any] = {"notes": list(splits.notes), "splits": {}}
    for name, rows in parts.items():
        if rows:
            found["splits"][name] = _split(task, rows, keys[name])
    known = set(keys["train"])
    found["judged_also_trained"] = sum(key in known for key in keys["judged"])
    found["validation_also_trained"] = sum(key in known for key in keys["validation"])
    chosen = set(keys["validation"])
    found["judged_also_validated"] = sum(key in chosen for key in keys["judged"])
    answers: dict[str, set[str]] = {}
    for key, one in zip(keys["train"], parts["train"], strict=True):
        answers.setdefault(key, set()).add(wanted_text(layout, one).strip())
    found["contradictions"] = sum(len(said) > 1 for said in answers.values()) if layout.target else 0
    trained_labels = {wanted_text(layout, one).strip() for one in splits.train}
    if layout.target and len(trained_labels) <= LABELS:
        unseen = {wanted_text(layout, one).strip() for one in judged} - trained_labels
        found["labels_never_trained"] = sorted(unseen)[:SHOWN]
    return found


def _split(task: Task, rows: Sequence[Example], keys: Sequence[str]) -> dict[str, Any]:
    layout = task.template
    record: dict[str, Any] = {"rows": len(rows), "duplicates": len(keys) - len(set(keys))}
    try:
        seen = task.preview(rows, show=0)
    except DataError as error:
        record["problem"] = str(error)
    else:
        record |= {
            "lengths": seen.lengths,
            "trained_tokens": seen.trained_tokens,
            "truncated": seen.truncated,
            "dropped": seen.dropped,
            "too_long": seen.too_long,
            "unlabelled": seen.unlabelled,
        }
    if layout.target:
        counted = Counter(wanted_text(layout, one).strip() for one in rows)
        record["answers"] = len(counted)
        if len(counted) <= LABELS and counted.most_common(1)[0][1] > 1:
            record["labels"] = dict(counted.most_common(SHOWN))
            record["most_frequent_share"] = counted.most_common(1)[0][1] / len(rows)
    return record


def _key(layout: Template, example: Example) -> str:
    """What is read, without regard to case and blanks: two rows of the same key ask the same."""
    if example.messages:
        return repr(example.messages).lower()
    names = layout.inputs or layout.fields
    return "\x1f".join(" ".join(example.fields.get(name, "").lower().split()) for name in names)
