"""What are labels, which rows share, and what are answers of each row's own."""

from __future__ import annotations

from collections.abc import Iterable


def are_labels(rows_of_each: Iterable[int]) -> bool:
    """Whether targets are labels: at least half of the rows have one that another row has too.

    `rows_of_each` is the number of rows of each distinct target. Of 100 rows with 77 intents some 27 have an intent that no other
    of them has, so the number of distinct targets alone would say too little."""
    counts = list(rows_of_each)
    return 2 * counts.count(1) <= sum(counts)
