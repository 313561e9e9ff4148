"""Rows of csv and tsv files: which separator, which quoting, and the line at which a file stops making sense."""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from softprompt.errors import DataError

Quoting: TypeAlias = Literal["auto", "double", "none"]

_SEPARATORS = (";", "\t", "|", ",")
_WHOLLY_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def delimited_rows(
    text: io.TextIOBase, sample: str, path: Path, usual: str, quoting: Quoting, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows of a text whose first line names the columns, all cells as text.

    `sample` is the beginning of the text, from which quoting is settled: cells of tabs that open with a quote and do
    not close it are taken as they are, if every line then has as many cells as the header. Raises DataError with the
    line for rows of another width, and for quotes that open and join lines by accident.
    """
    lines = _Lines(text)
    with _long_cells():
        first = next((line for line in lines if line.strip()), "")
        separator = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own first line
        if separator:
            usual, first = separator[1], next((line for line in lines if line.strip()), "")
        lines.record = [first]
        delimiter = _delimiter(first, usual, path, notes)
        unquoted = quoting == "none" or (
            quoting == "auto" and delimiter == "\t" and _reads_unquoted(sample, path, notes)
        )
        style: dict[str, Any] = {
            "delimiter": delimiter,
            "quoting": csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL,
        }
        reader = csv.reader(itertools.chain([first], lines), **style)
        try:
            header = [name.strip() for name in next(reader)]
            twice = {name for name in header if name and header.count(name) > 1}
            if twice:
                raise DataError(
                    f"{path} names the column {sorted(twice)[0]!r} twice. Give each column its own name."
                )
            lines.record = []
            for cells in reader:
                if len(lines.record) > 1:
                    _refuse_open_quote(lines, path, style)
                if not cells or (len(header) > 1 and cells == [""]):
                    lines.record = []
                    continue  # a blank line
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, {lines.where}: {len(cells)} cells, but the header has {len(header)} "
                        f"({', '.join(header)}). Put cells that contain {delimiter!r} or line breaks in double quotes."
                    )
                yield {name: cell for name, cell in zip(header, cells, strict=True) if name}
                lines.record = []
            _refuse_open_quote(lines, path, style)
        except csv.Error as error:
            raise DataError(f"{path}, {lines.where}: {error}. Save it again as csv.") from error


class _Lines:
    """The lines of a text, how many were read, and those of the row that is being read."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self.read = text, 0
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self.read += 1
        if self.read == 1:
            line = line.lstrip("\ufeff")  # a second byte order mark, which tools leave that add their own
        self.record.append(line)
        return line

    @property
    def where(self) -> str:
        first = self.read - len(self.record) + 1
        return f"line {self.read}" if len(self.record) < 2 else f"lines {first} to {self.read}"


def _refuse_open_quote(lines: _Lines, path: Path, style: dict[str, Any]) -> None:
    """Refuses a row of several lines whose quotes do not pair up: lines that no one meant to join."""
    if style["quoting"] == csv.QUOTE_NONE or not lines.record:
        return
    try:
        for _ in csv.reader(lines.record, strict=True, **style):
            pass
    except csv.Error:
        first = lines.read - len(lines.record) + 1
        at = first + _opened_last(lines.record)
        raise DataError(
            f"{path}, line {at}: a double quote opens a cell and is not closed as a cell is, so the lines up to "
            f"{lines.read} would be one cell. Close it, or set data.quoting to none if quotes are plain text."
        ) from None


def _opened_last(record: list[str]) -> int:
    """The line in `record` from which the following ones are joined: the first with an odd number of quotes."""
    return next((number for number, line in enumerate(record) if line.count('"') % 2), 0)


def _reads_unquoted(sample: str, path: Path, notes: list[str]) -> bool:
    """Whether quotes in a file of tabs are plain text: some cell opens one and does not close it, and every line has
    the cells of the header."""
    lines = [line for line in re.split(r"\r\n|\r|\n", sample) if line.strip()]
    opened = any(
        cell.startswith('"') and not _WHOLLY_QUOTED.fullmatch(cell)
        for line in lines
        if '"' in line
        for cell in line.split("\t")
    )
    if not opened or len({line.count("\t") for line in lines}) != 1:
        return False
    notes.append(
        f"{path}: cells open with a quote that they do not close, so quotes are read as plain text. "
        "Set data.quoting to double if they enclose cells."
    )
    return True


def _delimiter(first: str, usual: str, path: Path, notes: list[str]) -> str:
    """The separator of the header line's cells: the usual one, or another where the usual one would leave one cell."""
    if usual in first:
        return usual
    counts = {separator: first.count(separator) for separator in _SEPARATORS if separator in first}
    if not counts:
        return usual
    other = max(counts, key=lambda separator: counts[separator])
    notes.append(f"{path} separates its columns by {other!r}.")
    return other


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit()
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the usual limit, 131,072, is shorter than a book
    try:
        yield
    finally:
        csv.field_size_limit(before)
