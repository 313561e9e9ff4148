"""Held-out rows: drawn without replacement, in an order that only the seed determines."""

from __future__ import annotations

import random
from collections.abc import Sequence

from softprompt.data.example import Example
from softprompt.data.examples import Examples
from softprompt.data.labels import are_labels
from softprompt.errors import DataError

# What is held out for validation where nobody says: enough rows to choose a step by, few enough to be measured often.
DEFAULT_SHARE = 0.1
DEFAULT_LEAST = 10
DEFAULT_MOST = 1_000
DEFAULT_FROM_ROWS = 40  # of fewer rows, ten would be missed more than they help


class Draw:
    """Rows to draw from. Those that are left are the rows to learn from."""

    def __init__(self, rows: Sequence[Example], seed: int) -> None:
        self._rows = rows if isinstance(rows, Examples) else Examples(rows)
        self._order = list(range(len(rows)))
        random.Random(seed).shuffle(self._order)

    def take(self, count: int, part: str) -> Examples:
        """Draws `count` rows for `part`, in the order of the source. Raises DataError where none would be left."""
        if count >= len(self._order):
            raise DataError(
                f"data.{part} takes {count} rows, but {len(self._order)} are left, and at least 1 must stay to learn "
                f"from. Lower data.{part} or raise data.limit."
            )
        return self._taken(self._order[:count])

    def take_by_label(self, count: int, target: str | None) -> Examples:
        """Draws `count` rows with each label's share of them as it is among all rows, as far as whole rows allow."""
        groups: dict[str, list[int]] = {}
        for index in self._order:
            groups.setdefault(self._rows[index].fields.get(target or "", ""), []).append(index)
        if not are_labels(map(len, groups.values())):
            return self._taken(self._order[:count])
        exact = {label: count * len(group) / len(self._order) for label, group in groups.items()}
        quota = {label: int(share) for label, share in exact.items()}
        # Whole rows first, then the largest remainders; a label's last row stays to learn from.
        by_remainder = sorted(groups, key=lambda label: quota[label] - exact[label])
        for label in [label for label in by_remainder if len(groups[label]) > 1][
            : count - sum(quota.values())
        ]:
            quota[label] += 1
        return self._taken([index for label, group in groups.items() for index in group[: quota[label]]])

    def rest(self) -> Examples:
        return self._rows.select(sorted(self._order))

    def _taken(self, indices: Sequence[int]) -> Examples:
        taken = set(indices)
        self._order = [index for index in self._order if index not in taken]
        return self._rows.select(sorted(taken))


def default_count(rows: int) -> int:
    """The number of rows held out for validation by default; 0 of few."""
    if rows < DEFAULT_FROM_ROWS:
        return 0
    return min(DEFAULT_MOST, max(DEFAULT_LEAST, round(DEFAULT_SHARE * rows)))


def how_many(wanted: float | int, rows: int, part: str) -> int:
    """A share or a number of rows, as rows. Raises DataError for what is neither."""
    if isinstance(wanted, bool) or wanted < 0 or (isinstance(wanted, float) and not wanted < 1):
        raise DataError(
            f"data.{part} is {wanted}; wanted a share between 0 and 1 such as 0.1, a whole number of rows, "
            "the name of a split, or a file."
        )
    return wanted if isinstance(wanted, int) else max(1, round(wanted * rows))
