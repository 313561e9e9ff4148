"""How the cost of a learning step grows: prompt length, text length, batch, vocabulary, layers, one at a time.

    python benchmarks/scaling.py

Random weights of BLOOM's architecture, one process; seconds are the CPU's, the least of a few. What a trained token
costs less than a read one is shown too: the same step with one label a row.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from machine import describe, peak_bytes
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from tuning_vs_peft import tokenizer_folder

MIDDLE = {"length": 20, "text": 64, "batch": 4, "vocabulary": 32_000, "layers": 2}
VALUES = {
    "length": [1, 20, 100],
    "text": [32, 64, 128, 256],
    "batch": [1, 4, 8],
    "vocabulary": [8_000, 32_000, 250_880],
    "layers": [2, 4],
}
WIDTH = 256


def step_seconds(label_only: bool = False, **chosen: int) -> float:
    size = MIDDLE | chosen
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=size["vocabulary"], hidden_size=WIDTH, n_layer=size["layers"], n_head=WIDTH // 64
    )
    model = BloomForCausalLM(config).to(torch.bfloat16)
    lm = FrozenLM.wrap(model, AutoTokenizer.from_pretrained(tokenizer_folder()))
    virtual, text = size["length"], size["text"]
    ids = torch.randint(5, 8_000, (size["batch"], text)).tolist()
    trained = [False] * (virtual + text - 1) + [True] if label_only else [False] * virtual + [True] * text
    rows = [
        Encoded([0] * virtual + own, [*range(virtual), *[-1] * text], trained, number, 0)
        for number, own in enumerate(ids)
    ]
    batch = collate(rows)
    prompt_PD = (torch.randn(virtual, WIDTH) * 0.02).requires_grad_()
    best = float("inf")
    for turn in range(3):
        began = time.process_time()
        lm.token_nll(batch, prompt_PD).sum().backward()
        if turn:
            best = min(best, time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, values in VALUES.items():
        found[name] = {str(value): round(step_seconds(**{name: value}), 4) for value in values}
        print(name, found[name], flush=True)
    found["one label a row"] = {"250880": round(step_seconds(label_only=True, vocabulary=250_880), 4)}
    print("one label a row", found["one label a row"])
    result = {
        **describe(),
        "note": options.note,
        "width": WIDTH,
        "middle": MIDDLE,
        "step_cpu_seconds": found,
        "peak_bytes": peak_bytes("cpu"),
    }
    (Path(__file__).parent / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
