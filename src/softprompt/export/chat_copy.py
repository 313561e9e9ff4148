"""The chat template of a merged copy: it writes the added tokens where the prompt's slots are, in a chat of one question.

A prompt of `{messages}` has its slots in front of the chat. A prompt learned with `data.template: chat` has a template of
fields, which is what the base's chat template writes for a user's turn: there the added tokens come before the chat, in
the user's own words, or where the answer begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from softprompt.data.template import Field, Messages, Piece, Soft, Template, Text

_WORDS = "\ue000\ue001"  # stands for the user's words: no chat template writes private characters


@dataclass(frozen=True)
class ChatCopy:
    """`chat_template` for the merged copy's tokenizer, and what the user's turn has to be, as a template of fields."""

    chat_template: Any
    message: str


def chat_copy(layout: Template, names: Sequence[str], tokenizer: Any) -> ChatCopy | None:
    """The chat template that writes `layout` with the tokens `names` in its slots.

    None where the base has no chat template, or where `layout` is not what it writes for a user's turn."""
    original = getattr(tokenizer, "chat_template", None)
    if not original:
        return None
    if layout.chat:
        head = written(layout, names)
        return ChatCopy(_each(original, lambda source: _before(head, source)), "{messages}")
    parts = _parts(layout, tokenizer)
    if parts is None:
        return None
    left = iter(names)
    head, message, tail = (_filled(pieces, left) for pieces in (parts.head, parts.message, parts.tail))
    if parts.head_text == "" and tail == parts.cut_text:
        chat_template = _each(original, lambda source: _before(head, source))
    else:
        chat_template = _each(original, lambda source: _around(source, parts, head, tail))
    return (
        ChatCopy(chat_template, message)
        if _rendered(tokenizer, message, chat_template) == written(layout, names)
        else None
    )


def written(layout: Template, names: Sequence[str]) -> str:
    """A template with the tokens `names` in its slots; its fields stay as they are, and the target is left out."""
    pieces = layout.pieces
    target = Field(layout.target or "")
    return _filled(pieces[: pieces.index(target)] if target in pieces else pieces, iter(names))


@dataclass(frozen=True)
class _Parts:
    """A layout up to its answer, cut where the base's chat template cuts it.

    `head` ends with the last slot before the user's words and has the text `head_text`; `message` is the user's words;
    `tail` is what comes from the first slot, or from the first difference from the chat template, up to the answer, in
    place of the chat template's own `cut_text`."""

    head: tuple[Piece, ...]
    head_text: str
    message: tuple[Piece, ...]
    tail: tuple[Piece, ...]
    cut_text: str


def _parts(layout: Template, tokenizer: Any) -> _Parts | None:
    rendered = _rendered(tokenizer)
    target = Field(layout.target or "")
    if rendered is None or rendered.count(_WORDS) != 1 or target not in layout.pieces:
        return None
    before, after = rendered.split(_WORDS)
    # A slot or a field counts as one item, a text as many as it has characters: so every place has a number.
    items = list(_items(layout.pieces[: layout.pieces.index(target)]))
    fields = [index for index, item in enumerate(items) if isinstance(item, Field)]
    if not fields:
        return None
    opening, closing = items[: fields[0]], items[fields[-1] + 1 :]
    # The user's words end where the chat template closes the turn.
    closed_at = _text(closing).find(after.rstrip())
    if not _text(opening).startswith(before) or closed_at < 0 or not after.rstrip():
        return None
    words_start, words_end = _place(opening, len(before)), _place(closing, closed_at)
    while words_start < len(opening) and isinstance(opening[words_start], Soft):
        words_start += 1  # a slot right before the user's words is written by the chat template
    head_end = max((index + 1 for index in range(words_start) if isinstance(opening[index], Soft)), default=0)
    # Where the answer's turn opens with more than generation's opening (an empty thought, say), or has a slot, the rest
    # is written in place of the chat template's own.
    agree = _agreeing(after, _text(closing[words_end:]))
    slots = [index for index in range(words_end, len(closing)) if isinstance(closing[index], Soft)]
    tail_start = min([_place(closing, closed_at + agree), *slots])
    return _Parts(
        head=tuple(opening[:head_end]),
        head_text=_text(opening[:head_end]),
        message=(*opening[words_start:], *items[fields[0] : fields[-1] + 1], *closing[:words_end]),
        tail=tuple(closing[tail_start:]),
        cut_text=after[len(_text(closing[words_end:tail_start])) :],
    )


def _rendered(tokenizer: Any, words: str = _WORDS, chat_template: Any = None) -> str | None:
    """One turn of the user as generation reads it. None where the chat template refuses it."""
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    turns = [{"role": "user", "content": words}]
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=chat_template, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception:  # whatever the template's author or jinja raises
        return None


def _items(pieces: Sequence[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        if isinstance(piece, Text):
            yield from (Text(character) for character in piece.text)
        else:
            yield piece


def _text(items: Sequence[Piece]) -> str:
    return "".join(item.text for item in items if isinstance(item, Text))


def _place(items: Sequence[Piece], characters: int) -> int:
    """The first place with so many characters of text before it."""
    index = 0
    while characters:
        characters -= isinstance(items[index], Text)
        index += 1
    return index


def _agreeing(first: str, second: str) -> int:
    """The number of characters that begin both texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _filled(pieces: Sequence[Piece], names: Iterator[str]) -> str:
    texts: list[str] = []
    for piece in pieces:
        match piece:
            case Text(text):
                texts.append(text)
            case Soft(length):
                texts += [next(names) for _ in range(length)]
            case Field(name):
                texts.append("{" + name + "}")
            case Messages():
                pass
    return "".join(texts)


def _each(chat_template: Any, change: Any) -> Any:
    """A changed chat template, or several by name."""
    if isinstance(chat_template, dict):
        return {name: change(str(source)) for name, source in chat_template.items()}
    return change(str(chat_template))


def _before(head: str, source: str) -> str:
    # An expression, not text: a template that begins with {%- strips white space off text before it.
    return "{{ " + _quoted(head) + " }}" + source


def _around(source: str, parts: _Parts, head: str, tail: str) -> str:
    """A chat template that changes what `source` writes: its beginning, and its end where an answer is to be generated."""
    begins = _quoted(parts.head_text)
    other = f"The soft prompt was learned behind the text {begins}, but this chat begins otherwise."
    # jinja leaves out a line break at the end of a template, but not at the end of a block.
    return (
        f"{{%- set chat_text -%}}{{{{ '' }}}}{source.removesuffix(chr(10))}{{{{ '' }}}}{{%- endset -%}}"
        f"{{%- if not chat_text.startswith({begins}) -%}}{{{{- raise_exception({_quoted(other)}) -}}}}{{%- endif -%}}"
        f"{{%- set end = chat_text | length - ({len(parts.cut_text)} if add_generation_prompt else 0) -%}}"
        f"{{{{- {_quoted(head)} ~ chat_text[{len(parts.head_text)}:end] -}}}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(tail)} -}}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
