"""Data health: what in the rows themselves would make a comparison say less than it seems to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from softprompt.comparison.records import Health, SplitHealth
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import wanted_text
from softprompt.tuning.task import Task

LABELS = 60  # longer answers, or more of them, are texts and not labels
SHOWN = 20


def health(task: Task, judged: Sequence[Example], notes: Sequence[str] = ()) -> Health:
    """What is noted of the rows, lengths, truncation, duplicates within and between splits, contradictions, label balance."""
    splits, layout = task.splits, task.template
    parts: dict[str, Sequence[Example]] = {
        "train": splits.train,
        "validation": splits.validation,
        "judged": judged,
    }
    keys = {name: [_key(layout, example) for example in rows] for name, rows in parts.items()}
    trained, validated = set(keys["train"]), set(keys["validation"])
    answers: dict[str, set[str]] = {}
    for key, example in zip(keys["train"], parts["train"], strict=True):
        answers.setdefault(key, set()).add(wanted_text(layout, example).strip())
    labels = {wanted_text(layout, example).strip() for example in splits.train}
    unseen: set[str] = set()
    if layout.target and len(labels) <= LABELS:
        unseen = {wanted_text(layout, example).strip() for example in judged} - labels
    return Health(
        notes=(*splits.notes, *notes),
        splits={name: _split(task, rows, keys[name]) for name, rows in parts.items() if rows},
        judged_also_trained=sum(key in trained for key in keys["judged"]),
        judged_also_validated=sum(key in validated for key in keys["judged"]),
        validation_also_trained=sum(key in trained for key in keys["validation"]),
        contradictions=sum(len(texts) > 1 for texts in answers.values()) if layout.target else 0,
        labels_never_trained=tuple(sorted(unseen)[:SHOWN]),
    )


def _split(task: Task, rows: Sequence[Example], keys: Sequence[str]) -> SplitHealth:
    health = SplitHealth(len(rows), len(keys) - len(set(keys)))
    try:
        seen = task.preview(rows, show=0)
    except DataError as error:
        health = replace(health, problem=str(error))
    else:
        health = replace(
            health,
            lengths={name: float(length) for name, length in seen.lengths.items()},
            trained_tokens=seen.trained_tokens,
            truncated=seen.truncated,
            dropped=seen.dropped,
            too_long=seen.too_long,
            unlabelled=seen.unlabelled,
        )
    if task.template.target:
        counted = Counter(wanted_text(task.template, example).strip() for example in rows)
        health = replace(health, answers=len(counted))
        most = counted.most_common(1)[0][1]
        if len(counted) <= LABELS and most > 1:
            health = replace(
                health, labels=dict(counted.most_common(SHOWN)), most_frequent_share=most / len(rows)
            )
    return health


def _key(layout: Template, example: Example) -> str:
    """The input of a row without case and white space: two rows with the same key ask the same."""
    if example.messages:
        return repr(example.messages).lower()
    names = layout.inputs or layout.fields
    return "\x1f".join(" ".join(example.fields.get(name, "").lower().split()) for name in names)
