"""What a run costs: memory, time, decoding speed, tokens added to every request."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.generate import DecodeSettings, generate

DECODED_TOKENS = 32
DECODED_ROWS = 8


def memory_bytes(device: torch.device) -> int:
    """Memory that this process holds now: on the GPU where the base lies on one."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or _peak_of_process()


def peak_memory_bytes(device: torch.device) -> int:
    """The most it has held since `forget_peak`, or since it started where the system cannot forget."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or _peak_of_process()


def forget_peak(device: torch.device) -> None:
    """Start measuring the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux alone; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    # Not ru_maxrss: a child inherits its parent's peak there.
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Clock:
    """Wall and CPU seconds since it was made; a GPU is waited for."""

    device: torch.device

    def __post_init__(self) -> None:
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        self._wait()
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def decoding_speed(lm: FrozenLM, prompt: CompiledPrompt, examples: Sequence[Example]) -> float:
    """New tokens a second, 32 for each of 8 rows side by side, their texts' reading included. The better of two."""
    rows = [examples[i % len(examples)] for i in range(DECODED_ROWS)]
    settings = DecodeSettings(max_new_tokens=DECODED_TOKENS, ignore_end=True)
    speeds = []
    for _ in range(2):
        clock = Clock(lm.device)
        done = generate(lm, rows, prompt, settings, batch_rows=DECODED_ROWS)
        speeds.append(sum(one.tokens for one in done) / clock.read()["seconds"])
    return max(speeds)


def added_tokens(
    lm: FrozenLM, prompt: CompiledPrompt, alone: CompiledPrompt, examples: Sequence[Example]
) -> float:
    """Positions that the prompt adds to a request, on average over some examples."""
    some = examples[:DECODED_ROWS]
    added = [len(prompt.marks(lm, one)) - len(alone.marks(lm, one)) for one in some]
    return sum(added) / len(added)


def machine(device: torch.device) -> dict[str, Any]:
    """What the timings were taken on; a load above the number of cores means that others slowed them."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    with contextlib.suppress(OSError):
        found["load"] = round(os.getloadavg()[0], 1)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
