"""Counts of a metric for every row, in flat arrays: a million rows take megabytes, where mappings take gigabytes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, overload

Counts: TypeAlias = Mapping[str, float]


class RowCounts(Sequence[Counts]):
    """Counts behind the interface of a list: eight bytes a number, and the names of a row's counts stored once.

    Rows that count the same names share them, as all rows of most metrics do.
    """

    def __init__(self, counts: Iterable[Counts] = ()) -> None:
        self._names: list[tuple[str, ...]] = []
        self._number_of_names: dict[tuple[str, ...], int] = {}
        self._row_names = array("i")
        self._values = array("d")
        self._starts = array("q", [0])
        for row in counts:
            self.append(row)

    def append(self, counts: Counts) -> None:
        """Adds the counts of a row."""
        names = tuple(counts)
        number = self._number_of_names.setdefault(names, len(self._names))
        if number == len(self._names):
            self._names.append(names)
        self._row_names.append(number)
        self._values.extend(counts.values())
        self._starts.append(len(self._values))

    def summed(self) -> dict[str, float]:
        """The sum of every name over all rows, rounded once."""
        parts: dict[str, array[float]] = {}
        for counts in self:
            for name, count in counts.items():
                parts.setdefault(name, array("d")).append(count)
        return {name: math.fsum(values) for name, values in parts.items()}

    def __len__(self) -> int:
        return len(self._row_names)

    @overload
    def __getitem__(self, index: int) -> Counts: ...

    @overload
    def __getitem__(self, index: slice) -> RowCounts: ...

    def __getitem__(self, index: int | slice) -> Counts | RowCounts:
        if isinstance(index, slice):
            return RowCounts(map(self.__getitem__, range(*index.indices(len(self)))))
        row = range(len(self))[index]  # IndexError beyond the end; -1 is the last
        names = self._names[self._row_names[row]]
        return dict(zip(names, self._values[self._starts[row] : self._starts[row + 1]], strict=True))

    def __iter__(self) -> Iterator[Counts]:
        return map(self.__getitem__, range(len(self)))
