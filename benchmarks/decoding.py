"""Tokens a second in generation: transformers' own generate against softprompt, alone, with a prompt, and mixed.

    python benchmarks/decoding.py                                  # the bundled base, batches of 1 and 8
    python benchmarks/decoding.py --base bloomz-560m --new 16      # that shape with random weights

All arms run in one process and take turns, so that only their ratios in a round are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from machine import describe

HERE = Path(__file__).resolve().parent
TEXTS = [
    "I want you to act as a logistician. ",
    "Tweet: my order never came and nobody answers. What now?",
    "Hello",
    "Classify the text as a complaint or no complaint, please:",
]


def arms(lm: Any, rows: int, new: int) -> dict[str, Callable[[], Any]]:
    import torch

    from softprompt.inference.compiled import TextPrompt, compile_prompt
    from softprompt.inference.generate import DecodeSettings, generate
    from softprompt.prompt.soft_prompt import SoftPrompt

    texts = [TEXTS[row % len(TEXTS)] for row in range(rows)]
    lm.tokenizer.padding_side = "left"
    if lm.tokenizer.pad_token is None:
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
    found = lm.tokenizer(texts, return_tensors="pt", padding=True)
    given = {name: found[name].to(lm.device) for name in ("input_ids", "attention_mask")}
    soft = compile_prompt(
        lm,
        SoftPrompt(
            lm.embed(torch.arange(20, device=lm.device)).float().cpu(), lm.fingerprint, "{soft:20}{text}"
        ),
    )
    base, text = compile_prompt(lm, None), compile_prompt(lm, TextPrompt("Answer in one sentence. "))
    mixed = [(soft, base, text)[row % 3] for row in range(rows)]
    greedy = DecodeSettings(max_new_tokens=new, ignore_end=True)
    return {
        "transformers": lambda: lm.model.generate(
            **given, max_new_tokens=new, min_new_tokens=new, do_sample=False
        ),
        "softprompt, base alone": lambda: generate(lm, texts, base, greedy),
        "softprompt, 20 virtual tokens": lambda: generate(lm, texts, soft, greedy),
        "softprompt, mixed prompts": lambda: generate(lm, texts, mixed, greedy),
    }


def load(name: str, dtype: str) -> Any:
    from softprompt.base.frozen_lm import FrozenLM

    if name != "bloomz-560m":
        return FrozenLM.load(name, dtype=dtype)
    from transformers import AutoConfig, AutoModelForCausalLM

    builtin = FrozenLM.load("builtin", dtype=dtype)
    config = AutoConfig.for_model("bloom", hidden_size=1024, n_layer=24, n_head=16, vocab_size=250_880)
    model = AutoModelForCausalLM.from_config(config).to(builtin.device, builtin.dtype)
    return FrozenLM.wrap(model, builtin.tokenizer, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second in generation.")
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = load(asked.base, asked.dtype)
    results = {}
    for rows in asked.rows:
        every = arms(lm, rows, asked.new)
        rates: dict[str, list[float]] = {name: [] for name in every}
        for run in every.values():
            run()
        for _ in range(asked.rounds):
            for name, run in every.items():
                began = time.perf_counter()
                run()
                rates[name].append(rows * asked.new / (time.perf_counter() - began))
        results[f"{rows} rows"] = {
            name: {
                "tokens_per_second": round(statistics.median(values), 1),
                "times_transformers": {
                    "median": round(
                        statistics.median(
                            mine / theirs for mine, theirs in zip(values, rates["transformers"], strict=True)
                        ),
                        3,
                    ),
                    "rounds": [
                        round(mine / theirs, 3)
                        for mine, theirs in zip(values, rates["transformers"], strict=True)
                    ],
                },
            }
            for name, values in rates.items()
        }
        for name, one in results[f"{rows} rows"].items():
            print(
                f"{rows} rows, {name}: {one['tokens_per_second']} tokens/s, {one['times_transformers']['median']}x"
            )
    out = asked.out or HERE / f"decoding_{asked.base}.json"
    settings = {"base": asked.base, "dtype": str(lm.dtype), "new_tokens": asked.new, "rounds": asked.rounds}
    out.write_text(json.dumps({**describe(), "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
