"""What the labels of rows give away: rows that are sorted by them, a single one for all, and answers that are withheld."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, islice

from softprompt.data.example import Example
from softprompt.data.labels import are_labels

FEWEST = 20
"""Rows that say something of the others' order."""
SHOWN = 3
LONGEST_SHOWN = 40


def sorted_note(rows: Sequence[Example], target: str | None, setting: str) -> str | None:
    """A note where the first rows of more, which `setting` takes, have their labels one after another; else None."""
    if target is None or len(rows) < FEWEST:
        return None
    most = len(rows) // 4  # rows of one answer may come together too: those of one question, say
    runs = [
        label for label, _ in islice(groupby(example.fields.get(target, "") for example in rows), most + 1)
    ]
    if len(runs) > most or len(set(runs)) < len(runs):
        return None
    named = ", ".join(_quoted(label) for label in runs[:SHOWN]) + (", ..." if len(runs) > SHOWN else "")
    order = f"all have the {target} {named}" if len(runs) == 1 else f"come sorted by {target} ({named})"
    return (
        f"The first {len(rows):,} rows, which {setting} takes, {order}. If the rows behind them have others, these are left "
        "out: put the rows into a random order, or take all."
    )


def single_note(rows: Sequence[Example], target: str | None) -> str | None:
    """A note where all rows to learn from have one label; else None."""
    if target is None or len(rows) < FEWEST:
        return None
    labels = islice(groupby(example.fields.get(target, "") for example in rows), 2)
    (label, *others) = [label for label, _ in labels]
    if others:
        return None
    return f"All {len(rows):,} rows have the {target} {_quoted(label)}, so the prompt learns to say that to every input."


def variants_note(rows: Sequence[Example], target: str | None) -> str | None:
    """A note where labels differ in capitals or white space alone; None without such, and for answers that are no labels."""
    if target is None or len(rows) < FEWEST:
        return None
    counts = Counter(example.fields.get(target, "") for example in rows)
    if not are_labels(counts.values()):
        return None
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: -counts[label]):
        spellings.setdefault(" ".join(label.casefold().split()), []).append(label)
    several = [group for group in spellings.values() if len(group) > 1]
    if not several:
        return None
    first, *others = several[0]
    named = ", ".join(f"{_quoted(label)} ({counts[label]:,})" for label in others[:SHOWN])
    left = len(several) - 1
    more = "" if not left else " So is one more label." if left == 1 else f" So are {left:,} more labels."
    return (
        f"The {target} {_quoted(first)} ({counts[first]:,} rows) is also written {named}: these are learned, and judged, as different "
        f"answers.{more}"
    )


WITHHELD = "-1"
"""What GLUE and its copies write in place of the answers of their test splits."""


def withheld_note(
    rows: Sequence[Example], learned: Sequence[Example], target: str | None, split: str
) -> str | None:
    """A note where a split has one label for all rows, which none of the rows to learn from has: it can judge nothing."""
    if target is None or len(rows) < 2:
        return None
    (label, *others) = islice(groupby(example.fields.get(target, "") for example in rows), 2)
    found = label[0].strip()
    if others or (found != WITHHELD and len(rows) < FEWEST):
        return None
    labels = Counter(example.fields.get(target, "").strip() for example in learned)
    if found in labels or not are_labels(labels.values()):
        return None
    return (
        f"The split {split!r} is not taken by itself: all of its {len(rows):,} rows have the {target} {_quoted(found)}, which no row to learn "
        "from has, so its answers seem to be withheld."
    )


def _quoted(label: str) -> str:
    return repr(label if len(label) <= LONGEST_SHOWN else f"{label[: LONGEST_SHOWN - 3]}...")
