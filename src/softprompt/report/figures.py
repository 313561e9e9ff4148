"""Figures as people read them. What is not known says so."""

from __future__ import annotations

import math
from typing import Any

from softprompt.comparison.records import Figure, MetricFigure
from softprompt.evaluation.interval import Difference
from softprompt.progress.console import size as size

UNKNOWN = "unknown"


def known(value: Any) -> bool:
    """Whether a record's figure is a number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if known(value) else UNKNOWN


def count(value: Any) -> str:
    """A whole number with its thousands parted: 6,836,736; a mean that is not whole keeps a digit."""
    if not known(value):
        return UNKNOWN
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.1f}"


def seconds(value: Any) -> str:
    if not known(value):
        return UNKNOWN
    if value < 0.95:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def estimate(figure: Figure | MetricFigure, *, rows: bool = False) -> str:
    """0.750 ± 0.031"""
    if not known(figure.value):
        return UNKNOWN
    digits = 1 if abs(figure.value) >= 100 else 2 if abs(figure.value) >= 10 else 3
    spread = number(figure.stderr, digits)
    return f"{figure.value:.{digits}f} ± {spread}" + (f" (n={figure.n})" if rows else "")


def difference(difference: Difference | None) -> str:
    """-0.120 [-0.180, -0.060]"""
    if difference is None or not known(difference.value):
        return UNKNOWN
    if difference.low == difference.high == difference.value == 0:
        return "none on any row"
    return f"{difference.value:+.3f} [{number(difference.low)}, {number(difference.high)}]".replace(
        "-", "\u2212"
    )


def sure(difference: Difference | None) -> bool:
    """Whether a difference is significant: its 95 % interval excludes 0."""
    return difference is not None and known(difference.low) and known(difference.high) and difference.sure
