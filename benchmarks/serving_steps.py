"""What single steps of the engine cost: long rows beside short ones, long texts that join, admission, a prompt held once.

Measured by benchmarks/serving.py, in CPU seconds of this process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

WORDS = (
    "my order never came and nobody answers when will it be here the box was open and one part is missing please send "
    "another or give me the money back I have been a customer for ten years and this is the first time that I complain "
    "thank you for the quick help last week it was very kind of you to call me in the evening after work"
).split()


def texts_of(rows: int) -> list[str]:
    """Texts of 4 to 60 words."""
    return [" ".join(WORDS[: 4 + (row * 37) % 57]) for row in range(rows)]


def long_row(lm: Any, rounds: int) -> dict[str, Any]:
    """A step of 31 rows of 16 tokens beside one of 1,024, in one rectangle and in lanes, against one without it; and a part of a
    long text against such a step."""
    from softprompt.base.kv import EMPTY
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.lanes import Lanes
    from softprompt.inference.prefill import PrefillRow, read_on
    from softprompt.inference.request import request
    from softprompt.inference.running_batch import Running
    from softprompt.inference.settings import DecodeSettings
    from softprompt.serving.scheduler import READ_BESIDE_CPU

    base = compile_prompt(lm, None)
    greedy = DecodeSettings(max_new_tokens=100, ignore_end=True)

    def marks(length: int) -> list[int]:
        return [5 + place % 200 for place in range(length)]

    def filled(make: Callable[[], Any], lengths: list[int]) -> Any:
        running = make()
        running.join([request(lm, base, marks(length), greedy) for length in lengths])
        return running

    kinds = {
        "32 short rows": filled(lambda: Lanes(lm, max_rows=32), [16] * 32),
        "one long, one rectangle": filled(lambda: Running(lm, max_rows=32), [16] * 31 + [1024]),
        "one long, lanes": filled(lambda: Lanes(lm, max_rows=32), [16] * 31 + [1024]),
    }
    bytes_of = {name: running.bytes for name, running in kinds.items()}
    taken: dict[str, list[float]] = {name: [] for name in [*kinds, "a part of a long text"]}
    for _ in range(4 * rounds):
        for name, running in kinds.items():
            taken[name].append(cpu_seconds(running.advance))
        row = PrefillRow(EMPTY, tuple(marks(1500)))
        taken["a part of a long text"].append(cpu_seconds(lambda row=row: read_on(lm, row, READ_BESIDE_CPU)))
    step = statistics.median(taken["32 short rows"])
    return {
        name: {
            "cpu_milliseconds": round(1000 * statistics.median(values), 1),
            "times_a_step_of_short_rows": round(statistics.median(values) / step, 2),
            **(
                {
                    "bytes": bytes_of[name],
                    "times_the_bytes": round(bytes_of[name] / bytes_of["32 short rows"], 2),
                }
                if name in bytes_of
                else {}
            ),
        }
        for name, values in taken.items()
    }


def joining(lm: Any, rounds: int) -> dict[str, Any]:
    """A text of 1,500 tokens joins 31 running rows: how long they wait for its parts between two of their steps."""
    import threading

    from softprompt.inference.settings import DecodeSettings
    from softprompt.serving.engine import Work
    from softprompt.serving.held_prompts import HeldPrompts
    from softprompt.serving.scheduler import Scheduler
    from softprompt.serving.waiting import Ticket, Waiting

    loop = asyncio.new_event_loop()
    results: list[tuple[float, list[float]]] = []
    for _ in range(rounds):
        waiting = Waiting(threading.Condition())
        scheduler = Scheduler(lm, HeldPrompts(lm), waiting, max_rows=32)

        def put(length: int, new: int, waiting: Any = waiting) -> None:
            settings = DecodeSettings(max_new_tokens=new, ignore_end=True)
            marks = [5 + place % 200 for place in range(length)]
            waiting.add(Ticket(Work(None, marks, settings), None, loop))

        for _ in range(31):
            put(16, 100)
        while waiting:
            scheduler.admit()
            scheduler.advance()
        step = statistics.median(cpu_seconds(scheduler.advance) for _ in range(8))
        put(1500, 1)
        stops: list[float] = []
        while waiting or scheduler.reading:
            stops.append(cpu_seconds(scheduler.admit))
            scheduler.advance()
        results.append((step, stops))
    loop.close()
    return {
        "step_cpu_milliseconds": [round(1000 * step, 1) for step, _ in results],
        "parts": [len(stops) for _, stops in results],
        "median_stop_in_steps": [round(statistics.median(stops) / step, 2) for step, stops in results],
        "longest_stop_in_steps": [round(max(stops) / step, 2) for step, stops in results],
    }


def admission(lm: Any, rounds: int) -> dict[str, Any]:
    """Reading 32 texts of unlike length: in one pass as long as the longest, in passes of like lengths, and in one list."""
    return {
        "texts of 4 to 60 words": _admission(lm, rounds, [len(marks) for marks in _text_marks(lm)]),
        "10 to 115 tokens": _admission(lm, rounds, [10 + (row * 37) % 106 for row in range(32)]),
    }


def _text_marks(lm: Any) -> list[list[int]]:
    from softprompt.inference.compiled import compile_prompt

    base = compile_prompt(lm, None)
    return [base.marks(lm, text) for text in texts_of(32)]


def _admission(lm: Any, rounds: int, lengths: list[int]) -> dict[str, Any]:
    import torch

    from softprompt.base.kv import EMPTY
    from softprompt.inference.prefill import PrefillRow, like_lengths, prefill, prefill_groups

    rows = [
        PrefillRow(EMPTY, tuple(5 + (length + place) % 200 for place in range(length))) for length in lengths
    ]
    groups = like_lengths(lm, rows)
    ways: dict[str, Callable[[], Any]] = {
        "one pass": lambda: prefill(lm, rows),
        "passes of like lengths": lambda: [prefill(lm, group) for group in groups],
        "one list": lambda: prefill_groups(lm, groups),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        prefill_groups(lm, groups)  # tries once whether the base can be read so
        for turn in range(rounds):
            for way, run in list(ways.items())[:: 1 if turn % 2 else -1]:
                taken[way].append(cpu_seconds(run))
    return {
        "real_positions": sum(lengths),
        "positions_of_one_pass": len(lengths) * max(lengths),
        "passes": len(groups),
        "cpu_milliseconds": {way: round(1000 * statistics.median(each), 1) for way, each in taken.items()},
        "times_one_pass": {
            way: [round(mine / whole, 3) for mine, whole in zip(each, taken["one pass"], strict=True)]
            for way, each in taken.items()
        },
    }


def shared_prompt(lm: Any, rounds: int, length: int = 1024, rows: int = 16) -> dict[str, Any]:
    """A step of rows under one long prompt: copied into each row, and held once."""
    import torch

    from softprompt.base import shared_prefix
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.request import request
    from softprompt.inference.running_batch import Running
    from softprompt.inference.settings import DecodeSettings
    from softprompt.prompt.soft_prompt import SoftPrompt

    vectors = lm.embed(torch.arange(100, 100 + length)).float()
    compiled = compile_prompt(lm, SoftPrompt(vectors, lm.fingerprint, f"{{soft:{length}}}{{text}}"))
    greedy = DecodeSettings(max_new_tokens=100, ignore_end=True)

    def filled(from_length: int) -> Running:
        before, shared_prefix.SHARED_FROM = shared_prefix.SHARED_FROM, from_length
        try:
            running = Running(lm, max_rows=rows)
            running.join([request(lm, compiled, text, greedy) for text in texts_of(rows)])
            return running
        finally:
            shared_prefix.SHARED_FROM = before

    ways = {"copied": filled(10**9), "held once": filled(128)}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(4 * rounds):
        for way, running in ways.items():
            taken[way].append(cpu_seconds(running.advance))
    return {
        "positions": length,
        "rows": rows,
        "cpu_milliseconds": {way: round(1000 * statistics.median(each), 1) for way, each in taken.items()},
        "bytes": {way: running.bytes for way, running in ways.items()},
    }


def cpu_seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


PARTS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "a long row": long_row,
    "a long text that joins": joining,
    "admission of 32 unlike texts": admission,
    "a long prompt": shared_prompt,
}
