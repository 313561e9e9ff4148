"""What a step takes beside the base's passes: rows, batches, prompts, optimiser, records. On a GPU all of this waits for nothing
and is waited for.

    python benchmarks/step_overhead.py --out benchmarks/step_overhead.json
    python benchmarks/step_overhead.py --former ../softprompt-then/src     # another state of the code, in turns with this one

The loss is one that costs nothing; rows, template and optimiser are those of a run on the bundled messages, with the width of
`--base`. Milliseconds a step of one prompt with 8 rows, of one with 64, and of eight with 8 each in `tune_together`: the median
of the rounds, CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from machine import describe
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Batch
from softprompt.progress.events import Event, Stepped
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.together import tune_together

CASES = {"one prompt, 8 rows": (1, 8), "one prompt, 64 rows": (1, 64), "eight prompts, 8 rows each": (8, 8)}
FIRST, LAST = 20, 220  # steps between which it is timed


def recipes(prompts: int, rows: int, steps: int, out: str) -> list[Recipe]:
    """Soft prompts of the bundled messages, each with its own order of rows; nothing is judged on the way."""
    settings = [
        "data.source=builtin:messages",
        "data.template={soft}{text} Kind: {label}",
        "data.target=label",
        "data.validation=0",
        "prompt.length=20",
        f"tune.max_steps={steps}",
        "tune.epochs=1000",
        "tune.valid_every_steps=1000",
        f"tune.batch_size={rows}",
    ]
    return [
        Recipe.from_flags({}, [*settings, f"tune.seed={seed}", f"out={out}/{seed}"])
        for seed in range(prompts)
    ]


def free_loss(batch: Batch, prompt: Plain | None = None) -> Tensor:
    """Three nats a trained token, and a gradient at every number of the prompt."""
    nll_N = torch.full((int(batch.trained_BS[:, 1:].sum()),), 3.0)
    return nll_N if prompt is None else nll_N + sum(tensor.square().mean() for tensor in prompt)


def milliseconds(lm: FrozenLM, prompts: int, rows: int) -> float:
    """CPU milliseconds a step of `prompts` side by side."""
    ends: dict[int, float] = {}

    def note(run: int, event: Event) -> None:
        if isinstance(event, Stepped):
            ends[event.step] = time.process_time()

    with tempfile.TemporaryDirectory() as out:
        tune_together(
            recipes(prompts, rows, LAST + 1, out), lm=lm, loss=free_loss, on_event=note, progress=False
        )
    return 1e3 * (ends[LAST] - ends[FIRST]) / (LAST - FIRST)


def measured(base: str) -> dict[str, float]:
    torch.set_num_threads(1)
    lm = FrozenLM.load(base)
    return {name: milliseconds(lm, prompts, rows) for name, (prompts, rows) in CASES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--former", type=Path, help="the src folder of another state of the code")
    parser.add_argument("--once", action="store_true", help="one round, as JSON alone")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(measured(given.base)))
        return
    here = Path(__file__).resolve()
    sources = {"now": here.parent.parent / "src"} | (
        {"former": given.former.resolve()} if given.former else {}
    )
    rounds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sources}
    for _ in range(given.rounds):
        for name, source in sources.items():
            command = [sys.executable, str(here), "--once", "--base", given.base]
            environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            for case, value in json.loads(done.stdout.splitlines()[-1]).items():
                rounds[name][case].append(value)
    result = {
        **describe(),
        "base": Path(given.base).name,
        "milliseconds_a_step": {
            name: {case: round(statistics.median(values), 3) for case, values in cases.items()}
            for name, cases in rounds.items()
        },
        "rounds": rounds,
    }
    print(json.dumps(result["milliseconds_a_step"], indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
