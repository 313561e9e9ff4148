"""What it costs to learn several prompts side by side, against as many runs one after another on the same loaded base.

    python benchmarks/side_by_side.py --base builtin --prompts 8 --steps 8 --out benchmarks/side_by_side.json

Both roads take the same rows in the same order, with seeds 0 to N-1 for the starts; both are timed in this process,
in turns. `difference` is the largest between any two values of a prompt learned on the two roads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from machine import describe
from softprompt.base.frozen_lm import FrozenLM
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.together import tune_together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = FrozenLM.load(given.base, dtype=given.dtype)
    found = [measured(lm, given, batch_size) for batch_size in given.batch_size]
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    result = {"settings": settings, "by_batch_size": found, **describe()}
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(lm: FrozenLM, given: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Seconds of both roads, their ratio round by round, and how far their prompts are apart."""

    def recipes(folder: Path) -> list[Recipe]:
        overrides = [
            "data.source=builtin:messages",
            "data.template={soft}{text} Kind: {label}",
            "data.target=label",
            "data.validation=0",
            f"data.limit={given.steps * batch_size}",
            f"prompt.length={given.length}",
            f"tune.max_steps={given.steps}",
            f"tune.batch_size={batch_size}",
        ]
        return [
            Recipe.from_flags({}, [*overrides, f"tune.seed={seed}", f"out={folder / str(seed)}"])
            for seed in range(given.prompts)
        ]

    rows: list[dict[str, float]] = []
    difference = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(given.rounds + 1):
            seconds: dict[str, float] = {}
            prompts: dict[str, list[torch.Tensor]] = {}
            for road in ("side by side", "one by one")[:: 1 if turn % 2 else -1]:
                made = recipes(Path(scratch) / road)
                began = time.perf_counter()
                if road == "side by side":
                    tuned = tune_together(made, lm=lm)
                else:
                    tuned = [tune(recipe, lm=lm) for recipe in made]
                seconds[road] = time.perf_counter() - began
                prompts[road] = [next(iter(one.prompt.tensors.values())) for one in tuned]
            pairs = zip(prompts["side by side"], prompts["one by one"], strict=True)
            difference = max(float((one - other).abs().max()) for one, other in pairs)
            if turn:  # the first warms up
                rows.append(seconds)
                print(f"batch {batch_size}: {seconds}", flush=True)
    ratios = [row["one by one"] / row["side by side"] for row in rows]
    return {
        "batch_size": batch_size,
        "seconds_side_by_side": statistics.median(row["side by side"] for row in rows),
        "seconds_one_by_one": statistics.median(row["one by one"] for row in rows),
        "times_faster": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "difference": difference,
    }


if __name__ == "__main__":
    main()
