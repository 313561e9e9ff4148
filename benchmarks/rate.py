"""The automatic learning rate against a sweep around it, and against PEFT's ways at fixed rates, on bases of unlike shape.

    python benchmarks/rate.py --base builtin --seeds 0 1 2 --out benchmarks/rate.jsonl
    python benchmarks/rate.py --base ../shared/data/weights/TinyStories-656K --seeds 0 1 2 --out benchmarks/rate.jsonl
    python benchmarks/rate.py --table --out benchmarks/rate.jsonl --page docs/learning-measured.md

Each line of --out is one run, and a run that is there already is not repeated. `auto` is softprompt's default; `share` is
the lowest rate that it measures before the first step times a number, the same for all steps, with all else as by default. `peft` is PEFT's own start (prompt tuning with random vectors,
or prefix tuning), moved by AdamW at a fixed rate with linear decay and without a guard, as its notebooks do; the function and
so the gradient are those of PEFT's model, and are computed here by softprompt's faster loss. A run's figure is the loss of its
best validated step on rows held out of the training part. Test rows are not read, since the rule was chosen by these runs.

--table reads the file and rewrites the table between its two marks in --page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from page_table import put_table
from quality_vs_peft import TASKS, Task, plain
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Splits
from softprompt.loss.gradient import Loss
from softprompt.progress.events import Event, Note, Started, Stepped, Validated
from softprompt.prompt.reparam import Direct
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe

LENGTH, TRAIN_ROWS, MOST_POSITIONS = 20, 2000, 160
SETS = ("snips", "banking77", "e2e_nlg", "messages")
SAME = ("base", "set", "kind", "optimizer", "arm", "setting", "seed", "steps")  # what makes two runs the same
WITHIN = 1.05  # of the best of the sweep


def short(rows: Sequence[Example], count: int, characters: int) -> tuple[Example, ...]:
    """The first `count` rows that are not long."""
    return tuple(row for row in rows if sum(map(len, row.fields.values())) < characters)[:count]


def recipe(
    task: Task, kind: str, optimizer: str, rate: float | str, seed: int, out: str, given: Any
) -> Recipe:
    """One run's settings."""
    data: dict[str, Any] = {
        "source": "x",
        "validation": "own",
        "template": task.template,
        "target": task.target,
    }
    data |= {"max_length": MOST_POSITIONS, "on_overflow": "truncate"}
    tuning: dict[str, Any] = {"max_steps": given.steps, "epochs": 100, "optimizer": optimizer, "seed": seed}
    tuning |= {
        "learning_rate": rate,
        "batch_size": given.batch_size,
        "valid_every_steps": max(1, given.steps // given.validations),
    }
    # A rate that is given would start a soft prompt from smaller vectors than the automatic one that it is a share of.
    prompt: Any = {"kind": kind, "length": LENGTH} | ({"init": "scaled"} if kind == "soft" else {})
    return Recipe(base="x", out=out, data=data, prompt=prompt, tune=tuning)  # type: ignore[arg-type]


def peft_start(lm: FrozenLM, kind: str, seed: int) -> Any:
    """PEFT's own start: N(0, 1) vectors in front, or N(0, 1) keys and values."""
    torch.manual_seed(seed)
    config = peft.PromptTuningConfig if kind == "soft" else peft.PrefixTuningConfig
    model = peft.get_peft_model(lm.model, config(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    prompt = plain(model, kind == "deep")
    return Direct((prompt,) if kind == "soft" else prompt)


def learned(lm: FrozenLM, splits: Splits, settings: Recipe, loss: Loss | None, form: Any) -> dict[str, Any]:
    """What a run came to."""
    curve: list[tuple[int, float]] = []
    training: list[float] = []
    rates: list[float] = []
    measured: list[float] = []
    notes: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            measured.append(event.learning_rate)
        elif isinstance(event, Validated):
            curve.append((event.step, round(event.nll, 4)))
        elif isinstance(event, Stepped):
            training.append(round(event.nll, 4))
            rates.append(event.learning_rate)
        elif isinstance(event, Note) and "lowered" in event.text:
            notes.append(event.text)

    began = time.process_time()
    result = tune(settings, lm=lm, splits=splits, loss=loss, form=form, on_event=watch, progress=False)
    return {
        "measured": measured[0],  # before the first step
        "highest_rate_taken": max(rates),
        "validation_nll": round(result.nll_after, 5),
        "best_step": result.best_step,
        "start_nll": curve[0][1],
        "highest_training_nll": max(training),
        "lowered": notes,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def wanted(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run, seed by seed, so that whatever there is time for is a whole grid."""
    for seed in given.seeds:
        for name in given.sets:
            for kind in given.kinds:
                for optimizer in given.optimizers:
                    run = {
                        "set": name,
                        "kind": kind,
                        "optimizer": optimizer,
                        "seed": seed,
                        "steps": given.steps,
                    }
                    yield {**run, "arm": "auto", "setting": 1.0}
                    for share in given.shares:
                        yield {**run, "arm": "share", "setting": share}
                for rate in given.peft_rates:
                    yield {
                        "set": name,
                        "kind": kind,
                        "optimizer": "adamw",
                        "seed": seed,
                        "steps": given.steps,
                        "arm": "peft",
                        "setting": rate,
                    }


def run_all(given: argparse.Namespace) -> None:
    """Runs what --out does not hold yet and appends a line for each run."""
    done = {key(run) for run in read(given.out)}
    lm = FrozenLM.load(given.base, dtype=given.dtype)
    base = given.name or Path(given.base).name
    splits_of: dict[str, tuple[Task, Splits]] = {}
    auto = {}
    for run in read(given.out):
        if run["arm"] == "auto":
            auto[key({**run, "setting": 0})] = run["measured"]
    for run in wanted(given):
        run["base"] = base
        if key(run) in done:
            continue
        if run["set"] not in splits_of:
            task = TASKS[run["set"]]()
            train = short(task.splits.train, TRAIN_ROWS, given.characters)
            held_out = short(task.splits.validation, given.held_out, given.characters)
            splits_of[run["set"]] = task, Splits(train, held_out, (), task.splits.source)
        task, splits = splits_of[run["set"]]
        with tempfile.TemporaryDirectory() as out:
            rate: float | str = "auto"
            if run["arm"] == "share":
                rate = run["setting"] * auto[key({**run, "arm": "auto", "setting": 0})]
            elif run["arm"] == "peft":
                rate = run["setting"]
            settings = recipe(task, run["kind"], run["optimizer"], rate, run["seed"], out, given)
            form = None
            if run["arm"] == "peft":
                settings = settings.changed(["tune.warmup=0", "tune.weight_decay=0"])
                form = peft_start(lm, run["kind"], run["seed"])
            try:
                record = learned(lm, splits, settings, None, form)
            except Exception as error:
                record = {"validation_nll": None, "error": f"{type(error).__name__}: {error}"[:200]}
            if run["arm"] == "auto" and "error" in record:
                raise SystemExit(f"{base}, {run['set']}, {run['kind']}: {record['error']}")
            if run["arm"] == "auto":
                auto[key({**run, "setting": 0})] = record["measured"]
        record = {
            **{name: run[name] for name in SAME},
            "rows_a_step": given.batch_size,
            "held_out": len(splits.validation),
            "device": lm.device.type,
            **record,
        }
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            *(record[name] for name in SAME), record["validation_nll"], record.get("cpu_seconds"), flush=True
        )


def read(path: Path) -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(run[name] for name in SAME)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as a table of Markdown, and what misses the two bars."""
    cells: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for run in runs:
        row = tuple(run[name] for name in ("base", "set", "kind", "steps", "rows_a_step"))
        column = {"auto": "auto", "share": f"{run['setting']:g} x", "peft": f"PEFT {run['setting']:g}"}[
            run["arm"]
        ]
        nll = math.inf if run["validation_nll"] is None else run["validation_nll"]
        cells.setdefault(row, {}).setdefault(column, {})[run["seed"]] = nll
    columns = sorted(
        {column for row in cells.values() for column in row if column != "auto"},
        key=lambda column: (column.startswith("PEFT"), float(column.replace("PEFT ", "").replace(" x", ""))),
    )
    lines = [
        f"| base | set | kind | steps x rows | seeds | default | {' | '.join(columns)} | |",
        "|---" * (len(columns) + 7) + "|",
    ]
    misses: list[str] = []
    for (base, name, kind, steps, rows), row in cells.items():
        if "auto" not in row:
            continue
        # Paired: a column counts by the seeds that the default was run with too, all of them.
        seeds = sorted(row["auto"])
        mean = means(row, seeds)
        swept = {column: nll for column, nll in mean.items() if column.endswith(" x")}
        theirs = {column: nll for column, nll in mean.items() if column.startswith("PEFT")}
        marks = []
        if swept and mean["auto"] > WITHIN * min(swept.values()):
            best = min(swept, key=lambda column: swept[column])
            marks.append(f"{mean['auto'] / swept[best] - 1:.0%} above {best}")
        marks += [f"above {column}" for column, nll in theirs.items() if mean["auto"] > nll]
        misses += [f"{base}, {name}, {kind}: {mark}" for mark in marks]
        figures = [f"{mean[column]:.3f}" if column in mean else "" for column in columns]
        lines.append(
            f"| {base} | {name} | {kind} | {steps} x {rows} | {len(seeds)} | **{mean['auto']:.3f}** | "
            f"{' | '.join(figures)} | {'; '.join(marks)} |"
        )
    judged = len(lines) - 2
    summary = f"{judged} cells. " + (f"Misses: {'; '.join(misses)}." if misses else "No misses.")
    return "\n".join([*lines, "", summary])


def means(row: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> dict[str, float]:
    """The mean over `seeds` of every column that has them all."""
    return {
        column: statistics.fmean(by_seed[seed] for seed in seeds)
        for column, by_seed in row.items()
        if set(seeds) <= set(by_seed)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--name", help="the base's name in the file; without it the folder's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=list(SETS))
    parser.add_argument("--kinds", nargs="+", default=["soft", "deep"])
    parser.add_argument("--optimizers", nargs="+", default=["muon"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.3, 1.0, 3.0])
    parser.add_argument("--peft-rates", nargs="*", type=float, default=[0.005, 0.03, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validations", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--characters", type=int, default=400, help="longer rows are left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rate.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing; write the table of --out")
    parser.add_argument("--page", type=Path, default=Path("docs/learning-measured.md"))
    given = parser.parse_args()
    if given.table:
        put_table(given.page, "rate", table(read(given.out)))
    else:
        run_all(given)


if __name__ == "__main__":
    main()
