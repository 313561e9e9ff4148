"""How often a run measures its held-out loss, and on how many rows: measuring must not take longer than learning.

A row that is learned from is read forward and backward through frozen weights, which is about twice the work of measuring it.
So measurements that read as many rows in all as the run learns from take half as long as learning."""

from __future__ import annotations

MOST, LEAST = 10, 2
"""Measurements on the way, that at the last step among them: a prompt is best somewhere in the middle when rows are few."""
BESIDES = 2
"""Further ones: the start, and the base alone."""
LEAST_ROWS = 64
"""Fewer would choose a step by chance."""


def rows_measured(available: int, learned: int, *, times: int = MOST) -> int:
    """How many of the `available` rows each of `times` measurements reads in a run that learns from `learned` rows."""
    return min(available, max(LEAST_ROWS, learned // (times + BESIDES)))


def measurements(rows: int, learned: int) -> int:
    """How many measurements of `rows` rows there are on the way in a run that learns from `learned` rows."""
    return max(LEAST, min(MOST, learned // rows - BESIDES))
