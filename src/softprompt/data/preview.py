"""A preview of training: every token of a few rows by its part in the loss, and counts over all rows."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from typing import Any, Literal

from softprompt.data.batch import altered_remark, typed_start_remark
from softprompt.data.chat import Unlabelled
from softprompt.data.encoded import Encoded, EncodedRows
from softprompt.data.ending import ending_of, remark
from softprompt.data.example import Example
from softprompt.data.layout import Layout, TooLong, to_learn
from softprompt.data.template import Template
from softprompt.data.tokenizer import Tokenizer, special_spans
from softprompt.errors import DataError

Kind = Literal["soft", "context", "trained", "special"]

_COLOURS = {"soft": "#ffd8a8", "trained": "#d3f0d8", "special": "#e8dcf7"}
_WINDOW = 8  # tokens before one that are decoded with it: spaces and letters can depend on them


@dataclass(frozen=True)
class Token:
    """One position. `soft`: a virtual token, its text the number of its row, its id None; `context`: read only;
    `trained`: predicted and counted in the loss (an end token too); `special`: the tokenizer's own start token.
    """

    text: str
    kind: Kind
    id: int | None


@dataclass(frozen=True)
class ShownRow:
    """A row token by token, and how many tokens truncation took from it."""

    row: int
    tokens: tuple[Token, ...]
    cut: int


@dataclass(frozen=True)
class Preview:
    """Counts are over all `examples`; `tokens` are real tokens, virtual ones are `soft_positions`.

    `too_long` rows (with on_overflow error) and `unlabelled` ones (no token to learn) would stop a run; `dropped` ones
    are left out by it. `lengths` are quantiles of the positions a row has. `problems` holds the first message of each.
    `learns` says in words what the loss counts; `remarks` say what the tokenizer makes of text that is learned,
    and where answers have no end.
    """

    template: str
    target: str | None
    learns: str
    shown: tuple[ShownRow, ...]
    examples: int
    tokens: int
    trained_tokens: int
    soft_positions: int
    truncated: int
    cut_tokens: int
    dropped: int
    too_long: int
    unlabelled: int
    lengths: dict[str, int]
    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Preview({self.examples} rows learn {self.learns}: {self.trained_tokens:,} of {self.tokens:,} tokens trained, "
            f"{self.too_long} rows too long, {self.unlabelled} unlabelled)"
        )

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """The shown rows for a notebook: soft, trained and start tokens marked, what is only read left plain."""
        rows = "".join(
            f"<tr><th>row {shown.row}</th><td style='text-align:left'>{_marked(shown)}</td></tr>"
            for shown in self.shown
        )
        counts = (
            f"{self.examples} rows learn {html.escape(self.learns)}: {self.tokens:,} tokens, {self.trained_tokens:,} of them "
            f"trained; {self.truncated} rows cut, {self.dropped} dropped, {self.too_long} too long, {self.unlabelled} unlabelled"
        )
        return f"<table><caption>{html.escape(self.template)}</caption>{rows}<tr><th>all</th><td>{counts}</td></tr></table>"


def _marked(shown: ShownRow) -> str:
    """A row's text as HTML, each stretch of one kind in its colour; a slot as its number of virtual tokens."""
    parts = []
    for kind, tokens in groupby(shown.tokens, key=lambda token: token.kind):
        texts = [token.text for token in tokens]
        text = f"[{len(texts)} virtual tokens]" if kind == "soft" else html.escape("".join(texts))
        parts.append(
            text
            if kind == "context"
            else f"<mark title='{kind}' style='background:{_COLOURS[kind]}'>{text}</mark>"
        )
    return "".join(parts)


def preview(layout: Layout, examples: Sequence[Example], *, show: int = 3) -> Preview:
    """Lays out every row as a run would and count; the first `show` good rows are shown token by token.

    Rows that a run would refuse are counted instead. Raises DataError only where no row could be laid out at all,
    such as for a field that does not exist.
    """
    template, tokenizer = layout.template, layout.tokenizer
    rows = EncodedRows()
    dropped = 0
    too_long: list[str] = []
    unlabelled: list[str] = []
    for example in examples:
        try:
            rows.append(to_learn(layout, example))
        except TooLong as error:
            if layout.on_overflow == "drop":
                dropped += 1
            else:
                too_long.append(str(error))
        except Unlabelled as error:
            unlabelled.append(str(error))
    if not examples:
        raise DataError("There is no row to show. Give at least one.")
    virtual = sum(prompt_row >= 0 for row in rows for prompt_row in row.soft)
    cut = [row.cut for row in rows if row.cut]
    altered = [row for row in rows if row.altered]
    return Preview(
        template=str(template),
        target=template.target,
        learns=_learns(template),
        shown=tuple(ShownRow(row.row, tuple(_tokens(row, tokenizer)), row.cut) for row in rows[:show]),
        examples=len(examples),
        tokens=sum(rows.lengths) - virtual,
        trained_tokens=sum(row.trained_tokens for row in rows),
        soft_positions=virtual,
        truncated=len(cut),
        cut_tokens=sum(cut),
        dropped=dropped,
        too_long=len(too_long),
        unlabelled=len(unlabelled),
        lengths=_quantiles(rows.lengths),
        problems=tuple(chain(too_long[:1], unlabelled[:1])),
        remarks=(
            *altered_remark(altered, len(altered)),
            *_spelled_remark(layout, examples),
            *typed_start_remark(template, layout.special),
            *(
                text
                for text in [remark(template, ending_of(template, tokenizer, layout.end))]
                if text is not None
            ),
        ),
    )


def _learns(template: Template) -> str:
    if template.target is not None:
        return f"the field {template.target}"
    return "the assistant's turns" if template.chat else "all text"


def _spelled_remark(layout: Layout, examples: Sequence[Example]) -> list[str]:
    """A sentence on rows that spell special tokens."""
    spelling = [
        example.row
        for example in examples
        if any(
            special_spans(text, layout.special)
            for text in (*example.fields.values(), *(message.content for message in example.messages or ()))
        )
    ]
    if not spelling:
        return []
    read = (
        "special tokens, as data.special_tokens says"
        if layout.special_tokens
        else "plain text (data.special_tokens)"
    )
    return [
        f"{len(spelling)} rows spell special tokens, the first of them row {spelling[0]}: they are read as {read}."
    ]


def _tokens(encoded: Encoded, tokenizer: Tokenizer) -> Iterable[Token]:
    start = 0  # of the text that is decoded together: it begins behind the last slot
    special_left = encoded.special
    for s, (token, row, trained) in enumerate(zip(encoded.ids, encoded.soft, encoded.trained, strict=True)):
        if row >= 0:
            start = s + 1
            yield Token(str(row), "soft", None)
            continue
        kind: Kind = "trained" if trained else "context"
        if special_left:
            kind, special_left = "special", special_left - 1
        first = max(start, s - _WINDOW)
        yield Token(_written(encoded.ids[first:s], token, tokenizer), kind, token)


def _written(before: list[int], token: int, tokenizer: Tokenizer) -> str:
    """The text that `token` adds to the tokens before it; "�" for an incomplete character."""
    head = str(tokenizer.decode(before, clean_up_tokenization_spaces=False)) if before else ""
    both = str(tokenizer.decode([*before, token], clean_up_tokenization_spaces=False))
    return both[len(head.rstrip("\ufffd")) :]


def _quantiles(lengths: Iterable[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    if not ordered:
        return {}
    last = len(ordered) - 1
    shares = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}
    return {name: ordered[round(last * share)] for name, share in shares.items()}
