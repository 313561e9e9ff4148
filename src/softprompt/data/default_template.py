"""The layout of rows whose columns are named and whose template is not: named lines, or one exchange of a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.data.example import Example
from softprompt.data.template import Field, Piece, Template, Text
from softprompt.data.tokenizer import Tokenizer
from softprompt.errors import DataError

CHAT = "chat"
"""What `data.template` says for the base's own chat template."""

_MARK = re.compile("\ue000(\\d+)\ue001")  # private characters: no chat template and no row writes them
_NUMBERING = re.compile(r"(?i)(row_?|example_?)?(idx|index|i?d|[gu]u?id)|unnamed: \d+|.*_(id|idx)")


def input_columns(
    examples: Sequence[Example], target: str, column: str | None = None
) -> tuple[list[str], list[str]]:
    """The columns that a row's target is learned from, and those that are left out.

    `text` alone if there is one. Else every column that all rows have, but for row numbers and for columns that
    only say the target in other words (the number of a label and its name). Raises DataError where none is left."""
    fields = [name for name in examples[0].fields if name not in (target, "tools")]
    if column is not None or "text" in fields:
        return ["text"], [name for name in fields if name not in ("text", column)]
    chosen = [
        name
        for name in fields
        if not is_numbering(name)
        and all(name in example.fields for example in examples)
        and not _says_the_same(examples, name, target)
    ]
    if not chosen:
        raise DataError(
            f"Rows have no column to tell {target!r} from; they have: {', '.join(fields) or 'no other'}. "
            "Set data.template to name the columns that are read."
        )
    return chosen, [name for name in fields if name not in chosen]


def is_numbering(column: str) -> bool:
    """Whether a column numbers the rows or names them, by its own name: idx, id, user_id."""
    return _NUMBERING.fullmatch(column) is not None


def named_lines(inputs: Sequence[str]) -> str:
    """One input as it is; several a line each, by name."""
    if len(inputs) == 1:
        return f"{{{inputs[0]}}}"
    return "\n".join(f"{_titled(name)}: {{{name}}}" for name in inputs)


def lines_template(inputs: Sequence[str], target: str) -> str:
    """The inputs, and the target on its own line; without a slot."""
    return f"{named_lines(inputs)}\n{_titled(target)}: {{{target}}}"


def _titled(name: str) -> str:
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _says_the_same(examples: Sequence[Example], name: str, target: str) -> bool:
    """Whether a column and the target name each other's values, as a label and its number do."""
    pairs = {(example.fields[name], example.fields.get(target, "")) for example in examples}
    values, answers = {value for value, _ in pairs}, {answer for _, answer in pairs}
    # Answers that never repeat say nothing of the kind: every text has a different one.
    return len(pairs) == len(values) == len(answers) < len(examples)


@dataclass(frozen=True)
class ColumnChat:
    """Columns as one exchange: the user's turn, a template without slots such as "{text}", and the field that the
    assistant says."""

    user: Template
    target: str

    @classmethod
    def of(cls, inputs: Sequence[str], target: str) -> ColumnChat:
        """The exchange of these columns."""
        return cls(Template.parse(named_lines(inputs)), target)

    def layout(self, tokenizer: Tokenizer, *, front: str = "", shots: Sequence[Example] = ()) -> Template:
        """The rendering of a row by the base's chat template, as a template of fields without a slot.

        `front` opens the user's first turn; `shots` are rows that are shown solved, as exchanges before this one. The
        answer begins where generation would begin it, and its closing mark follows it. Raises DataError without a chat
        template, or where it does not write the turns one after the other."""
        pieces: list[Piece] = [*self.user.pieces, Field(self.target)]
        turns: list[dict[str, str]] = []
        for shot in shots:
            question = front + "".join(_written(piece, shot) for piece in self.user.pieces)
            turns += [{"role": "user", "content": question}]
            turns += [{"role": "assistant", "content": shot.fields[self.target]}]
            front = ""
        # Each field is one private mark in the rendering, which is then cut there.
        asked = front + "".join(
            piece.text if isinstance(piece, Text) else f"\ue000{number}\ue001"
            for number, piece in enumerate(self.user.pieces)
        )
        last = len(pieces) - 1
        turns.append({"role": "user", "content": asked})
        before = _rendered(tokenizer, turns, prompt=True)
        turns.append({"role": "assistant", "content": f"\ue000{last}\ue001"})
        whole = _rendered(tokenizer, turns, prompt=False)
        parts = _MARK.split(whole)
        fields = [number for number, piece in enumerate(pieces) if isinstance(piece, Field)]
        read = whole.partition(f"\ue000{last}\ue001")[0]
        if list(map(int, parts[1::2])) != fields or not read.startswith(before.rstrip()):
            raise DataError(
                "The base's chat template does not write a user's and an assistant's turn one after the other, so its "
                "text cannot be parted into fields. Write data.template with fields."
            )
        if parts[-1].strip():
            parts[-1] = parts[-1].rstrip()  # the closing mark, without the line break before a next turn
        cut: list[Piece] = []
        for number, part in enumerate(parts):
            if number % 2:
                cut.append(pieces[int(part)])
            elif part:
                cut.append(Text(part))
        return Template(tuple(cut), self.target)


def _written(piece: Piece, example: Example) -> str:
    return (
        piece.text
        if isinstance(piece, Text)
        else example.fields[piece.name]
        if isinstance(piece, Field)
        else ""
    )


def _rendered(tokenizer: Tokenizer, turns: Sequence[dict[str, str]], *, prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "data.template is chat, but the base's tokenizer has no chat template. Use a chat base, or a template of "
            "fields."
        )
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # whatever the template's author or jinja raises
        raise DataError(
            f"The base's chat template refuses a user's and an assistant's turn: {str(error).strip()}. "
            "Write data.template with fields."
        ) from error
