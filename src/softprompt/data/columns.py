"""Raw rows to examples: which column is which field, and what is wrong with a cell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from softprompt.data.example import Example, Message
from softprompt.data.files import Raw
from softprompt.data.template import did_you_mean
from softprompt.errors import DataError

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}  # ShareGPT and its kin
_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """What the user said about columns: see `load_splits`."""

    column: str | None
    fields: Mapping[str, str]
    messages: str | None
    target: str | None

    def examples(self, rows: Iterator[Raw], name: str, limit: int | None) -> tuple[Example, ...]:
        """Rows as frozen records of text.

        Raises DataError when there is no row, a column is missing, or cells that have to be text are not.
        """
        found: list[Example] = []
        learned = self.target or "text"  # the rest is only read, and may be blank
        blank: dict[str, list[int]] = {}
        for number, raw in enumerate(islice(rows, limit)):
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
                    _refuse_broken(text, f"{name}, row {number}, column {key!r}")
            found.append(Example(fields, self._turns(raw, f"{name}, row {number}"), number))
        if not found:
            raise DataError(f"{name} has no row. Give at least one.")
        for column, numbers in blank.items():
            shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            raise DataError(
                f"{name}: {len(numbers)} of {len(found)} rows have nothing in column {column!r} "
                f"(rows {shown}, counted from 0). Fill them in or take these rows out."
            )
        return tuple(found)

    def _asked(self) -> dict[str, str]:
        """Template names, and the column that each stands for, as far as the user named columns."""
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
        for field, column in wanted:
            if _reach(raw, column) is _MISSING:
                known = [str(one) for one in raw]
                setting = {self.column: "data.column", self.messages: "data.messages"}.get(
                    column, f"data.fields.{field}"
                )
                if field == self.target == column:
                    setting = "data.target"
                raise DataError(
                    f"{name} has no column {column!r}; it has: {', '.join(known) or 'none'}."
                    f"{did_you_mean(column, known)} Change {setting}."
                )

    def _turns(self, raw: Raw, where: str) -> tuple[Message, ...] | None:
        column = self.messages
        if column is None:
            if self.column is not None or self.fields:
                return None
            column = next(
                (one for one in ("messages", "conversations") if isinstance(raw.get(one), list)), None
            )
        if column is None:
            return None
        return _messages(_reach(raw, column), f"{where}, column {column!r}")


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
    """Text as it is; numbers and truth values as JSON writes them; None for all else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return None


def _text(raw: Raw, column: str, where: str) -> str | None:
    value = _reach(raw, column)
    if value is None or value is _MISSING:
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


def _refuse_broken(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a character (a lone surrogate, \\u{ord(text[error.start]):04x}) at {error.start}. "
            "Mend the file."
        ) from None


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if isinstance(value, Mapping) and all(isinstance(one, list) for one in value.values()):
        # a list of turns as arrow stores it: one list a key
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise DataError(
            f'{where}: no chat turns; wanted a list such as [{{"role": "user", "content": "..."}}, ...].'
        )
    return tuple(_message(one, f"{where}, turn {number}") for number, one in enumerate(value))


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, as multimodal chats have them
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
            for part in content
        ]
        content = None if None in texts else "".join(str(text) for text in texts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where}: it has {', '.join(map(str, turn)) or 'nothing'}; wanted a text under 'role' and one under "
            "'content' (or 'from' and 'value')."
        )
    _refuse_broken(content, where)
    return Message(_ROLES.get(role, role), content)
