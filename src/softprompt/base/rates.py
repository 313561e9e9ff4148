"""Which arithmetic is fast here, measured rather than guessed from the CPU's name.

bfloat16 instructions do not say that bfloat16 products are fast: on some CPUs they run at half the rate of float32, on
others at more than twice. Weights are kept in the base's dtype either way; only products may be done in float32, whose
rounding is finer.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

# Large enough for the full rate, small enough for a few milliseconds.
ROWS, WIDTH, COLUMNS = 256, 1024, 1024
CLEARLY = 1.2


def product_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products with weights of that dtype are done: theirs, or float32 where that is faster."""
    if device.type != "cpu" or weights not in (torch.bfloat16, torch.float16):
        return weights
    return torch.float32 if float32_is_faster(weights) else weights


@cache
def float32_is_faster(than: torch.dtype) -> bool:
    """Whether this CPU multiplies float32 matrices clearly faster, the conversion of the weights counted."""
    with torch.inference_mode():
        left, right = torch.ones(ROWS, WIDTH, dtype=than), torch.ones(COLUMNS, WIDTH, dtype=than)
        wide = left.float()
        return _seconds(lambda: left @ right.T) > CLEARLY * _seconds(lambda: wide @ right.float().T)


@cache
def has_int8_products() -> bool:
    """Whether this CPU has int8 dot products (VNNI or AMX), and this torch a product with packed int8 weights."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(
        vnni is not None
        and vnni()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.onednn, "qlinear_prepack")
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
    )


def _seconds(product: Any) -> float:
    """The fastest of a few, after one to warm up: other work on the machine only ever adds."""
    product()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return best
