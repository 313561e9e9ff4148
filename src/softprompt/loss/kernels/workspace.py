"""Working memory that is reused from call to call on a CPU.

Large temporaries between results that stay fragment the heap, by more than a gigabyte where it was measured. So what
a step needs only briefly lies in one buffer for each use and thread.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 2**17  # of a chunk: half a megabyte of float32 stays in a core's cache

_own = threading.local()


def scratch(use: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of this shape, its content undefined; the next call of the same `use` and dtype returns the same memory."""
    count = 1
    for size in shape:
        count *= size
    buffers: dict[tuple[str, torch.dtype], Tensor] = vars(_own).setdefault("buffers", {})
    buffer = buffers.get((use, dtype))
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):
            buffer = buffers[use, dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count].view(shape)


def row_chunks(rows_ND: Tensor) -> list[slice]:
    """Slices of rows that are small enough for the cache, for what reads and writes them several times."""
    size = max(1, NUMBERS_AT_ONCE // rows_ND.shape[1])
    return [slice(first, first + size) for first in range(0, len(rows_ND), size)]
