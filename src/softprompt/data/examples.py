"""Many examples in little memory: their texts in one buffer, each Example made when it is asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from softprompt.data.example import Example, Message

_SHARED_TEXTS = 10_000  # so many different texts are looked up before they are stored again
_SHARED_LENGTH = 100  # characters; longer texts are seldom the same
_NOTHING = -(2**62)  # no text has this number


class _Store:
    """Texts by number, and the cells of every row.

    A Python string takes 50 bytes beside its characters, and the mapping of a row 200; here a text takes its UTF-8
    bytes and 8 more. Labels and other short texts that come again are stored once, and stay Python strings: they have
    the negative numbers.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        self._shared: list[str] = []
        self._candidates: dict[str, int] = {}
        self._names: list[tuple[str, ...]] = []  # the field names that rows have, each set of them once
        self._names_number: dict[tuple[str, ...], int] = {}
        self._row_names = array("i")
        self._row_cells = array("q", [0])
        self._cells = array("q")
        self._row_more = array("q")
        self._rows = array("q")

    def append(self, example: Example) -> None:
        names = tuple(example.fields)
        number = self._names_number.setdefault(names, len(self._names))
        if number == len(self._names):
            self._names.append(names)
        self._row_names.append(number)
        self._cells.extend([self._number(text) for text in example.fields.values()])
        self._row_cells.append(len(self._cells))
        self._row_more.append(self._more(example))
        self._rows.append(example.row)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, position: int) -> Example:
        names = self._names[self._row_names[position]]
        cells = self._cells[self._row_cells[position] : self._row_cells[position + 1]]
        more = self._row_more[position]
        turns, references = (None, ()) if more == _NOTHING else _read_more(self._text(more))
        return Example(
            {name: self._text(number) for name, number in zip(names, cells, strict=True)},
            turns,
            self._rows[position],
            references,
        )

    def _number(self, text: str) -> int:
        if len(text) > _SHARED_LENGTH:
            return self._stored(text)
        number = self._candidates.get(text)
        if number is None:
            number = self._stored(text)
            if len(self._candidates) < _SHARED_TEXTS:
                self._candidates[text] = number
        elif number >= 0:  # the second time: from here on it is shared
            self._shared.append(text)
            number = self._candidates[text] = -len(self._shared)
        return number

    def _stored(self, text: str) -> int:
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
        return len(self._ends) - 2

    def _text(self, number: int) -> str:
        if number < 0:
            return self._shared[-number - 1]
        return self._bytes[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass")

    def _more(self, example: Example) -> int:
        """The number of the text that holds the turns and references of a row, as JSON."""
        if example.messages is None and not example.references:
            return _NOTHING
        turns = None
        if example.messages is not None:
            turns = [[turn.role, turn.content, turn.more, turn.learned] for turn in example.messages]
        return self._number(json.dumps([turns, example.references], ensure_ascii=False))


def _read_more(written: str) -> tuple[tuple[Message, ...] | None, tuple[str, ...]]:
    turns, references = json.loads(written)
    if turns is None:
        return None, tuple(references)
    return tuple(
        Message(role, content, tuple((name, text) for name, text in more), learned)
        for role, content, more, learned in turns
    ), tuple(references)


class Examples(Sequence[Example]):
    """Examples behind the interface of a tuple. A slice, or a choice by `select`, shares the texts.

    Two of the same examples are equal, and equal to a tuple or list of them.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._store = _Store()
        for example in examples:
            self._store.append(example)
        self._places: Sequence[int] = range(len(self._store))

    def append(self, example: Example) -> None:
        """Adds an example while the set is being made; a choice or a slice of another set takes none."""
        assert isinstance(self._places, range)
        assert len(self._places) == len(self._store)
        self._store.append(example)
        self._places = range(len(self._store))

    def select(self, indices: Iterable[int]) -> Examples:
        """The examples at `indices`, in that order."""
        chosen = Examples()
        chosen._store = self._store
        chosen._places = array("q", [self._places[index] for index in indices])
        return chosen

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        position: int = self._places[index]
        return self._store.example(position)

    def __iter__(self) -> Iterator[Example]:
        return map(self._store.example, self._places)

    def __add__(self, other: Sequence[Example]) -> tuple[Example, ...]:
        return (*self, *other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Examples, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Examples({len(self):,})"
