"""Rows of text to token ids and labels, and rows to batches; no row's result depends on its neighbours."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from softprompt.data import chat
from softprompt.data.chat import Unlabelled as Unlabelled
from softprompt.data.encoded import Encoded as Encoded
from softprompt.data.encoded import EncodedRows
from softprompt.data.ending import End as End
from softprompt.data.ending import appends_end
from softprompt.data.example import Example
from softprompt.data.template import Field, Messages, Soft, Template, Text, did_you_mean
from softprompt.data.tokenizer import Habits as Habits
from softprompt.data.tokenizer import Spans, first_token_bytes, habits, read_back, special_spans, tokens
from softprompt.data.tokenizer import Tokenizer as Tokenizer
from softprompt.errors import DataError

_REMEMBERED_LENGTH = 100  # labels are short and repeat; longer texts are compared each time
_REMEMBERED_TEXTS = 100_000

Overflow = Literal["error", "truncate", "drop"]


class TooLong(DataError):
    """A row that has more positions than the limit, and cannot or shall not be shortened."""


@dataclass(frozen=True)
class EncodedSet:
    """Rows ready to batch, and what was done to the others: rows shortened, tokens cut from them, rows left out.

    `altered` counts the rows whose trained text the tokenizer does not keep; `remarks` says so in sentences."""

    encoded: EncodedRows
    truncated: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    altered: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return self.encoded.lengths


@dataclass(frozen=True)
class Batch:
    """Rows side by side, filled up on the right: ids and soft int64 [B, S], trained bool [B, S], lengths [B]."""

    ids_BS: Tensor
    soft_BS: Tensor
    trained_BS: Tensor
    lengths_B: Tensor
    rows: tuple[int, ...]
    text_bytes: int = 0

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids_BS=self.ids_BS.to(device),
            soft_BS=self.soft_BS.to(device),
            trained_BS=self.trained_BS.to(device),
            lengths_B=self.lengths_B.to(device),
        )


def encode(
    template: Template,
    example: Example,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_overflow: Overflow = "error",
    end: End = "auto",
    generation: bool = False,
    base_only: bool = False,
    score_first: bool = True,
    habit: Habits | None = None,
    special_tokens: bool = False,
    seen: dict[str, str] | None = None,
) -> Encoded | None:
    """Lay out one row as the template says.

    The text between two slots is tokenised as one string, with two cuts that make training read exactly what
    generation will: the target is tokenised by itself, and white space just before it goes with it. The tokenizer's
    own start tokens (BOS) stand before the first text, so after a slot in front, and are never trained; neither is
    the very first position, which nothing predicts.

    `end` appends a trained EOS: auto does so after a target or an open chat turn, and after plain text only where
    the tokenizer does so by itself. `generation` stops where the answer starts. `base_only` leaves the slots out
    and changes nothing else: what the base alone reads. `score_first=False` leaves the first token unscored, so that
    a row has the same scored tokens with a prompt before it and without.

    `max_length` bounds all positions, virtual ones included. Longer rows raise TooLong, return None (drop), or are
    shortened (truncate): the longest field loses its end, never the target or fixed text; of a chat the oldest turns
    after the system's go. Text of no target that was shortened gets no end token.

    What a row spells like a special token is plain text, unless `special_tokens`; what the template writes is special.
    Trained text is compared with what its tokens say (`seen` keeps short texts from one row to the next).

    Raises TooLong, Unlabelled when no token of the row would be trained or the tokenizer keeps nothing of what would
    be, DataError for a missing field.
    """
    layout = _Layout(
        template,
        tokenizer,
        habit or habits(tokenizer),
        end,
        generation,
        special_tokens,
        {} if seen is None else seen,
    )
    found = layout.lay(example)
    if max_length is not None and len(found) > max_length:
        if on_overflow == "drop":
            return None
        if on_overflow == "error":
            raise _too_long(
                example, template, len(found), max_length, "Set data.on_overflow to truncate or drop"
            )
        found = _shortened(layout, example, len(found), max_length)
    learned = template.fields if template.target is None else (template.target,)
    if not generation and not template.chat and not any(example.fields[name].strip() for name in learned):
        raise _unlabelled(template, example)
    if base_only:
        found = _without_slots(found)
    if not len(found):
        raise DataError(
            f"{example.where} is empty, and there is nothing to start generation from. Give some text."
        )
    return _first_unscored(found, layout, example, only_head=score_first) if not generation else found


def encode_all(
    template: Template,
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_overflow: Overflow = "error",
    end: End = "auto",
    generation: bool = False,
    base_only: bool = False,
    score_first: bool = True,
    special_tokens: bool = False,
) -> EncodedSet:
    """Every row by `encode`, with counts of what was shortened or left out.

    Raises DataError as `encode` does, and when no row is left.
    """
    habit = habits(tokenizer)
    encoded = EncodedRows()
    cut: list[int] = []
    altered: list[Encoded] = []  # the first of them, to show it
    altered_rows = 0
    seen: dict[str, str] = {}
    dropped = 0
    for example in examples:
        one = encode(
            template,
            example,
            tokenizer,
            max_length=max_length,
            on_overflow=on_overflow,
            end=end,
            generation=generation,
            base_only=base_only,
            score_first=score_first,
            habit=habit,
            special_tokens=special_tokens,
            seen=seen,
        )
        if one is None:
            dropped += 1
            continue
        encoded.append(one)
        cut += [one.cut] if one.cut else []
        if one.altered is not None:
            altered_rows += 1
            altered = altered or [one]
    if not encoded:
        raise DataError(
            f"No row is left: all {dropped} are longer than {max_length} positions and data.on_overflow is drop. "
            "Raise data.max_length, or set data.on_overflow to truncate."
            if dropped
            else "There is no row to encode. Give at least one."
        )
    remarks = [*altered_remark(altered, altered_rows), *typed_start_remark(template, habit)]
    return EncodedSet(
        encoded,
        truncated=len(cut),
        cut_tokens=sum(cut),
        dropped=dropped,
        altered=altered_rows,
        remarks=tuple(remarks),
    )


def altered_remark(altered: Sequence[Encoded], rows: int) -> list[str]:
    """A sentence on the `rows` whose trained text the tokenizer does not keep, with the first of them."""
    if not altered or altered[0].altered is None:
        return []
    text, left = (_shown(part) for part in altered[0].altered)
    return [
        f"The base's tokenizer alters the text that is learned in {rows} rows: row {altered[0].row} has {text}, "
        f"of which {left} is learned."
    ]


def typed_start_remark(template: Template, habit: Habits) -> list[str]:
    """A sentence on a start token that the template spells out."""
    first = next((piece for piece in template.pieces if not isinstance(piece, Soft)), None)
    if not habit.before or not isinstance(first, Text):
        return []
    spans = special_spans(first.text, habit)
    if not spans or spans[0][0] != 0:
        return []
    return [
        f"The template starts with {first.text[: spans[0][1]]!r}; where that is the tokenizer's own start token, it "
        "stands once."
    ]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def collate(encoded: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Rows to one batch, right-padded to its longest. `pad_id` fills ids only; soft is -1 and trained False there."""
    longest = max(len(one) for one in encoded)
    ids_BS = torch.full((len(encoded), longest), pad_id, dtype=torch.int64)
    soft_BS = torch.full((len(encoded), longest), -1, dtype=torch.int64)
    trained_BS = torch.zeros((len(encoded), longest), dtype=torch.bool)
    for b, one in enumerate(encoded):
        ids_BS[b, : len(one)] = torch.tensor(one.ids, dtype=torch.int64)
        soft_BS[b, : len(one)] = torch.tensor(one.soft, dtype=torch.int64)
        trained_BS[b, : len(one)] = torch.tensor(one.trained, dtype=torch.bool)
    lengths_B = torch.tensor([len(one) for one in encoded], dtype=torch.int64)
    return Batch(
        ids_BS,
        soft_BS,
        trained_BS,
        lengths_B,
        tuple(one.row for one in encoded),
        sum(one.text_bytes for one in encoded),
    )


def epoch_order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices in batches for one epoch, each index once; the same seed and epoch give the same order.

    Rows of alike length (within about a tenth) come together, so little is spent on padding; the order of the
    batches, and which of them is the smaller one, are drawn.
    """
    rng = random.Random(f"{seed}/{epoch}")
    blurred = [length * rng.uniform(0.95, 1.05) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: blurred[i])
    full, rest = divmod(len(order), batch_size)
    sizes = [batch_size] * full
    if rest:
        sizes.insert(rng.randint(0, full), rest)
    batches, start = [], 0
    for size in sizes:
        batches.append(order[start : start + size])
        start += size
    rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class _Run:
    """A stretch of one kind: a slot (`soft` rows), or text that is trained or only read."""

    text: str = ""
    trained: bool = False
    soft: int = 0
    ids: tuple[int, ...] | None = None
    data: Spans = ()
    words: str | None = None  # what the trained text says, where marks that close it are part of it


@dataclass(frozen=True)
class _Layout:
    template: Template
    tokenizer: Tokenizer
    habit: Habits
    end: End
    generation: bool
    special_tokens: bool
    seen: dict[str, str]

    def lay(self, example: Example, *, shortened: bool = False) -> Encoded:
        runs, wants_end = self._runs(example)
        found = Encoded([], [], [], example.row, 0)
        rows, has_text = 0, False
        before: tuple[int, ...] | None = None if self.template.chat else self.habit.before
        for run in runs:
            if run.soft:
                found.ids += [0] * run.soft
                found.soft += range(rows, rows + run.soft)
                found.trained += [False] * run.soft
                rows += run.soft
                continue
            if before is not None:
                _append(found, before, trained=False)
                run = self._without_typed(run, before)
                found.special, before = len(before), None
            data = () if self.special_tokens else run.data
            ids = (
                run.ids
                if run.ids is not None
                else tokens(self.tokenizer, run.text, self.habit, continues=has_text, data=data)
            )
            _append(found, ids, trained=run.trained)
            if run.trained:
                words = run.text if run.words is None else run.words
                found.text_bytes += len(words.encode())
                if run.ids is None and not self.generation:
                    self._compare(found, run, list(ids), example)
            has_text = has_text or bool(run.text)
        if wants_end and not (shortened and self.template.target is None):
            self._append_end(found)
        return found

    def _without_typed(self, run: _Run, before: tuple[int, ...]) -> _Run:
        """The first run without a start token that the template spells out, which stands there already."""
        marks = special_spans(run.text, self.habit)
        if not marks or marks[0][0] != 0 or any(first < marks[0][1] for first, _ in run.data):
            return run
        typed = run.text[: marks[0][1]]
        if tokens(self.tokenizer, typed, self.habit, continues=False) != list(before):
            return run
        data = tuple((first - len(typed), last - len(typed)) for first, last in run.data)
        return replace(run, text=run.text[len(typed) :], data=data)

    def _compare(self, found: Encoded, run: _Run, ids: list[int], example: Example) -> None:
        """Keep what the tokens of a trained run say where that is not its text. Raises Unlabelled where it is nothing."""
        text = run.text
        left = self.seen.get(text)
        if left is None:
            left = read_back(self.tokenizer, text, ids)
            if len(text) <= _REMEMBERED_LENGTH and len(self.seen) < _REMEMBERED_TEXTS:
                self.seen[text] = left
        if left == text:
            return
        for first, last in reversed(special_spans(text, self.habit)):
            if self.special_tokens or not any(start < last and first < stop for start, stop in run.data):
                text = text[:first] + text[last:]  # a special token is no part of what is read back
        if left.strip() == text.strip():
            return
        if not left.strip() and not self._inside(run).strip() == "":
            raise Unlabelled(
                f"{example.where} has no token to learn: the base's tokenizer has none for {_shown(text.strip())} and "
                "drops it. Write it with other characters, or leave the row out."
            )
        found.altered = found.altered or (text, left)

    def _inside(self, run: _Run) -> str:
        """What a row says in a run."""
        return "".join(run.text[first:last] for first, last in run.data) if run.data else run.text

    def _append_end(self, found: Encoded) -> None:
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            _append(found, [int(eos)], trained=True)
            found.end = 1
        elif self.end == "always":
            raise DataError(
                "data.end is always, but the base's tokenizer has no end token. Set it to auto or never."
            )

    def _runs(self, example: Example) -> tuple[list[_Run], bool]:
        """The row as runs, neighbours of one kind joined; and whether an end token is wanted."""
        target = self.template.target
        runs: list[_Run] = []
        trained = target is None and not self.generation
        is_open = True
        for piece in self.template.pieces:
            match piece:
                case Soft(length):
                    runs.append(_Run(soft=length))
                case Text(text):
                    _join(runs, text, trained)
                case Field(name) if name == target:
                    space = _take_space(runs)
                    if self.generation:
                        _join(runs, "", False)
                        break
                    trained = True
                    text = space + _field(example, name)
                    runs.append(_Run(text, True, data=((len(space), len(text)),)))
                case Field(name):
                    _join(runs, _field(example, name), trained, data=True)
                case Messages():
                    found = chat.turns(
                        example,
                        self.tokenizer,
                        generation=self.generation,
                        habit=None if self.special_tokens else self.habit,
                    )
                    runs += [
                        _Run(
                            turn.text, turn.said_by_assistant, ids=turn.ids, data=turn.data, words=turn.words
                        )
                        for turn in found
                    ]
                    is_open = found[-1].open
        wants_end = appends_end(self.template, self.tokenizer, self.habit, self.end, is_open=is_open)
        return runs, wants_end and not self.generation


def _append(found: Encoded, ids: Iterable[int], *, trained: bool) -> None:
    ids = list(ids)
    found.ids += ids
    found.soft += [-1] * len(ids)
    found.trained += [trained] * len(ids)


def _join(runs: list[_Run], text: str, trained: bool, *, data: bool = False) -> None:
    last = runs[-1] if runs else None
    if last is not None and not last.soft and last.trained == trained and last.ids is None:
        start = len(last.text)
        spans = (*last.data, (start, start + len(text))) if data else last.data
        runs[-1] = replace(last, text=last.text + text, data=spans)
    else:
        runs.append(_Run(text, trained, data=((0, len(text)),) if data else ()))


def _take_space(runs: list[_Run]) -> str:
    """Cut the blanks off the end of the last run and hand them over: tokenizers join them with the word that follows.

    A line break stays; no tokenizer joins it with a word, and an answer that began with one would end before it began."""
    if not runs or runs[-1].soft:
        return ""
    text = runs[-1].text
    kept = re.sub(r"[^\S\r\n]+\Z", "", text)
    data = tuple((first, min(last, len(kept))) for first, last in runs[-1].data if first < len(kept))
    runs[-1] = replace(runs[-1], text=kept, data=data)
    return text[len(kept) :]


def _field(example: Example, name: str) -> str:
    try:
        return example.fields[name]
    except KeyError:
        known = sorted(example.fields)
        raise DataError(
            f"{example.where} has no text for {{{name}}}; it has: {', '.join(known) or 'nothing'}."
            f"{did_you_mean(name, known)} Name its column in data.column or data.fields, or change data.template."
        ) from None


def _without_slots(found: Encoded) -> Encoded:
    keep = [s < 0 for s in found.soft]
    return replace(
        found,
        ids=[one for one, kept in zip(found.ids, keep, strict=True) if kept],
        soft=[one for one, kept in zip(found.soft, keep, strict=True) if kept],
        trained=[one for one, kept in zip(found.trained, keep, strict=True) if kept],
    )


def _first_unscored(found: Encoded, layout: _Layout, example: Example, *, only_head: bool) -> Encoded:
    """Unmark position 0, which nothing predicts; and the first token wherever it stands unless `only_head`."""
    at = 0 if only_head else next(i for i, row in enumerate(found.soft) if row < 0)
    if not found.trained[at]:
        return found
    text = next(run.text for run in layout._runs(example)[0] if not run.soft and run.text)
    trained = list(found.trained)
    trained[at] = False
    lost = first_token_bytes(layout.tokenizer, text, layout.habit, continues=False)
    if not any(trained[: len(trained) - found.end]):
        raise Unlabelled(
            f"{example.where}: its only trained token stands first, where nothing predicts it. "
            "Give longer text, or put something before it in data.template."
        )
    return replace(found, trained=trained, text_bytes=max(0, found.text_bytes - lost))


def _shortened(layout: _Layout, example: Example, length: int, limit: int) -> Encoded:
    """The row with as much of its longest field, then of the next, as fits into `limit` positions."""
    if layout.template.chat:
        return _fewer_turns(layout, example, length, limit)
    fields = dict(example.fields)
    for name in sorted(layout.template.inputs, key=lambda one: -len(fields.get(one, ""))):
        text = fields[name]

        def laid(keep: int, name: str = name, text: str = text) -> Encoded:
            fields[name] = text[:keep].rstrip()
            return layout.lay(replace(example, fields=fields), shortened=True)

        fits, over = 1, 2
        if len(laid(fits)) > limit:
            continue
        while over < len(text) and len(laid(over)) <= limit:
            fits, over = over, over * 2
        over = min(over, len(text))
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if len(laid(middle)) <= limit else (fits, middle)
        found = laid(fits)
        return replace(found, cut=length - len(found))
    raise _too_long(
        example, layout.template, length, limit, "Fixed text and target alone are too long: shorten them"
    )


def _fewer_turns(layout: _Layout, example: Example, length: int, limit: int) -> Encoded:
    messages = example.messages or ()
    system = messages[:1] if messages and messages[0].role == "system" else ()
    rest = messages[len(system) :]
    for start in range(1, len(rest)):
        left = rest[start:]
        if left[0].role != "user" or (not layout.generation and all(one.role != "assistant" for one in left)):
            continue
        found = layout.lay(replace(example, messages=(*system, *left)), shortened=True)
        if len(found) <= limit:
            return replace(found, cut=length - len(found))
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
