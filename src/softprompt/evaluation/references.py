"""The right texts of a row: its own wanted text, further ones in its row, and those of rows that ask the same."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softprompt.data.example import Example


@dataclass(frozen=True, slots=True)
class Group:
    """The wanted texts of rows that ask the same; `first` is the row that comes first among them."""

    texts: tuple[str, ...]
    first: int


class References:
    """The group of every row for which more than one text is right; None for all others.

    Inputs are compared by their hashes first, 8 bytes a row, and in full only where two hashes are equal, so that a
    million different inputs are not held at once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        input_of: Callable[[Example], str],
        wanted_of: Callable[[Example], Sequence[str]],
    ) -> None:
        self._groups: list[Group] = []
        self._group_of = array("q", [-1]) * len(examples)
        hashes = array("q", (hash(input_of(example)) for example in examples))
        order = array(
            "q", sorted(range(len(hashes)), key=hashes.__getitem__)
        )  # of equal hashes, in row order
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and hashes[order[end]] == hashes[order[start]]:
                end += 1
            rows = order[start:end]
            if len(rows) > 1 or examples[rows[0]].references:
                asking: dict[str, list[int]] = {}
                for row in rows:
                    asking.setdefault(input_of(examples[row]), []).append(row)
                for same in asking.values():
                    self._add(same, examples, wanted_of)
            start = end

    def _add(
        self, rows: list[int], examples: Sequence[Example], wanted_of: Callable[[Example], Sequence[str]]
    ) -> None:
        texts = tuple(dict.fromkeys(text for row in rows for text in wanted_of(examples[row])))
        if len(texts) > 1:
            for row in rows:
                self._group_of[row] = len(self._groups)
            self._groups.append(Group(texts, rows[0]))

    def __getitem__(self, row: int) -> Group | None:
        number = self._group_of[row]
        return None if number < 0 else self._groups[number]
