"""A run's losses by step, read from its metrics.jsonl, and their smoothing. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.errors import DataError
from softprompt.store.plain_file import read_bytes

EVENTS = "metrics.jsonl"

DRAWN_AS_LINE = 3  # two points joined would look measured in between
LOGARITHMIC_FROM = 5.0  # highest over lowest loss

Points: TypeAlias = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """A run's losses by step, in nats per trained token: of each step's rows, held out, and of the base alone.

    Of a run that held nothing out (`has_held_out`) `held_out` are the losses of all its training rows."""

    name: str
    training: Points
    held_out: Points
    base: float
    has_held_out: bool = True


def read_curves(folder: Path) -> Curves:
    """The curves of a run. Raises DataError where its events cannot be read."""
    path = folder / EVENTS
    try:
        text = read_bytes(path).decode("utf-8", "replace")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Give the folder of a run, which `softprompt tune` wrote."
        ) from None
    training: dict[float, float] = {}
    held_out: dict[float, float] = {}
    base, has_held_out = math.nan, True
    for line in text.split("\n"):
        try:
            event: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that is still going, or was killed
        if not isinstance(event, dict):
            continue
        kind, step, nll = event.get("event"), _number(event.get("step")), _number(event.get("nll"))
        if kind == "Started":
            base = _number(event.get("baseline_nll"))
            has_held_out = event.get("validation_examples") != 0
        elif kind in ("Stepped", "Validated") and math.isfinite(step) and math.isfinite(nll):
            (training if kind == "Stepped" else held_out)[step] = nll
    return Curves(folder.name, tuple(training.items()), tuple(held_out.items()), base, has_held_out)


def smoothed(points: Points, share: float = 0.05) -> Points:
    """Each point as the mean of those around it, `share` of all of them."""
    reach = max(0, round(len(points) * share / 2))
    return tuple(
        (step, sum(y for _, y in near) / len(near))
        for n, (step, _) in enumerate(points)
        if (near := points[max(0, n - reach) : n + reach + 1])
    )


def is_logarithmic(losses: Sequence[float]) -> bool:
    """Whether an axis of these losses is logarithmic: they fall by orders of magnitude, and the differences that matter are small."""
    return min(losses) > 0 and max(losses) >= LOGARITHMIC_FROM * min(losses)


def _number(value: Any) -> float:
    """A number as it is, and nan for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
