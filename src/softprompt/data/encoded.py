"""Encoded rows: one row position by position, and many of them in flat arrays, nine bytes a position."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload


@dataclass(slots=True)
class Encoded:
    """One row, position by position (S = virtual and text positions together).

    `ids` holds 0 at virtual positions; `soft` holds -1 at tokens, else the row of the prompt; `trained` marks the
    tokens that are predicted and counted. `text_bytes` are the UTF-8 bytes that the trained tokens encode (an end
    token encodes none). `cut` counts the tokens that truncation took away. `special` counts the
    tokenizer's own tokens at the start of the text (BOS), `end` those appended after it (EOS). `altered` is trained
    text that the tokenizer does not keep, and what is left of it.
    """

    ids: list[int]
    soft: list[int]
    trained: list[bool]
    row: int
    text_bytes: int
    cut: int = 0
    special: int = 0
    end: int = 0
    altered: tuple[str, str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)

    def behind_slot(self, length: int) -> Encoded:
        """The row with `length` virtual positions in front."""
        return replace(
            self,
            ids=[*[0] * length, *self.ids],
            soft=[*range(length), *self.soft],
            trained=[*[False] * length, *self.trained],
        )


class EncodedRows(Sequence[Encoded]):
    """Encoded rows in flat arrays, read like a list: each Encoded is built when it is indexed.

    Lists of Python numbers take some 50 bytes a position, these arrays 9, so that a million short rows fit into a few
    hundred megabytes. Sets of the same rows are equal, also to a list of them.
    """

    def __init__(self, rows: Iterable[Encoded] = ()) -> None:
        self._starts = array("q", [0])
        self._ids = array("i")
        self._soft = array("i")
        self._trained = bytearray()
        self._numbers = array("q")  # row, text_bytes, cut, special, end of every row
        self._altered: dict[int, tuple[str, str]] = {}
        for row in rows:
            self.append(row)

    def append(self, row: Encoded) -> None:
        """Adds a row."""
        if row.altered is not None:
            self._altered[len(self)] = row.altered
        self._ids.extend(row.ids)
        self._soft.extend(row.soft)
        self._trained.extend(row.trained)
        self._numbers.extend((row.row, row.text_bytes, row.cut, row.special, row.end))
        self._starts.append(len(self._ids))

    @property
    def lengths(self) -> list[int]:
        """Positions of every row, virtual ones included."""
        return [stop - start for start, stop in zip(self._starts, self._starts[1:], strict=False)]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative ones from the end; IndexError beyond it
        start, stop = self._starts[number], self._starts[number + 1]
        row, text_bytes, cut, special, end = self._numbers[5 * number : 5 * number + 5]
        return Encoded(
            self._ids[start:stop].tolist(),
            self._soft[start:stop].tolist(),
            list(map(bool, self._trained[start:stop])),
            row,
            text_bytes,
            cut,
            special,
            end,
            self._altered.get(number),
        )

    def __iter__(self) -> Iterator[Encoded]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (EncodedRows, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"EncodedRows({len(self):,} rows, {len(self._ids):,} positions)"
