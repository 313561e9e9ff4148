"""A row of text to token ids and labels, and back to a length that fits; no row's result depends on its neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from softprompt.data import chat
from softprompt.data.chat import Unlabelled
from softprompt.data.encoded import Encoded
from softprompt.data.ending import End, appends_end
from softprompt.data.example import Example
from softprompt.data.template import BLANKS, Field, Messages, Soft, Template, Text
from softprompt.data.tokenizer import (
    Spans,
    SpecialTokens,
    Tokenizer,
    first_token_bytes,
    read_back,
    special_spans,
    special_tokens_of,
    tokens,
)
from softprompt.errors import DataError, did_you_mean

_REMEMBERED_LENGTH = 100  # labels are short and repeat; longer texts are compared each time
_REMEMBERED_TEXTS = 100_000
Overflow = Literal["error", "truncate", "drop"]


class TooLong(DataError):
    """A row has more positions than the limit, and is not shortened."""


@dataclass(frozen=True)
class Layout:
    """The rules by which rows of a template become token ids and labels on a tokenizer. Make one with `Layout.of`.

    The text between two slots is tokenised as one string, with two cuts that make training read exactly what
    generation will: the target is tokenised by itself, and white space just before it goes with it. The tokenizer's
    own start tokens (BOS) come before the first text, so after a slot in front, and are never trained; neither is
    position 0, which nothing predicts.

    `end` appends a trained EOS: auto does so after a target or an open chat turn, and after plain text only where
    the tokenizer does so by itself. Without `slots` they are left out and nothing else changes: what the base alone
    reads. What a row spells like a special token is plain text, unless `special_tokens`; what the template writes is
    special.

    `max_length` bounds all positions, virtual ones included. Longer rows raise TooLong (error, drop) or are shortened
    (truncate): the longest field loses its end, never the target or fixed text; of a chat the oldest turns after the
    system's go. Text of no target that was shortened gets no end token.
    """

    template: Template
    tokenizer: Tokenizer
    special: SpecialTokens
    end: End = "auto"
    special_tokens: bool = False
    slots: bool = True
    max_length: int | None = None
    on_overflow: Overflow = "error"
    seen: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """What the tokens of short trained texts say, by text: the same labels come in row after row."""

    @classmethod
    def of(
        cls,
        template: Template,
        tokenizer: Tokenizer,
        *,
        end: End = "auto",
        special_tokens: bool = False,
        slots: bool = True,
        max_length: int | None = None,
        on_overflow: Overflow = "error",
    ) -> Layout:
        """A layout on `tokenizer`, which is asked for its special tokens."""
        special = special_tokens_of(tokenizer)
        return cls(template, tokenizer, special, end, special_tokens, slots, max_length, on_overflow)


def to_learn(layout: Layout, example: Example) -> Encoded:
    """Lays out one row to learn from: its target, or all of its text, is trained.

    Trained text is compared with what its tokens say. Raises TooLong, DataError for a missing field, and Unlabelled
    when no token of the row would be trained or the tokenizer keeps nothing of what would be.
    """
    encoded = _fitted(layout, example, answering=False)
    return _untrained_at(encoded, 0, layout, example)


def to_judge(layout: Layout, example: Example) -> Encoded:
    """Lays out one row to measure its loss: as `to_learn`, but the first token is not scored either.

    With a slot in front it could be, without the slot it is position 0, so that only this way the scored tokens are
    the same with a prompt and without. Raises as `to_learn` does.
    """
    encoded = _fitted(layout, example, answering=False)
    first = next(position for position, row in enumerate(encoded.soft) if row < 0)
    return _untrained_at(encoded, first, layout, example)


def to_answer(layout: Layout, example: Example) -> Encoded:
    """Lays out one row up to where its answer starts: what generation reads. No token is trained.

    Raises TooLong, and DataError for a missing field or a row that gives generation nothing to start from.
    """
    return _fitted(layout, example, answering=True)


View: TypeAlias = Callable[[Layout, Example], Encoded]
"""What a row is laid out for: `to_learn`, `to_judge` or `to_answer`."""


def _fitted(layout: Layout, example: Example, *, answering: bool) -> Encoded:
    """The row within `max_length`, its slots left out where the layout has none."""
    template, limit = layout.template, layout.max_length
    encoded = _laid(layout, example, answering=answering)
    if limit is not None and len(encoded) > limit:
        if layout.on_overflow != "truncate":
            raise _too_long(
                example, template, len(encoded), limit, "Set data.on_overflow to truncate or drop"
            )
        encoded = _shortened(layout, example, len(encoded), limit, answering=answering)
    learned = template.fields if template.target is None else (template.target,)
    if not answering and not template.chat and not any(example.fields[name].strip() for name in learned):
        raise _unlabelled(template, example)
    if not layout.slots:
        encoded = _without_slots(encoded)
    if not len(encoded):
        raise DataError(
            f"{example.where} is empty, and there is nothing to start generation from. Give some text."
        )
    return encoded


@dataclass(frozen=True)
class _Segment:
    """A part of a row of one kind: a slot (`soft` virtual tokens), or text that is trained or only read."""

    text: str = ""
    trained: bool = False
    soft: int = 0
    ids: tuple[int, ...] | None = None
    data: Spans = ()
    words: str | None = None  # the trained text without the marks that close its turn, where it has such


def _laid(layout: Layout, example: Example, *, answering: bool, shortened: bool = False) -> Encoded:
    """The row with its slots, however long it is."""
    segments, wants_end = _segments(layout, example, answering=answering)
    encoded = Encoded([], [], [], example.row, 0)
    virtual, has_text = 0, False
    before: tuple[int, ...] | None = None if layout.template.chat else layout.special.before
    for segment in segments:
        if segment.soft:
            encoded.ids += [0] * segment.soft
            encoded.soft += range(virtual, virtual + segment.soft)
            encoded.trained += [False] * segment.soft
            virtual += segment.soft
            continue
        if before is not None:
            _append(encoded, before, trained=False)
            segment = _without_typed(layout, segment, before)
            encoded.special, before = len(before), None
        data = () if layout.special_tokens else segment.data
        ids = (
            segment.ids
            if segment.ids is not None
            else tokens(layout.tokenizer, segment.text, layout.special, continues=has_text, data=data)
        )
        _append(encoded, ids, trained=segment.trained)
        if segment.trained:
            words = segment.text if segment.words is None else segment.words
            encoded.text_bytes += len(words.encode())
            if segment.ids is None and not answering:
                _compare(layout, encoded, segment, list(ids), example)
        has_text = has_text or bool(segment.text)
    if wants_end and not (shortened and layout.template.target is None):
        _append_end(layout, encoded)
    return encoded


def _without_typed(layout: Layout, segment: _Segment, before: tuple[int, ...]) -> _Segment:
    """The first segment without a start token that the template spells out, since it is there already."""
    marks = special_spans(segment.text, layout.special)
    if not marks or marks[0][0] != 0 or any(first < marks[0][1] for first, _ in segment.data):
        return segment
    typed = segment.text[: marks[0][1]]
    if tokens(layout.tokenizer, typed, layout.special, continues=False) != list(before):
        return segment
    data = tuple((first - len(typed), last - len(typed)) for first, last in segment.data)
    return replace(segment, text=segment.text[len(typed) :], data=data)


def _compare(layout: Layout, encoded: Encoded, segment: _Segment, ids: list[int], example: Example) -> None:
    """Keeps what the tokens of a trained segment say where that is not its text. Raises Unlabelled where it is nothing."""
    text, seen = segment.text, layout.seen
    left = seen.get(text)
    if left is None:
        left = read_back(layout.tokenizer, text, ids)
        if len(text) <= _REMEMBERED_LENGTH and len(seen) < _REMEMBERED_TEXTS:
            seen[text] = left
    if left == text:
        return
    for first, last in reversed(special_spans(text, layout.special)):
        if layout.special_tokens or not any(start < last and first < stop for start, stop in segment.data):
            text = text[:first] + text[last:]  # reading back leaves special tokens out
    if left.strip() == text.strip():
        return
    if not left.strip() and _row_text(segment).strip():
        raise Unlabelled(
            f"{example.where} has no token to learn: the base's tokenizer has none for {shown(text.strip())} and "
            "drops it. Write it with other characters, or leave the row out."
        )
    encoded.altered = encoded.altered or (text, left)


def _row_text(segment: _Segment) -> str:
    """The part of a segment's text that comes from the row."""
    return "".join(segment.text[first:last] for first, last in segment.data) if segment.data else segment.text


def _append_end(layout: Layout, encoded: Encoded) -> None:
    eos = layout.tokenizer.eos_token_id
    if eos is not None:
        if not (
            encoded.trained and encoded.trained[-1] and encoded.ids[-1] == int(eos)
        ):  # a row may spell it itself
            _append(encoded, [int(eos)], trained=True)
        encoded.end = 1
    elif layout.end == "always":
        raise DataError(
            "data.end is always, but the base's tokenizer has no end token. Set it to auto or never."
        )


def _segments(layout: Layout, example: Example, *, answering: bool) -> tuple[list[_Segment], bool]:
    """The row as segments, neighbours of one kind joined; and whether an end token is wanted."""
    target = layout.template.target
    segments: list[_Segment] = []
    trained = target is None and not answering
    is_open = True
    for piece in layout.template.pieces:
        match piece:
            case Soft(length):
                segments.append(_Segment(soft=length))
            case Text(text):
                _join(segments, text, trained)
            case Field(name) if name == target:
                space = _take_space(segments)
                if answering:
                    _join(segments, "", False)
                    break
                trained = True
                text = space + _field(example, name)
                segments.append(_Segment(text, True, data=((len(space), len(text)),)))
            case Field(name):
                _join(segments, _field(example, name), trained, data=True)
            case Messages():
                turns = chat.turns(
                    example,
                    layout.tokenizer,
                    generation=answering,
                    special=None if layout.special_tokens else layout.special,
                )
                segments += [
                    _Segment(
                        turn.text, turn.said_by_assistant, ids=turn.ids, data=turn.data, words=turn.words
                    )
                    for turn in turns
                ]
                is_open = turns[-1].open
    wants_end = appends_end(layout.template, layout.tokenizer, layout.special, layout.end, is_open=is_open)
    return segments, wants_end and not answering


def _append(encoded: Encoded, ids: Iterable[int], *, trained: bool) -> None:
    ids = list(ids)
    encoded.ids += ids
    encoded.soft += [-1] * len(ids)
    encoded.trained += [trained] * len(ids)


def _join(segments: list[_Segment], text: str, trained: bool, *, data: bool = False) -> None:
    last = segments[-1] if segments else None
    if last is not None and not last.soft and last.trained == trained and last.ids is None:
        start = len(last.text)
        spans = (*last.data, (start, start + len(text))) if data else last.data
        segments[-1] = replace(last, text=last.text + text, data=spans)
    else:
        segments.append(_Segment(text, trained, data=((0, len(text)),) if data else ()))


def _take_space(segments: list[_Segment]) -> str:
    """Moves the blanks at the end of the last segment to the target."""
    if not segments or segments[-1].soft:
        return ""
    text = segments[-1].text
    kept = re.sub(BLANKS, "", text)
    data = tuple((first, min(last, len(kept))) for first, last in segments[-1].data if first < len(kept))
    segments[-1] = replace(segments[-1], text=kept, data=data)
    return text[len(kept) :]


def _field(example: Example, name: str) -> str:
    try:
        return example.fields[name]
    except KeyError:
        names = sorted(example.fields)
        raise DataError(
            f"{example.where} has no text for {{{name}}}; it has: {', '.join(names) or 'nothing'}."
            f"{did_you_mean(name, names)} Name its column in data.column or data.fields, or change data.template."
        ) from None


def _without_slots(encoded: Encoded) -> Encoded:
    kept = [position for position, row in enumerate(encoded.soft) if row < 0]
    return replace(
        encoded,
        ids=[encoded.ids[position] for position in kept],
        soft=[-1] * len(kept),
        trained=[encoded.trained[position] for position in kept],
    )


def _untrained_at(encoded: Encoded, position: int, layout: Layout, example: Example) -> Encoded:
    """The row without a label at `position`, its first token, and without that token's bytes.

    Raises Unlabelled when that was the only token to learn."""
    if not encoded.trained[position]:
        return encoded
    segments, _ = _segments(layout, example, answering=False)
    text = next(segment.text for segment in segments if not segment.soft and segment.text)
    trained = list(encoded.trained)
    trained[position] = False
    lost = first_token_bytes(layout.tokenizer, text, layout.special, continues=False)
    if not any(trained[: len(trained) - encoded.end]):
        raise Unlabelled(
            f"{example.where}: its only trained token is the first, where nothing predicts it. "
            "Give longer text, or put something before it in data.template."
        )
    return replace(encoded, trained=trained, text_bytes=max(0, encoded.text_bytes - lost))


def _shortened(layout: Layout, example: Example, length: int, limit: int, *, answering: bool) -> Encoded:
    """The row with as much of its longest field, then of the next, as fits into `limit` positions."""
    if layout.template.chat:
        return _fewer_turns(layout, example, length, limit, answering=answering)
    fields = dict(example.fields)
    for name in sorted(layout.template.inputs, key=lambda name: -len(fields.get(name, ""))):
        text = fields[name]

        def laid(keep: int, name: str = name, text: str = text) -> Encoded:
            fields[name] = text[:keep].rstrip()
            return _laid(layout, replace(example, fields=fields), answering=answering, shortened=True)

        # How many tokens a cut text has is only known by tokenising it. Where one character is too much, this field
        # stays at that one character and the next longest is cut too.
        fits, over = 1, 2
        if len(laid(fits)) > limit:
            continue
        # Doubling from below costs as much as the part that is kept, however long the whole text is.
        while over < len(text) and len(laid(over)) <= limit:
            fits, over = over, over * 2
        # Bisection: `fits` characters fit, `over` do not.
        over = min(over, len(text))
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if len(laid(middle)) <= limit else (fits, middle)
        encoded = laid(fits)
        return replace(encoded, cut=length - len(encoded))
    raise _too_long(
        example, layout.template, length, limit, "Fixed text and target alone are too long: shorten them"
    )


def _fewer_turns(layout: Layout, example: Example, length: int, limit: int, *, answering: bool) -> Encoded:
    """The chat without its oldest turns: the system's turn stays, and what follows it starts with the user's."""
    messages = example.messages or ()
    system = messages[:1] if messages and messages[0].role == "system" else ()
    rest = messages[len(system) :]
    for start in range(1, len(rest)):
        left = rest[start:]
        teaches = answering or any(message.role == "assistant" for message in left)
        if left[0].role != "user" or not teaches:
            continue
        shorter = replace(example, messages=(*system, *left))
        encoded = _laid(layout, shorter, answering=answering, shortened=True)
        if len(encoded) <= limit:
            return replace(encoded, cut=length - len(encoded))
    raise _too_long(
        example, layout.template, length, limit, "Its last exchange alone is too long: leave the row out"
    )


def _too_long(example: Example, template: Template, length: int, limit: int, advice: str) -> TooLong:
    virtual = (
        f" ({template.soft_length} virtual, {length - template.soft_length} of text)"
        if template.soft_length
        else ""
    )
    return TooLong(
        f"{example.where} has {length:,} positions{virtual}; the limit is {limit:,}. {advice}, "
        "or raise data.max_length as far as the base's context allows."
    )


def _unlabelled(template: Template, example: Example) -> Unlabelled:
    what = f"its target {{{template.target}}} is empty" if template.target else "its text is empty"
    return Unlabelled(f"{example.where} has no token to learn: {what}. Fill it in or leave the row out.")


def shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
