"""The machine: which arithmetic is fast here, what memory a process holds, what timings were taken on.

Which arithmetic is fast is measured rather than guessed from the CPU's name.

bfloat16 instructions do not say that bfloat16 products are fast: on some CPUs they run at half the rate of float32, on
others at more than twice. Weights are kept in the base's dtype either way; only products may be done in float32, whose
rounding is finer.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from softprompt.base.disk_cache import read_table, remember

# Large enough for the full rate, small enough for a few milliseconds.
ROWS, WIDTH, COLUMNS = 256, 1024, 1024
MIN_SPEEDUP = 1.2  # below it the difference may be noise
RATES = "rates.json"


def product_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products with weights of that dtype are done: theirs, or float32 where that is faster."""
    if device.type != "cpu" or weights not in (torch.bfloat16, torch.float16):
        return weights
    return torch.float32 if float32_is_faster(weights) else weights


@cache
def float32_is_faster(than: torch.dtype) -> bool:
    """Whether this CPU multiplies float32 matrices clearly faster, the conversion of the weights included.

    Measured once on each machine and kept in the user's cache folder: a run that is resumed or repeated must round as
    it did before, however busy the machine is then."""
    key = f"{processor_name()}, torch {torch.__version__}, float32 faster than {than}"
    faster = read_table(RATES).get(key)
    if not isinstance(faster, bool):
        faster = measure_float32_is_faster(than)
        remember(RATES, key, faster)
    return faster


def measure_float32_is_faster(than: torch.dtype) -> bool:
    with torch.inference_mode():
        left, right = torch.ones(ROWS, WIDTH, dtype=than), torch.ones(COLUMNS, WIDTH, dtype=than)
        wide = left.float()
        return _seconds(lambda: left @ right.T) > MIN_SPEEDUP * _seconds(lambda: wide @ right.float().T)


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


def processor_name() -> str:
    """The processor's name as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(product: Any) -> float:
    """The fastest of five after a warm-up: other work on the machine can only add time."""
    product()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return best


def memory_bytes(device: torch.device) -> int:
    """Memory that this process holds now: on the GPU where the base lies on one."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: torch.device) -> int:
    """The most it has held since `forget_peak`, or since it started where the system cannot forget."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux: the peak of this program's memory. The ru_maxrss of getrusage would be the parent's where that is larger,
    # for a child inherits it until it has been larger itself.
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = psutil.Process().memory_info()
    if peak := getattr(usage, "peak_wset", 0):  # Windows
        return int(peak)
    import resource  # macOS and other Unixes

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Measures the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux alone; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could still be taken: on the GPU where the base lies on one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_memory_bytes() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that timings were taken on; a load above the number of cores means that other programs slowed them."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    with contextlib.suppress(OSError):
        facts["load"] = round(os.getloadavg()[0], 1)
    return facts
