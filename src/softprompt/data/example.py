"""Rows of data as frozen records of text, independent of the file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXAMPLE_REFERENCES = "(references of an Example)"
"""The column in which an Example's references travel when it is read as a row."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; `role` is what the base's chat template calls it (system, user, assistant).

    `more` is what the turn has beside its text, as JSON texts by name (tool_calls, name, ...): the chat template writes
    it. An assistant's turn that is not `learned` is only read."""

    role: str
    content: str
    more: tuple[tuple[str, str], ...] = ()
    learned: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its named texts, its chat turns if it has any, and its place in the source.

    `row` counts from 0 and leaves out a header; -1 means text that came from no file. `references` are further
    right answers beside the target, which is the answer that is learned.
    """

    fields: Mapping[str, str]
    messages: tuple[Message, ...] | None = None
    row: int = -1
    references: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """This row's name in error messages."""
        return "this text" if self.row < 0 else f"row {self.row} (counted from 0)"


@dataclass(frozen=True)
class Shape:
    """A known form of rows, and what to learn from them where a recipe names no template: said by `note`."""

    name: str
    template: str
    target: str | None
    note: str


@dataclass(frozen=True)
class Splits:
    """The rows to learn from, to choose by and to judge on; they share none unless the user's files do.

    `source` is where they came from, `revision` the commit of a hub data set or `sha256:...` of a local file
    (None when unknown). `notes` are sentences on whatever had to be assumed while reading: show them.
    `shape` is the known form of the rows, where no column was named (TRL, Alpaca, ShareGPT).
    """

    train: Sequence[Example]
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()
    source: str = ""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    shape: Shape | None = None
