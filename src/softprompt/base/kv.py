"""Key/value state: what the frozen model holds after reading a sequence, for one row and for a batch of rows.

Rows of a batch differ in length, yet sliding windows, chunks and ALiBi count cache columns. So every row's real
positions are contiguous columns, its last one in the same column as its neighbours': distances in the cache are then
distances in the text, for every architecture, and padding is only ever to the left of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class State:
    """Keys and values of one sequence, a tensor [H, P, K] a layer, and what is at each of its P positions.

    A mark is a token's id, or -1 - i for row i of a prompt's vectors.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    marks: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.marks)

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def __repr__(self) -> str:
        return f"State({self.length} positions, {self.bytes:,} bytes)"

    def first(self, length: int) -> State:
        """The state after the first `length` positions: a causal model's past never changes."""
        if length >= self.length:
            return self
        if length == 0:
            return EMPTY
        return State(
            tuple(keys[:, :length] for keys in self.keys),
            tuple(values[:, :length] for values in self.values),
            self.marks[:length],
        )

    def shared(self, marks: Sequence[int]) -> int:
        """The number of positions at the start of `marks` that this state already holds."""
        for position, (mine, other) in enumerate(zip(self.marks, marks, strict=False)):
            if mine != other:
                return position
        return min(len(self.marks), len(marks))


EMPTY = State((), (), ())


def new_cache() -> DynamicCache:
    """An empty cache without a config, so that layers with a sliding window keep every column and mask by index."""
    return DynamicCache()


def cache_of(keys_LBHCK: Tensor, values_LBHCK: Tensor) -> DynamicCache:
    """A cache that holds these keys and values, without a config as `new_cache`."""
    return DynamicCache(list(zip(keys_LBHCK, values_LBHCK, strict=True)))


def batch_cache(states: Sequence[State]) -> tuple[DynamicCache, int]:
    """A cache that holds one state a row, right-aligned, and its number of columns; for one forward pass.

    It has no config, so that sliding layers keep every column and the window is cut by the attention mask alone.
    """
    columns = max(state.length for state in states)
    if columns == 0:
        return DynamicCache(), 0
    # A row of nothing known has no layers; its heads and widths are taken from a row that has them.
    deepest = max(states, key=lambda state: len(state.keys))
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in range(len(deepest.keys)):
        both: list[Tensor] = []
        for which in ("keys", "values"):
            sample: Tensor = getattr(deepest, which)[layer]
            # Rows of one prompt share its tensors: expand copies nothing, and the forward pass only appends.
            if all(state is states[0] for state in states):
                both.append(sample.expand(len(states), *sample.shape))
                continue
            # Zeros on the left are masked; zeros and not noise, since a masked NaN would still spoil the sum.
            padded = sample.new_zeros(len(states), sample.shape[0], columns, sample.shape[2])
            for row, state in enumerate(states):
                if state.length:
                    padded[row, :, columns - state.length :] = getattr(state, which)[layer]
            both.append(padded)
        layers.append((both[0], both[1]))
    return DynamicCache(layers), columns


def row_state(cache: Any, row: int, start: int, end: int, marks: Sequence[int]) -> State:
    """A copy of the columns start..end of one row of a cache."""
    return State(
        tuple(layer.keys[row, :, start:end].contiguous() for layer in cache.layers),
        tuple(layer.values[row, :, start:end].contiguous() for layer in cache.layers),
        tuple(marks),
    )
