"""Rows in the forms that other trainers read: recognised by their columns, and given a template and a target.

TRL's forms (huggingface.co/docs/trl/dataset_formats), Alpaca's (instruction, input, output) and ShareGPT's
(conversations of from and value). A chat under `messages` or `conversations` is read by `data.turns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompt.data.example import Shape

CHAT_COLUMNS = ("messages", "conversations")

_CHAT = Shape(
    "chat",
    "{messages}",
    None,
    "Rows are chats (column {column!r}): the base's chat template writes them, and the assistant's turns are learned.",
)
_ANSWER = Shape(
    "prompt and completion",
    "{prompt}{completion}",
    "completion",
    "Rows are prompts and completions: the completion is learned, as the answer to the prompt.",
)
_CHAT_ANSWER = Shape(
    "chat prompt and completion",
    "{messages}",
    None,
    "Rows are chat prompts and completions: the base's chat template writes them, and the completion is learned.",
)
_ALPACA = Shape(
    "instruction, input and output",
    "{prompt}\n\n{completion}",
    "completion",
    "Rows are instructions, inputs and outputs: {{prompt}} is the instruction and, after a blank line, the input; "
    "{{completion}} is the output, which is learned.",
)
SHAPES = (_CHAT, _ANSWER, _CHAT_ANSWER, _ALPACA)


def shape_of(raw: Mapping[str, Any]) -> Shape | None:
    """The form of a row, by its columns; None for rows of a text column, and for columns of no known form."""
    column = next((name for name in CHAT_COLUMNS if _turns(raw.get(name))), None)
    if column is not None:
        shape = _CHAT
    elif _turns(raw.get("prompt")) and _turns(raw.get("completion")):
        shape = _CHAT_ANSWER
    elif isinstance(raw.get("prompt"), str) and isinstance(raw.get("completion"), str):
        shape = _ANSWER
    elif isinstance(raw.get("instruction"), str) and isinstance(raw.get("output"), str):
        shape = _ALPACA
    else:
        return None
    if isinstance(raw.get("text"), str):
        return None  # the text column is what is learned by default
    return Shape(shape.name, shape.template, shape.target, shape.note.format(column=column))


def filled(raw: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The row with the fields, or the chat, that the shape's template names."""
    if shape.name == _CHAT_ANSWER.name:
        prompt, completion = raw.get("prompt"), raw.get("completion")
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            return raw
        # An assistant's turn inside the prompt is an example to read, not an answer to learn.
        read = [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in prompt]
        return {**raw, "messages": [*read, *completion]}
    if shape.name == _ALPACA.name:
        parts = [raw.get("instruction"), raw.get("input")]
        prompt = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
        return {**raw, "prompt": prompt, "completion": raw.get("output")}
    return raw


def _turns(cell: object) -> bool:
    """Whether a cell is a list of chat turns, or one list a key, as arrow may store it."""
    if isinstance(cell, Mapping):
        return bool(cell) and all(isinstance(column, list) for column in cell.values())
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], Mapping)
