"""Many rows at once: encoded rows with counts of what was cut, batches padded to a rectangle, and their order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from softprompt.data.encoded import Encoded, EncodedRows
from softprompt.data.example import Example
from softprompt.data.layout import Layout, TooLong, View, shown, to_learn
from softprompt.data.template import Soft, Template, Text
from softprompt.data.tokenizer import SpecialTokens, special_spans
from softprompt.errors import DataError


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, and what was done to the others: rows shortened, tokens cut from them, rows left out.

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
    """Rows in one rectangle, padded on the right: ids and soft int64 [B, S], trained bool [B, S], lengths [B]."""

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


def encode_all(layout: Layout, examples: Iterable[Example], view: View = to_learn) -> EncodedSet:
    """Lays out every row, with counts of what was shortened or left out.

    Raises DataError as `view` does, and when no row is left.
    """
    rows = EncodedRows()
    cut: list[int] = []
    altered: list[Encoded] = []  # only the first of them, to show it
    altered_rows = 0
    dropped = 0
    for example in examples:
        try:
            encoded = view(layout, example)
        except TooLong:
            if layout.on_overflow != "drop":
                raise
            dropped += 1
            continue
        rows.append(encoded)
        cut += [encoded.cut] if encoded.cut else []
        if encoded.altered is not None:
            altered_rows += 1
            altered = altered or [encoded]
    if not rows:
        raise DataError(
            f"No row is left: all {dropped} are longer than {layout.max_length} positions and data.on_overflow is drop. "
            "Raise data.max_length, or set data.on_overflow to truncate."
            if dropped
            else "There is no row to encode. Give at least one."
        )
    remarks = [*altered_remark(altered, altered_rows), *typed_start_remark(layout.template, layout.special)]
    return EncodedSet(
        rows,
        truncated=len(cut),
        cut_tokens=sum(cut),
        dropped=dropped,
        altered=altered_rows,
        remarks=tuple(remarks),
    )


def altered_remark(altered: Sequence[Encoded], rows: int) -> list[str]:
    """Says how many rows have trained text that the tokenizer does not keep, and shows the first of them."""
    if not altered or altered[0].altered is None:
        return []
    text, left = (shown(part) for part in altered[0].altered)
    return [
        f"The base's tokenizer alters the text that is learned in {rows} rows: row {altered[0].row} has {text}, "
        f"of which {left} is learned."
    ]


def typed_start_remark(template: Template, special: SpecialTokens) -> list[str]:
    """Says what becomes of a start token that the template spells out."""
    first = next((piece for piece in template.pieces if not isinstance(piece, Soft)), None)
    if not special.before or not isinstance(first, Text):
        return []
    spans = special_spans(first.text, special)
    if not spans or spans[0][0] != 0:
        return []
    return [
        f"The template starts with {first.text[: spans[0][1]]!r}; where that is the tokenizer's own start token, it "
        "is written once."
    ]


def collate(rows: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Rows to one batch, right-padded to its longest. `pad_id` fills ids only; soft is -1 and trained False there."""
    longest = max(len(row) for row in rows)
    # Padding on the right: with causal attention no real position ever sees it, so that a row's result does not depend on it.
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    is_real_BS = torch.arange(longest) < lengths_B[:, None]

    def padded(values: Iterable[Iterable[int]], padding: int, dtype: torch.dtype) -> Tensor:
        real_N = torch.tensor(list(chain.from_iterable(values)), dtype=dtype)
        return torch.full(is_real_BS.shape, padding, dtype=dtype).masked_scatter_(is_real_BS, real_N)

    ids_BS = padded((row.ids for row in rows), pad_id, torch.int64)
    soft_BS = padded((row.soft for row in rows), -1, torch.int64)
    trained_BS = padded((row.trained for row in rows), False, torch.bool)
    return Batch(
        ids_BS,
        soft_BS,
        trained_BS,
        lengths_B,
        tuple(row.row for row in rows),
        sum(row.text_bytes for row in rows),
    )


def epoch_order(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices in batches for one epoch, each index once; the same seed and epoch give the same order.

    Rows of similar length (within about a tenth) come together, so little is spent on padding; the order of the
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
