"""Whether a program that gets a row as plain text reads it, and stops, as training did: what PEFT's files promise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from softprompt.data.encoded import Encoded
from softprompt.data.ending import ending_of
from softprompt.data.example import Example
from softprompt.data.template import Field, Text
from softprompt.store.peft_format import PlainReading
from softprompt.tuning.plan import Plan

ROWS = 16  # compared; what a tokenizer does where template and row meet shows in any row


def plain_reading(plan: Plan) -> PlainReading | None:
    """Compares the first training rows with what the base's tokenizer makes of their text, and their last token with those
    at which the model's generate stops. None where all text is learned: then there is no answer to begin or to end."""
    template, tokenizer = plan.template, plan.lm.tokenizer
    if template.target is None and not template.chat:
        return None
    rows = list(islice(_rows(plan), ROWS))
    ending = ending_of(template, tokenizer, plan.recipe.data.end)
    named = getattr(plan.lm.model.generation_config, "eos_token_id", None)
    stops = {named} if isinstance(named, int) else set(named or ())
    return PlainReading(
        str(template),
        same_text=template.chat
        or all(tokenizer(_asked(plan, example))["input_ids"] == _read(row) for example, row in rows),
        same_end=not ending.learned
        or (not ending.text and all(_last_trained(row) in stops for _, row in rows)),
    )


def _rows(plan: Plan) -> Iterator[tuple[Example, Encoded]]:
    """Training rows that nothing was cut from, with what they were encoded to."""
    rows = iter(plan.train.encoded)
    row = next(rows, None)
    for example in plan.splits.train:
        if row is not None and example.row == row.row:
            if not row.cut:
                yield example, row
            row = next(rows, None)


def _asked(plan: Plan, example: Example) -> str:
    """The text of a row up to its answer."""
    pieces = plan.template.pieces
    before = pieces[: pieces.index(Field(plan.template.target or ""))]
    return "".join(
        piece.text if isinstance(piece, Text) else example.fields[piece.name]
        for piece in before
        if isinstance(piece, Text | Field)
    )


def _read(row: Encoded) -> list[int]:
    """The tokens before the first trained one."""
    first = row.trained.index(True)
    return [token for token, slot in zip(row.ids[:first], row.soft[:first], strict=True) if slot < 0]


def _last_trained(row: Encoded) -> int:
    return row.ids[max(position for position, trained in enumerate(row.trained) if trained)]
