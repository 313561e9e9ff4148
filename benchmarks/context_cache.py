"""Epochs of a task whose text stands before the soft slot: the contexts read once against read anew in every epoch.

    python benchmarks/context_cache.py            # bloomz-560m's shape, 200 tokens of context, 20 virtual, one label

Both arms in one process, in turns, on the same model; the first epoch with the cache, which reads, is shown apart. The
losses and the prompt's gradient of both arms are compared too. A third arm learns all text, to show what a loss on the
label alone saves at the head.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from machine import describe
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from tuning_vs_peft import base_folder


def rows(count: int, context: int, virtual: int, every_token: bool) -> list[Encoded]:
    drawn = random.Random(0)
    found = []
    for number in range(count):
        ids = [drawn.randrange(5, 50_000) for _ in range(context)]
        label = [drawn.randrange(5, 50_000)]
        trained = [every_token and at > 0 for at in range(context)] + [False] * virtual + [True]
        found.append(
            Encoded(
                [*ids, *[0] * virtual, *label], [*[-1] * context, *range(virtual), -1], trained, number, 0
            )
        )
    return found


def epoch(
    lm: FrozenLM, encoded: list[Encoded], batch_size: int, prompt_PD: torch.Tensor
) -> tuple[float, float]:
    """Seconds, and the summed loss; gradients add up in the prompt."""
    began, total = time.perf_counter(), 0.0
    for first in range(0, len(encoded), batch_size):
        nll_N = lm.token_nll(collate(encoded[first : first + batch_size]).to(lm.device), prompt_PD)
        nll_N.sum().backward()
        total += nll_N.sum().item()
    return time.perf_counter() - began, total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="bloomz-560m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--work", default="/tmp/softprompt-benchmarks")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    Path(options.work).mkdir(parents=True, exist_ok=True)
    lm = FrozenLM.load(base_folder(options.base, Path(options.work)), device=options.device)
    encoded = rows(options.rows, options.context, options.length, False)
    whole = rows(options.rows, options.context, options.length, True)
    drawn = torch.Generator().manual_seed(0)
    start_PD = (
        torch.randn(options.length, lm.width, generator=drawn) * lm.embedding_VD[:5000].float().std().item()
    )
    budget = round(options.gigabytes * 10**9)
    seconds: dict[str, list[float]] = {"kept": [], "recomputed": [], "recomputed, all text learned": []}
    reads, losses, slopes = 0.0, {}, {}
    for turn in range(options.epochs + 1):
        for arm, data in (
            ("kept", encoded),
            ("recomputed", encoded),
            ("recomputed, all text learned", whole),
        ):
            prompt_PD = start_PD.to(lm.device, copy=True).requires_grad_()
            lm.context_cache.budget_bytes = budget if arm == "kept" else 0
            took, losses[arm] = epoch(lm, data, options.batch_size, prompt_PD)
            slopes[arm] = prompt_PD.grad
            if turn == 0 and arm == "kept":
                reads = took
            if turn > 0:
                seconds[arm].append(took)
            print(f"epoch {turn} {arm}: {took:.2f} s", flush=True)
    ratios = [slow / fast for slow, fast in zip(seconds["recomputed"], seconds["kept"], strict=True)]
    difference = (slopes["kept"] - slopes["recomputed"]).norm() / slopes["recomputed"].norm()
    result: dict[str, Any] = {
        **describe(),
        "settings": {key: value for key, value in vars(options).items() if key != "work"},
        "epoch_seconds": {
            arm: {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "n": len(values),
            }
            for arm, values in seconds.items()
        },
        "first_epoch_kept_seconds": reads,
        "times_faster": {"median": statistics.median(ratios), "epochs": ratios},
        "kept_bytes": lm.context_cache.bytes,
        "loss": losses,
        "relative_difference_of_the_gradient": float(difference),
    }
    import json

    (Path(__file__).parent / "context_cache.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"kept against recomputed: {statistics.median(ratios):.2f} times; gradients differ by {difference:.2g}"
    )


if __name__ == "__main__":
    main()
