"""Working memory that is used over and over on a CPU.

Large temporaries between results that stay would tear the heap into holes: more than a gigabyte of them was seen. What
a step only needs for a moment therefore lies in one buffer for each use and thread.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_own = threading.local()


def scratch(use: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of this shape, its content undefined; the next call of the same `use` and dtype hands it out again."""
    count = 1
    for size in shape:
        count *= size
    buffers: dict[tuple[str, torch.dtype], Tensor] = vars(_own).setdefault("buffers", {})
    known = buffers.get((use, dtype))
    if known is None or known.numel() < count:
        with torch.inference_mode(False):
            known = buffers[use, dtype] = torch.empty(count, dtype=dtype)
    return known[:count].view(shape)
