"""The learning rate against the loss: what one step promises and keeps, and what short runs reach at shares of the bound.

    python benchmarks/rate.py --base builtin --sets snips e2e_nlg --kinds soft deep --steps 40 --out benchmarks/rate.json

`bound` is the share of the embeddings' (or keys' and values') scale that an automatic rate never exceeds. `slope` is the
first-order fall of the first batch's loss, in nats for a unit of rate along the optimiser's own step; `bound` times
`slope` is what a step at the bound promises. Losses are of validation rows held out of the training part; test rows
are not read. Each line of --out is one base, set, kind and optimiser.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_vs_peft import TASKS, Task
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import epoch_order
from softprompt.data.example import Example, Splits
from softprompt.loss.gradient import Gradients
from softprompt.tuning.learner import Learner
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.rate import measured_rate
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start

ROWS, MOST_CHARACTERS, MOST_POSITIONS = 400, 900, 160


def short(rows: Sequence[Example], count: int) -> tuple[Example, ...]:
    """The first `count` rows that are not long."""
    return tuple(row for row in rows if sum(map(len, row.fields.values())) < MOST_CHARACTERS)[:count]


def recipe(
    task: Task, kind: str, optimizer: str, steps: int, rate: float | str, seed: int, out: str
) -> Recipe:
    """A short run at a given rate."""
    data: dict[str, Any] = {
        "source": "x",
        "template": task.template,
        "max_length": MOST_POSITIONS,
        "on_overflow": "truncate",
    }
    if task.target:
        data["target"] = task.target
    tuning = {"max_steps": steps, "epochs": 50, "optimizer": optimizer, "seed": seed, "learning_rate": rate}
    return Recipe(base="x", out=out, data=data, prompt={"kind": kind, "length": 20}, tune=tuning)  # type: ignore[arg-type]


def first_step(plan: Plan) -> dict[str, float]:
    """The first batch's loss, and its slope along the optimiser's step."""
    tune_ = plan.recipe.tune
    learner = Learner(start(plan), tune_, 1.0, plan.steps)
    order = epoch_order(plan.train.lengths, plan.batch_size, seed=tune_.seed, epoch=0)
    rows = [plan.train.encoded[index] for index in order[0]]
    (nll,) = Gradients(plan.loss, plan.batch_size)([learner.form], [rows])
    return {"first_nll": nll, "slope": learner.promised_fall()}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", default="builtin")
    asked.add_argument("--dtype", default="float32")
    asked.add_argument("--sets", nargs="+", choices=list(TASKS), default=["snips"])
    asked.add_argument("--kinds", nargs="+", default=["soft", "deep"])
    asked.add_argument("--optimizers", nargs="+", default=["muon"])
    asked.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3, 1.0, 3.0])
    asked.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked.add_argument("--steps", type=int, default=40)
    asked.add_argument("--held-out", type=int, default=48)
    asked.add_argument("--out", type=Path)
    given = asked.parse_args()
    lm = FrozenLM.load(given.base, dtype=given.dtype)
    for name in given.sets:
        task = TASKS[name]()
        splits = Splits(
            short(task.splits.train, ROWS),
            short(task.splits.validation, given.held_out),
            (),
            task.splits.source,
        )
        for kind, optimizer in ((kind, optimizer) for kind in given.kinds for optimizer in given.optimizers):
            with tempfile.TemporaryDirectory() as out:
                common = (task, kind, optimizer, given.steps)
                plan = make_plan(recipe(*common, "auto", 0, out), lm=lm, splits=splits)
                record: dict[str, Any] = {
                    "base": given.base,
                    "set": name,
                    "kind": kind,
                    "optimizer": optimizer,
                }
                record |= {"steps": given.steps, "bound": plan.learning_rate, **first_step(plan)}
                record["auto"] = measured_rate(plan, Gradients(plan.loss, plan.batch_size), start(plan))
                record["runs"] = [
                    {
                        "share": share,
                        "seed": seed,
                        "validation_nll": tune(
                            recipe(*common, plan.learning_rate * share, seed, f"{out}/{share}-{seed}"),
                            lm=lm,
                            splits=splits,
                            loss=plan.loss,
                        ).nll_after,
                    }
                    for share in given.shares
                    for seed in given.seeds
                ]
            line = json.dumps(record)
            print(line, flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
