"""A template: the order of fixed text, the fields of a row and the soft prompt, such as "{soft:20} {text}".

`{name}` is a field; `{soft:20}` a slot of 20 virtual tokens; `{messages}` a chat, rendered by the base's own chat
template; `{{` and `}}` are literal braces. Everything else is text, white space included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from softprompt.data.example import Example, Message
from softprompt.errors import DataError, RecipeError, did_you_mean


@dataclass(frozen=True)
class Text:
    """Fixed text, the same in every row."""

    text: str


@dataclass(frozen=True)
class Field:
    """The text that a row has under `name`."""

    name: str


@dataclass(frozen=True)
class Messages:
    """The row's chat turns, as the base's chat template writes them."""


@dataclass(frozen=True)
class Soft:
    """A slot of `length` virtual tokens. Several slots take the prompt's rows in order."""

    length: int


Piece = Text | Field | Messages | Soft

BLANKS = r"[^\S\r\n]+\Z"
"""White space at a text's end that goes with the target behind it: tokenizers merge it with the word that follows.

A line break is not among it: no tokenizer merges it with a word, and generation that stops at line ends would stop at once."""
MAX_QUOTED = 200  # characters of a template in a message
_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


@dataclass(frozen=True)
class Template:
    """Pieces in order. With a `target`, only that field (and fixed text after it) is learned; else all text."""

    pieces: tuple[Piece, ...]
    target: str | None = None

    @classmethod
    def parse(cls, source: str, *, target: str | None = None, length: int | None = None) -> Template:
        """Reads a template.

        `length` is the number of virtual tokens in all. It fills bare `{soft}` slots (what numbered slots leave
        over, shared evenly, earlier slots first) and must agree with numbered ones. A template without a slot
        gets one of `length` in front; without `length` too it has none.

        `target` names the field to learn. It occurs once, after every other field and every slot; fixed text
        behind it is learned with it, as an ending.

        Raises RecipeError for anything else.
        """
        if length is not None and length < 1:
            raise RecipeError(f"prompt.length is {length}; a prompt has at least 1 virtual token.")
        pieces = _with_lengths(_pieces(source), source, length)
        template = cls(pieces, target)
        _check(template, source)
        return template

    @property
    def soft_length(self) -> int:
        """Rows of the prompt that the template asks for; 0 without a slot."""
        return sum(piece.length for piece in self.pieces if isinstance(piece, Soft))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, each once, in order; `{messages}` is not among them."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields that must be known before generation: all but the target."""
        return tuple(name for name in self.fields if name != self.target)

    @property
    def chat(self) -> bool:
        """Whether the template is filled with chat messages."""
        return any(isinstance(piece, Messages) for piece in self.pieces)

    def example(self, text: str) -> Example:
        """The row that a bare `text` stands for: the template's one input, or one turn of the user.

        Raises DataError when the template has several inputs.
        """
        if self.chat:
            return Example({}, (Message("user", text),))
        if len(self.inputs) > 1:
            named = ", ".join(self.inputs)
            raise DataError(
                f'The template "{self}" has {len(self.inputs)} inputs ({named}), but one text was given. '
                "Give each of them by name."
            )
        return Example(dict.fromkeys(self.inputs, text))

    def without_slots(self) -> Template:
        """The template as the base alone reads it; text on both sides of a slot becomes one."""
        pieces: list[Piece] = []
        for piece in self.pieces:
            if isinstance(piece, Text) and pieces and isinstance(pieces[-1], Text):
                pieces[-1] = Text(pieces[-1].text + piece.text)
            elif not isinstance(piece, Soft):
                pieces.append(piece)
        return Template(tuple(pieces), self.target)

    def with_slot(self, *, at_answer: bool) -> str:
        """The source with one slot of no stated length: in front, or right before the target.

        Blanks before the target stay with it. Raises RecipeError where a slot is to be at the answer and no target is set."""
        pieces = self.without_slots().pieces
        if at_answer and self.target is None:
            raise RecipeError(
                f'prompt.place is answer, but "{_short(str(self))}" has no target: all of it is learned, or every turn of the '
                "assistant. Set data.target, or leave prompt.place out."
            )
        at = pieces.index(Field(str(self.target))) if at_answer else 0
        before, rest = str(Template(pieces[:at])), str(Template(pieces[at:]))
        kept = re.sub(BLANKS, "", before)
        return f"{kept}{{soft}}{before[len(kept) :]}{rest}"

    def __str__(self) -> str:
        """The source, with every slot's length written out: parsing it again gives the same pieces."""
        written = []
        for piece in self.pieces:
            match piece:
                case Text(text):
                    written.append(text.replace("{", "{{").replace("}", "}}"))
                case Field(name):
                    written.append("{" + name + "}")
                case Messages():
                    written.append("{messages}")
                case Soft(length):
                    written.append(f"{{soft:{length}}}")
        return "".join(written)


def has_slot(source: str) -> bool:
    """Whether a template as it was written has a slot of its own. Raises RecipeError as `Template.parse` does."""
    return any(piece is None or isinstance(piece, Soft) for piece in _pieces(source))


_Open = Text | Field | Messages | Soft | None  # None: a bare {soft}, its length not known yet


def _short(text: str) -> str:
    """A text as messages quote it."""
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def _pieces(source: str) -> list[_Open]:
    """Cuts `source` into pieces, neighbouring text joined."""
    pieces: list[_Open] = []
    for part in _TOKEN.findall(source):
        if part in ("{", "}"):
            raise RecipeError(
                f'The template "{_short(source)}" has a single {part!r}. Write {part * 2!r} for a literal brace, '
                "or {name} for a field."
            )
        if part in ("{{", "}}") or part[0] != "{":
            text = part[0] if part in ("{{", "}}") else part
            last = pieces[-1] if pieces else None
            if isinstance(last, Text):
                pieces[-1] = Text(last.text + text)
            else:
                pieces.append(Text(text))
        else:
            pieces.append(_slot(part[1:-1], source))
    return pieces


def _slot(inside: str, source: str) -> _Open:
    """Reads what is between a pair of braces."""
    name, colon, length = inside.partition(":")
    if name == "soft":
        if not colon:
            return None
        if not re.fullmatch(r"[0-9]+", length) or int(length) < 1:
            raise RecipeError(
                f'The template "{_short(source)}" has {{{inside}}}; a soft slot is {{soft:20}} with a whole number '
                "of at least 1, or {soft} to take prompt.length."
            )
        return Soft(int(length))
    if not inside or inside != inside.strip() or colon or "\n" in inside:
        raise RecipeError(
            f'The template "{_short(source)}" has {{{inside}}}, which names no field. Write {{name}} without spaces '
            "or a format; data.fields can give a column another name."
        )
    return Messages() if name == "messages" else Field(name)


def _with_lengths(open_pieces: list[_Open], source: str, length: int | None) -> tuple[Piece, ...]:
    """Gives bare slots their length, or puts a slot in front if there is none."""
    bare = sum(piece is None for piece in open_pieces)
    numbered = sum(piece.length for piece in open_pieces if isinstance(piece, Soft))
    if not bare and not numbered:
        front: list[Piece] = [] if length is None else [Soft(length)]
        return (*front, *(piece for piece in open_pieces if piece is not None))
    if bare and length is None:
        raise RecipeError(
            f'The template "{_short(source)}" has a {{soft}} without a length. Set prompt.length, or write {{soft:20}}.'
        )
    if length is not None and not bare and numbered != length:
        raise RecipeError(
            f'The template "{_short(source)}" has {numbered} virtual tokens, but prompt.length is {length}. '
            "Make them equal, or write {soft} to take prompt.length."
        )
    left = (length or 0) - numbered
    if bare and left < bare:
        raise RecipeError(
            f'The template "{_short(source)}" leaves {max(left, 0)} of prompt.length {length} for {bare} bare {{soft}}. '
            "Raise prompt.length or lower the numbered slots."
        )
    shares = iter([left // bare + (i < left % bare) for i in range(bare)] if bare else [])
    return tuple(Soft(next(shares)) if piece is None else piece for piece in open_pieces)


def _check(template: Template, source: str) -> None:
    """Refuses templates that nothing can be learned from."""
    pieces, target = template.pieces, template.target
    if not any(isinstance(piece, (Field, Messages)) for piece in pieces):
        raise RecipeError(
            f'The template "{_short(source)}" has no field, so every row would read the same. '
            'Name one, for example "{soft:20} {text}".'
        )
    if isinstance(pieces[-1], Soft):
        raise RecipeError(
            f'The template "{_short(source)}" ends with a soft slot: no text follows it, so it would learn nothing. '
            "Move it before the text that it should bring about."
        )
    if template.chat:
        if sum(isinstance(piece, Messages) for piece in pieces) > 1 or not isinstance(pieces[-1], Messages):
            raise RecipeError(f'The template "{_short(source)}" must have {{messages}} once and at its end.')
        if target is not None:
            raise RecipeError(
                f"The target is {target!r}, but {{messages}} learns the assistant's turns by itself. "
                "Leave data.target out, or write the template with fields."
            )
        return
    if target is None:
        return
    shown_at = [i for i, piece in enumerate(pieces) if piece == Field(target)]
    if not shown_at:
        raise RecipeError(
            f'The target {target!r} is not in the template "{_short(source)}".'
            f"{did_you_mean(target, template.fields)} Put {{{target}}} where the answer belongs."
        )
    if len(shown_at) > 1:
        raise RecipeError(
            f'The template "{_short(source)}" shows the target {target!r} {len(shown_at)} times, so the answer would '
            "be read before it is asked for. Keep the last one."
        )
    after = pieces[shown_at[0] + 1 :]
    if not all(isinstance(piece, Text) for piece in after):
        raise RecipeError(
            f'In the template "{_short(source)}" a field or soft slot comes after the target {target!r}. '
            "The target comes last; only fixed text may follow it."
        )
