"""A deep prompt that learns in the upper half of the layers: CPU seconds to the validation loss that all layers reach.

    python benchmarks/half_depth.py --base bases/smollm2 --sets snips e2e_nlg --seeds 0 1 --out benchmarks/half_depth.json

`prompt.upper_layers: 0.5` keeps the hidden states that enter the upper half, so that a row seen before costs half of a step.
Both arms see the same rows in the same order, for five epochs, at the automatic rate that is measured for each. Seconds are CPU seconds
of the steps alone, without validations. `faster` is how many times fewer of them the upper half takes to the first validated loss at or
below a level: half, four fifths and all of the fall of the arm that ends higher. Validation rows are held out of the training part; no
test row is read.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from machine import describe
from quality_vs_peft import TASKS
from rate import recipe, short
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Splits
from softprompt.progress.events import Event, Stepped, Validated
from softprompt.tuning.loop import tune


def curve(lm: FrozenLM, name: str, share: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Held-out losses of one run, by step and by CPU seconds of the steps so far."""
    task = TASKS[name]()
    train = short(task.splits.train, given.train_rows, given.characters)
    held_out = short(task.splits.validation, given.held_out, given.characters)
    splits = Splits(train, held_out, (), task.splits.source)
    losses: list[tuple[int, float, float]] = []
    seconds, since = 0.0, time.process_time()

    def watch(event: Event) -> None:
        nonlocal seconds, since
        now = time.process_time()
        if isinstance(event, Stepped):
            seconds += now - since
        elif isinstance(event, Validated):
            losses.append((event.step, round(event.nll, 4), round(seconds, 2)))
        since = time.process_time()

    with tempfile.TemporaryDirectory() as out:
        settings = recipe(task, "deep", "muon", "auto", seed, out, given)
        settings = settings.changed([f"prompt.upper_layers={share}"])
        result = tune(settings, lm=lm, splits=splits, on_event=watch, progress=False)
    return {
        "set": name,
        "seed": seed,
        "upper_layers": share,
        "learning_rate": result.learning_rate,
        "best": round(result.nll_after, 4),
        "seconds_a_step": round(seconds / result.steps, 3),
        "losses": losses,
    }


def seconds_to(losses: list[tuple[int, float, float]], level: float) -> float | None:
    """CPU seconds at the first validated step whose loss is at most `level`."""
    return next((seconds for _, nll, seconds in losses if nll <= level), None)


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every set and seed: seconds to three losses on the way of the arm that ends higher."""
    whole = {(run["set"], run["seed"]): run for run in runs if run["upper_layers"] == 1}
    rows = []
    for run in runs:
        if run["upper_layers"] == 1:
            continue
        other = whole[run["set"], run["seed"]]
        first, last = other["losses"][0][1], max(run["best"], other["best"])
        for share in (0.5, 0.8, 1.0):
            level = first - share * (first - last)
            ours, theirs = seconds_to(run["losses"], level), seconds_to(other["losses"], level)
            if ours and theirs:
                rows.append(
                    {
                        **{name: run[name] for name in ("set", "seed", "upper_layers")},
                        "share_of_the_fall": share,
                        "nats": round(level, 4),
                        "seconds_upper": ours,
                        "seconds_all": theirs,
                        "faster": round(theirs / ours, 2),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="bases/smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=["snips", "e2e_nlg"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--upper-layers", type=float, default=0.5, help="share of the layers that learn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validations", type=int, default=12)
    parser.add_argument("--train-rows", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--characters", type=int, default=400, help="longer rows are left out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = FrozenLM.load(given.base, dtype=given.dtype)
    result: dict[str, Any] = {"machine": describe(), "base": Path(given.base).name, "layers": lm.num_layers}
    result |= {
        name: getattr(given, name) for name in ("dtype", "steps", "batch_size", "train_rows", "held_out")
    }
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        for name in given.sets:
            for share in (1.0, given.upper_layers):
                runs.append(curve(lm, name, share, seed, given))
                print({key: value for key, value in runs[-1].items() if key != "losses"}, flush=True)
            result |= {"runs": runs, "compared": compared(runs)}
            if given.out:
                given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["compared"]:
        print(row)


if __name__ == "__main__":
    main()
