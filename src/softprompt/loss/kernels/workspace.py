"""Working memory that is reused from call to call on a CPU.

Large temporaries between results that stay fragment the heap, by more than a gigabyte where it was measured. So what
a step needs only briefly lies in one buffer for each use and thread.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

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
