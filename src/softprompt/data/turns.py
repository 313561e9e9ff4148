"""Chat turns as data sets write them, to messages; what a turn says beside its text is kept, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softprompt.data.example import Message
from softprompt.data.memory import json_text
from softprompt.errors import DataError

_ROLES = {  # ShareGPT's names and their kin
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_CALL_ROLES = (
    "function_call",
    "function_response",
    "observation",
)  # turns of LLaMA-Factory's ShareGPT dialect
_WRITTEN = ("role", "from", "content", "value", "weight")
_MEANING = (  # what a chat template may write, and a reader of the text alone would miss
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
    "audio",
    "images",
    "prefix",
)


def messages_of(value: Any, where: str, system: object, note: Callable[[str], None]) -> tuple[Message, ...]:
    """The turns in a cell: a list of mappings, the same as JSON text, or one list a key.

    `system` is a text beside the turns that comes before them. `note` is called for keys that are left out.
    Raises DataError, with the turn, for what is no turn."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        # a list of turns as arrow stores it: one list a key
        if len({len(column) for column in value.values()}) > 1:
            raise DataError(f"{where}: its keys hold lists of unequal lengths. Give every turn each key.")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(
            f'{where}: no chat turns; wanted a list such as [{{"role": "user", "content": "..."}}, ...].'
        )
    messages = tuple(_message(turn, f"{where}, turn {number}", note) for number, turn in enumerate(value))
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        refuse_broken(system, f"{where}, column 'system'")
        return (Message("system", system), *messages)
    return messages


def tools_of(cell: object, where: str) -> str | None:
    """The functions that a chat may call, as JSON text; None where a row has none."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.strip() else None
        except (ValueError, RecursionError):
            raise DataError(
                f"{where}, column 'tools': not JSON. Give a list of function descriptions."
            ) from None
    if cell is None or (isinstance(cell, (list, dict)) and not cell):
        return None
    if not isinstance(cell, list) or not all(isinstance(tool, Mapping) for tool in cell):
        raise DataError(f"{where}, column 'tools': wanted a list of function descriptions (JSON objects).")
    return json_text([without_nulls(tool) for tool in cell])


def refuse_broken(text: str, where: str) -> None:
    """Raises DataError where `text` holds half a character, which no tokenizer and no UTF-8 file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a character (a lone surrogate, \\u{ord(text[error.start]):04x}) at {error.start}. "
            "Mend the text."
        ) from None


def without_nulls(value: Any) -> Any:
    """The same value without keys that hold null: arrow fills in every key that any row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _message(turn: Mapping[str, Any], where: str, note: Callable[[str], None]) -> Message:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    more = _more(turn, where, note)
    if isinstance(content, list):  # parts, as multimodal chats have them
        content = _joined(content, where)
    if content is None and any(key in ("tool_calls", "function_call") for key, _ in more):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where}: it has {', '.join(map(str, turn)) or 'nothing'}; wanted a text under 'role' and one under "
            "'content' (or 'from' and 'value')."
        )
    if role in _CALL_ROLES:
        raise DataError(
            f"{where}: the role {role!r} writes a function's call or result as text, which no chat template knows. "
            "Write calls as tool_calls of an assistant's turn, and results as turns of the role 'tool'."
        )
    refuse_broken(content, where)
    return Message(_ROLES.get(role, role), content, more, _learned(turn, where))


def _more(turn: Mapping[str, Any], where: str, note: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """The keys of a turn beside role and text, as JSON texts by name. Empty values are left out."""
    more = []
    for key, value in turn.items():
        if key in _WRITTEN or value is None or value == [] or value == "" or value is False:
            continue
        if key not in _MEANING:
            note(str(key))
            continue
        text = json_text(_calls(value) if key == "tool_calls" else without_nulls(value))
        refuse_broken(text, f"{where}, {key}")
        more.append((key, text))
    return tuple(more)


def _calls(calls: Any) -> Any:
    """Calls with their arguments as objects: templates write objects as JSON, and a JSON text in quotes."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return calls
    return [_call(without_nulls(call)) for call in calls]


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(read, dict):
            return {**call, "arguments": read}
    return call


def _learned(turn: Mapping[str, Any], where: str) -> bool:
    """OpenAI's `weight`: 0 marks an assistant's turn that is read and not learned."""
    weight = turn.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise DataError(f"{where}: weight is {weight!r}; wanted 1 (learned) or 0 (only read).")
    return bool(weight)


def _joined(parts: list[Any], where: str) -> str:
    kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
        raise DataError(
            f"{where}: a part of the type {other!r} beside text; wanted text alone. Leave the row out."
        )
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: a part without a text; wanted a text under 'text'.")
    return "".join(texts)
