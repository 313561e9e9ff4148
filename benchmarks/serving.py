"""The server's engine against transformers' static batch, in tokens a CPU second of one thread; and what long rows cost.

    python benchmarks/serving.py                                 # the bundled base
    python benchmarks/serving.py --base FOLDER --rows 8 32 64    # a real one

Arms take turns in every round, and only their ratios within a round are compared: CPU seconds of the whole process, since
wall time says nothing on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

from machine import describe

HERE = Path(__file__).resolve().parent
WORDS = (
    "my order never came and nobody answers when will it be here the box was open and one part is missing please send "
    "another or give me the money back I have been a customer for ten years and this is the first time that I complain "
    "thank you for the quick help last week it was very kind of you to call me in the evening after work"
).split()


def texts_of(rows: int) -> list[str]:
    """Texts of 4 to 60 words."""
    return [" ".join(WORDS[: 4 + (row * 37) % 57]) for row in range(rows)]


def arms(lm: Any, rows: int, new: int) -> dict[str, Callable[[], Any]]:
    import torch

    from softprompt.inference.settings import DecodeSettings
    from softprompt.prompt.soft_prompt import SoftPrompt
    from softprompt.serving.engine import Work
    from softprompt.serving.local_engine import LocalEngine

    texts = texts_of(rows)
    lm.tokenizer.padding_side = "left"
    if lm.tokenizer.pad_token is None:
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
    padded = lm.tokenizer(texts, return_tensors="pt", padding=True)
    given = {name: padded[name] for name in ("input_ids", "attention_mask")}
    greedy = DecodeSettings(max_new_tokens=new, ignore_end=True)
    engine = LocalEngine(lm, max_rows=rows)
    for seed in range(8):
        vectors = lm.embed(torch.arange(20 * seed, 20 * seed + 20)).float()
        engine.load(SoftPrompt(vectors, lm.fingerprint, "{soft:20}{text}"), str(seed))
    engine.start()

    async def one(text: str, digest: str | None) -> None:
        async for _ in engine.submit(Work(digest, text, greedy)):
            pass

    async def everyone(*, mixed: bool) -> None:
        digests = [str(row % 10) if mixed and row % 10 < 8 else None for row in range(rows)]
        await asyncio.gather(*(one(text, digest) for text, digest in zip(texts, digests, strict=True)))

    return {
        "transformers": lambda: lm.model.generate(
            **given, max_new_tokens=new, min_new_tokens=new, do_sample=False
        ),
        "engine, base alone": lambda: asyncio.run(everyone(mixed=False)),
        "engine, 8 prompts in turn and none": lambda: asyncio.run(everyone(mixed=True)),
    }


def long_row(lm: Any, rounds: int) -> dict[str, Any]:
    """A step of 31 rows of 16 tokens beside one of 1,024, in one rectangle and in lanes, against one without it; and a part of a
    long text against such a step."""
    from softprompt.base.kv import EMPTY
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.lanes import Lanes
    from softprompt.inference.prefill import PrefillRow, read_on
    from softprompt.inference.running_batch import Running, request
    from softprompt.inference.settings import DecodeSettings
    from softprompt.serving.local_engine import READ_BESIDE_CPU

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


def admission(lm: Any, rounds: int) -> dict[str, Any]:
    """Reading 32 texts of unlike length: in one pass as long as the longest, and in passes of like lengths."""
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.prefill import like_lengths, prefill

    base = compile_prompt(lm, None)
    rows = [base.row(base.marks(lm, text)) for text in texts_of(32)]
    groups = like_lengths(lm, rows)

    def in_groups() -> None:
        for group in groups:
            prefill(lm, group)

    ways: dict[str, Callable[[], Any]] = {"one pass": lambda: prefill(lm, rows), "like lengths": in_groups}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way, run in list(ways.items())[:: 1 if turn % 2 else -1]:
            taken[way].append(cpu_seconds(run))
    ratios = [mine / whole for mine, whole in zip(taken["like lengths"], taken["one pass"], strict=True)]
    return {
        "real_positions": sum(row.rest for row in rows),
        "passes": len(groups),
        "cpu_milliseconds": {way: round(1000 * statistics.median(each), 1) for way, each in taken.items()},
        "times_one_pass": [round(ratio, 3) for ratio in ratios],
    }


def shared_prompt(lm: Any, rounds: int, length: int = 1024, rows: int = 16) -> dict[str, Any]:
    """A step of rows under one long prompt: copied into each row, and held once."""
    import torch

    from softprompt.base import shared_prefix
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.running_batch import Running, request
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


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine against transformers' static batch.")
    parser.add_argument("--base", default="builtin", help="A base, or its folder.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 64])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts",
        nargs="*",
        default=["a long row", "admission of 32 unlike texts", "a long prompt"],
        help="What is measured beside the throughput.",
    )
    parser.add_argument("--name", help="The base's name in the result.")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    import torch

    from softprompt.base.frozen_lm import FrozenLM

    torch.set_num_threads(1)
    lm = FrozenLM.load(asked.base, dtype=asked.dtype, device="cpu")
    name = asked.name or Path(asked.base).name
    out = asked.out or HERE / f"serving_{name}.json"
    load = os.getloadavg()
    results: dict[str, Any] = {}
    for rows in asked.rows:
        every = arms(lm, rows, asked.new)
        rates: dict[str, list[float]] = {arm: [] for arm in every}
        for arm, run in every.items():
            if arm != "transformers":
                run()  # compiles its prompts
        for turn in range(asked.rounds):
            order = list(every.items())[:: 1 if turn % 2 else -1]
            for arm, run in order:
                rates[arm].append(rows * asked.new / cpu_seconds(run))
        results[f"{rows} rows"] = {
            arm: {
                "tokens_per_cpu_second": round(statistics.median(values), 1),
                "times_transformers": [
                    round(mine / theirs, 3)
                    for mine, theirs in zip(values, rates["transformers"], strict=True)
                ],
            }
            for arm, values in rates.items()
        }
        for arm, values in results[f"{rows} rows"].items():
            print(f"{rows} rows, {arm}: {values['tokens_per_cpu_second']}, {values['times_transformers']}")
    for part, measure in (
        ("a long row", long_row),
        ("admission of 32 unlike texts", admission),
        ("a long prompt", shared_prompt),
    ):
        if part in asked.parts:
            results[part] = measure(lm, asked.rounds)
            print(json.dumps(results[part], indent=1))
    settings = {
        "base": name,
        "dtype": str(lm.dtype),
        "new_tokens": asked.new,
        "rounds": asked.rounds,
        "threads": 1,
        "note": "A shared machine, other work beside it; CPU seconds of the process, arms in turn.",
        "load_average_at_the_start": [round(value, 1) for value in load],
    }
    out.write_text(json.dumps({**describe(), "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
