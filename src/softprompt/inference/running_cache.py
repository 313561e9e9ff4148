"""The key/value state of a running batch: rows join, step and leave, each right-aligned (base/kv.py says why)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations import sdpa_attention

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, row_state

# Versions without it expand the keys of a masked step instead, which costs more than it gains.
_PACKS_GROUPED_HEADS = hasattr(sdpa_attention, "pack_gqa")


def room(columns: int) -> int:
    """Columns to reserve for rows of this length: an eighth more, so that live columns move at most every so often,
    and one for a blank column."""
    return columns + columns // 8 + 2


# Columns that buffers which follow their rows have to spare: a step reads them too, and moving rows costs little that often.
SPARE = 32


def blank_columns(lm: FrozenLM) -> int:
    """1 where a step is faster with a column in front that is masked in every row, else 0.

    Where every column of every row is real, transformers leaves the mask out and hands grouped heads to torch with
    enable_gqa. On a CPU that kernel is five times slower in bfloat16 (2.5 against 0.4 ms for 8 rows of 300 columns, 9
    heads in 3 groups) than the masked one, which takes the heads of a group as queries. In float32 they are equal."""
    config = lm.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    grouped = heads != (getattr(config, "num_key_value_heads", None) or heads)
    slow = torch.device(lm.device).type == "cpu" and lm.dtype != torch.float32
    return int(slow and grouped and _PACKS_GROUPED_HEADS)


@dataclass
class _Window:
    """The live columns of a running cache. Every layer looks at the same one."""

    start: int = 0
    end: int = 0


class _BufferLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's buffers [rows, H, columns, K]: a step writes one column in place, where a DynamicLayer copies all."""

    def __init__(self, window: _Window, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.keys: Any
        self.values: Any
        self.dtype, self.device = keys.dtype, keys.device
        self.keys = keys.new_zeros(rows, keys.shape[1], columns, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], columns, values.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, new = key_states.shape[0], key_states.shape[2]
        start, end = self.window.start, self.window.end
        self.keys[:rows, :, end : end + new] = key_states
        self.values[:rows, :, end : end + new] = value_states
        return self.keys[:rows, :, start : end + new], self.values[:rows, :, start : end + new]

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start


class RunningCache(Cache):
    """The key/value state of a running batch: rows join, step and leave; live rows are always 0..rows-1.

    `mask` is [rows, columns], True where a row has a real position. Its live part is `live_mask()`. The first `blank`
    live columns are masked in every row. With `follows` the buffers have few more columns than are live, and no more than
    were reserved: they grow and shrink with their rows.
    """

    def __init__(self, device: torch.device | str, *, blank: int = 0, follows: bool = False) -> None:
        super().__init__(
            layer_class_to_replicate=DynamicLayer
        )  # replaced by buffers when the first row joins
        self.layer_class_to_replicate = None
        self.layers: list[Any] = []
        self.window = _Window()
        self.blank = blank
        self.follows = follows
        self.most = 0  # columns that were reserved
        self.rows = 0
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=device)

    @property
    def bytes(self) -> int:
        """Memory that the buffers take, used or not."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.keys, layer.values)
        )

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, all columns of the live rows, contiguous."""
        return self.layers[layer].keys[: self.rows], self.layers[layer].values[: self.rows]

    def live_mask(self) -> Tensor:
        """[rows, live columns]."""
        return self.mask[: self.rows, self.window.start : self.window.end]

    def advance(self) -> None:
        """The column that the last step wrote becomes part of every row."""
        self.window.end += 1

    def open_column(self) -> Tensor:
        """Makes room for one more column, marks it real in every row, and gives the mask that includes it."""
        self._make_room(self.rows, 1)
        self.mask[: self.rows, self.window.end] = True
        return self.mask[: self.rows, self.window.start : self.window.end + 1]

    def join(self, cache: Any, row: int, start: int, end: int) -> None:
        """Copies the columns start..end of one row of a prefilled `cache` in, right-aligned, as the last row."""
        length = end - start
        if not self.layers:
            self.layers = [
                _BufferLayer(self.window, layer.keys, layer.values, self.mask.shape[0], self.mask.shape[1])
                for layer in cache.layers
            ]
        self._make_room(self.rows + 1, 0, length + self.blank)
        self.window.start = min(self.window.start, self.window.end - length - self.blank)
        here = slice(self.window.end - length, self.window.end)
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            # What an earlier row left would be masked, but a NaN times a weight of 0 is still NaN.
            mine.keys[self.rows].zero_()
            mine.values[self.rows].zero_()
            mine.keys[self.rows, :, here] = theirs.keys[row, :, start:end]
            mine.values[self.rows, :, here] = theirs.values[row, :, start:end]
        self.mask[self.rows] = False
        self.mask[self.rows, here] = True
        self.rows += 1

    def leave(self, row: int) -> None:
        """Drops a row; the last one takes its place. Columns that no row needs any more are freed."""
        last = self.rows - 1
        if row != last:
            live = slice(self.window.start, self.window.end)
            for layer in self.layers:
                layer.keys[row, :, live] = layer.keys[last, :, live]
                layer.values[row, :, live] = layer.values[last, :, live]
            self.mask[row] = self.mask[last]
        self.rows = last
        if last == 0:
            self.window.start = self.window.end = 0
        else:
            self.window.start += int(self.live_mask().any(0).int().argmax()) - self.blank

    def clear(self) -> None:
        """Gives the buffers back; there may be no row."""
        self.layers, self.rows = [], 0
        self.window.start = self.window.end = 0
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=self.mask.device)

    def length(self, row: int) -> int:
        """Positions that a row holds."""
        return int(self.mask[row, self.window.start : self.window.end].sum())

    def state(self, row: int, marks: Sequence[int]) -> State:
        """A copy of the first len(marks) positions of a row."""
        start = self.window.end - self.length(row)
        return row_state(self, row, start, start + len(marks), marks)

    def reserve(self, rows: int, columns: int, longest: int = 0, *, exactly: bool = False) -> None:
        """Makes the buffers at least this large (or `exactly`), with room to join a row of `longest` positions."""
        live = self.window.end - self.window.start
        longest += self.blank
        if self.follows:
            self.most = columns
            columns = self._following(max(live, longest))
        if not exactly:
            rows, columns = max(rows, self.mask.shape[0]), max(columns, self.mask.shape[1])
        if (rows, columns) != tuple(self.mask.shape) or self.window.end < longest:
            self._resize(rows, columns, max(live, longest) - live)

    def _make_room(self, rows: int, right: int, length: int = 0) -> None:
        """Makes room for `rows` rows, `right` more columns behind the live ones, and a row of `length` that ends where they do."""
        # Rows are right-aligned: a joining row longer than the live columns needs room to the left of them, and every
        # step takes a column on the right.
        live = self.window.end - self.window.start
        span = max(live, length)
        fits = self.window.end - span >= 0 and self.window.end + right <= self.mask.shape[1]
        if rows <= self.mask.shape[0] and fits:
            return
        # With some to spare, so that moving stays rare.
        columns = max(self.mask.shape[1], room(span + right))
        if self.follows:
            columns = max(span + right, self._following(span))
        self._resize(max(rows, self.mask.shape[0]), columns, span - live)

    def _following(self, span: int) -> int:
        """Columns of buffers that follow rows of `span` live columns."""
        return max(span, min(span + SPARE, self.most))

    def _resize(self, rows: int, columns: int, start: int) -> None:
        """Allocates new buffers where the size changes, and moves the live columns so that they begin at `start`."""
        live = self.window.end - self.window.start
        # Only live rows and columns are copied; everything outside of them is masked, and `join` clears a row before use.
        old, new = slice(self.window.start, self.window.end), slice(start, start + live)
        for layer in self.layers:
            layer.keys = _moved(layer.keys, rows, columns, old, new, self.rows)
            layer.values = _moved(layer.values, rows, columns, old, new, self.rows)
        # The mask is made again and not moved, so that no column outside the live ones is ever marked as real.
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=self.mask.device)
        mask[: self.rows, new] = self.mask[: self.rows, old]
        self.mask = mask
        self.window.start, self.window.end = start, start + live


def _moved(buffer: Tensor, rows: int, columns: int, old: slice, new: slice, used: int) -> Tensor:
    if buffer.shape[0] == rows and buffer.shape[2] == columns:
        buffer[:used, :, new] = buffer[:used, :, old].clone()  # they may overlap
        return buffer
    moved = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])
    moved[:used, :, new] = buffer[:used, :, old]
    return moved
