"""Costs of a run: memory, time, decoding speed, tokens added to every request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.generate import DecodeSettings, generate

DECODED_TOKENS = 32
DECODED_ROWS = 8


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
    """New tokens a second of `decoding_clock`, 32 for each of 8 rows side by side, reading their texts included.

    The better of two. On a CPU it counts CPU seconds: arms are measured minutes apart, and wall time would compare how
    busy the machine was."""
    rows = [examples[i % len(examples)] for i in range(DECODED_ROWS)]
    settings = DecodeSettings(max_new_tokens=DECODED_TOKENS, ignore_end=True)
    speeds = []
    for _ in range(2):
        clock = Clock(lm.device)
        done = generate(lm, rows, prompt, settings, batch_rows=DECODED_ROWS, progress=False)
        kind = "cpu_seconds" if decoding_clock(lm.device) == "cpu" else "seconds"
        speeds.append(sum(generation.tokens for generation in done) / clock.read()[kind])
    return max(speeds)


def decoding_clock(device: torch.device) -> str:
    """The clock of `decoding_speed`: CPU time, or wall time where another device computes."""
    return "cpu" if device.type == "cpu" else "wall"


def added_tokens(
    lm: FrozenLM, prompt: CompiledPrompt, alone: CompiledPrompt, examples: Sequence[Example]
) -> float:
    """Positions that the prompt adds to a request, on average over some examples."""
    some = examples[:DECODED_ROWS]
    added = [len(prompt.marks(lm, example)) - len(alone.marks(lm, example)) for example in some]
    return sum(added) / len(added)
