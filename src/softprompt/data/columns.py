"""Raw rows to examples: which column is which field, and what is wrong with a cell."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from softprompt.data.example import EXAMPLE_REFERENCES, Example, Message, Shape
from softprompt.data.examples import Examples
from softprompt.data.files import Number, Raw
from softprompt.data.shapes import CHAT_COLUMNS, SHAPES, filled, shape_of
from softprompt.data.turns import messages_of, refuse_broken, tools_of
from softprompt.errors import DataError, did_you_mean

_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """The columns that the user named: see `load_splits`."""

    column: str | None
    fields: Mapping[str, str]
    messages: str | None
    target: str | None
    shape: Shape | None = None
    references: str | None = None

    @property
    def learned(self) -> str | None:
        """The field that is learned, where one is named or the rows' form has one."""
        return self.target or (self.shape.target if self.shape is not None else None)

    def shaped(self, raw: Raw) -> Columns:
        """These columns completed by the form that a row shows, unless the user named one."""
        names = {shape.target for shape in SHAPES} if self.target is not None else {None}
        if self.column is not None or self.fields or self.messages is not None or self.target not in names:
            return self
        return replace(self, shape=None if self.target in raw else shape_of(raw))

    def examples(self, rows: Iterator[Raw], name: str, limit: int | None, notes: list[str]) -> Examples:
        """Rows as frozen records of text; what is left out of them is added to `notes`.

        Raises DataError when there is no row, a column is missing, or cells that have to be text are not.
        """
        examples = Examples()
        learned = self.target or "text"  # the rest is only read, and may be blank
        blank: dict[str, list[int]] = {}
        left_out: dict[str, None] = {}  # keys of chat turns, in the order in which they come
        for number, raw in enumerate(islice(rows, limit)):
            if self.shape is not None:
                raw = filled(raw, self.shape)
            if number == 0:
                self._check_columns(raw, name)
            fields = {key: text for key, value in raw.items() if (text := _scalar(value)) is not None}
            for field, column in self._asked().items():
                text = _text(raw, column, f"{name}, row {number}")
                fields.pop(field, None)
                if text is not None:
                    fields[field] = text
                if text is None or (field == learned and not text.strip()):
                    blank.setdefault(column, []).append(number)
            for key, text in fields.items():
                if not text.isascii():
                    refuse_broken(text, f"{name}, row {number}, column {key!r}")
            turns = self._turns(raw, f"{name}, row {number}", left_out)
            if turns is not None and "tools" in raw:
                fields.pop("tools", None)
                tools = tools_of(raw["tools"], f"{name}, row {number}")
                fields |= {} if tools is None else {"tools": tools}
            references = self._references(raw, f"{name}, row {number}")
            examples.append(Example(fields, turns, number, references))
        if not examples:
            raise DataError(f"{name} has no row. Give at least one.")
        for column, numbers in blank.items():
            shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            raise DataError(
                f"{name}: {len(numbers)} of {len(examples)} rows have nothing in column {column!r} "
                f"(rows {shown}, counted from 0). Fill them in or take these rows out."
            )
        if left_out:
            notes.append(
                f"{name}: chat turns have keys that are left out ({', '.join(left_out)}): they are no part of the chat."
            )
        return examples

    def _asked(self) -> dict[str, str]:
        """Template names, and the column that each takes, as far as the user named columns."""
        asked = dict(self.fields)
        if self.column is not None:
            asked.setdefault("text", self.column)
        if self.target is not None and self.target not in asked:
            asked[self.target] = self.target
        return asked

    def _check_columns(self, raw: Raw, name: str) -> None:
        wanted = [*self._asked().items()]
        if self.messages is not None:
            wanted.append(("messages", self.messages))
        if self.references is not None:
            wanted.append(("references", self.references))
        for field, column in wanted:
            if _reach(raw, column) is _MISSING:
                names = [str(key) for key in raw]
                setting = {
                    self.column: "data.column",
                    self.messages: "data.messages",
                    self.references: "data.references",
                }.get(column, f"data.fields.{field}")
                if field == self.target == column:
                    setting = "data.target"
                raise DataError(
                    f"{name} has no column {column!r}; it has: {', '.join(names) or 'none'}."
                    f"{did_you_mean(column, names)} Change {setting}."
                )

    def _references(self, raw: Raw, where: str) -> tuple[str, ...]:
        """The texts in the column of references; none where the cell is missing. Raises DataError for anything else."""
        column = self.references or EXAMPLE_REFERENCES
        cell = _reach(raw, column)
        if cell is None or cell is _MISSING or _is_nan(cell):
            return ()
        if hasattr(cell, "tolist"):  # an array, as frames hold lists
            cell = cell.tolist()
        texts = [_scalar(item) for item in cell] if isinstance(cell, list | tuple) else [None]
        if any(text is None for text in texts):
            kind = "a list of other things" if isinstance(cell, list | tuple) else type(cell).__name__
            raise DataError(
                f"{where}, column {column!r}: found {kind}, wanted a list of texts. "
                "Change data.references, or store each cell as a list (jsonl or parquet)."
            )
        return tuple(text for text in texts if text is not None)

    def _turns(self, raw: Raw, where: str, left_out: dict[str, None]) -> tuple[Message, ...] | None:
        column = self.messages
        if column is None:
            if self.column is not None or self.fields:
                return None
            column = next((name for name in CHAT_COLUMNS if isinstance(raw.get(name), list)), None)
            if column is None and self.shape is not None and "{messages}" in self.shape.template:
                column = next((name for name in CHAT_COLUMNS if raw.get(name) is not None), CHAT_COLUMNS[0])
        if column is None:
            return None
        cell = _reach(raw, column)
        system = raw.get("system") if column != "system" else None
        return messages_of(
            cell, f"{where}, column {column!r}", system, lambda key: left_out.setdefault(key, None)
        )


def _reach(raw: Raw, column: str) -> Any:
    """The cell of a column; a dotted name reaches into nested values: instances.0.output."""
    if column in raw:
        return raw[column]
    value: Any = raw
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _MISSING
    return value


def _scalar(value: object) -> str | None:
    """Text as it is; numbers and truth values as JSON writes them; None for all else, missing values among it.

    NaN, in JSON, parquet and frames, marks a missing value."""
    if isinstance(value, str):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a numpy scalar, as frames and arrays hold them
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Number):
        return value.written
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return None


def _is_nan(value: object) -> bool:
    """Whether a cell is one of the marks for a missing value: NaN, pandas' NA and NaT."""
    return (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType")


def _text(raw: Raw, column: str, where: str) -> str | None:
    value = _reach(raw, column)
    if value is None or value is _MISSING or _is_nan(value):
        return None
    text = _scalar(value)
    if text is None:
        kind = "a list" if isinstance(value, (list, tuple)) else type(value).__name__
        hint = ""
        if isinstance(value, Mapping) and value:
            hint = f" Perhaps {column}.{next(iter(value))} is meant."
        elif isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0]:
            hint = f" Perhaps {column}.0.{next(iter(value[0]))} is meant."
        raise DataError(f"{where}, column {column!r}: {kind}, but text or a number is wanted.{hint}")
    return text
