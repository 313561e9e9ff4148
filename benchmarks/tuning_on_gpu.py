"""Steps a second on a GPU in bfloat16: PEFT with Trainer against softprompt, in one process and in turns; memory; eight prompts
side by side; and the two roads through a head.

    python benchmarks/tuning_on_gpu.py --work WORK --out benchmarks/tuning_on_gpu.json

Bases have random weights of real shapes: SmolLM2's (135 M, text and label tasks) and bloomz-560m's (the tutorial's task). Rows,
rate and optimiser are those of tuning_vs_peft.py. `seconds_a_step` is the mean over a run; softprompt's includes the
recording of its CUDA graphs, so a run of five times as many steps is given too. Peaks are what torch allocates from before a
run to its end, plus the base's weights where they lay there already.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from machine import demand_device, describe, seconds
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import Head, dense
from softprompt.loss.kernels.cut_head import cut_head
from softprompt.progress.events import Event, Stepped
from softprompt.tuning.together import tune_together
from step_overhead import recipes
from tuning_vs_peft import base_folder, run_peft, run_softprompt

CASES = (  # name, shape, task, words of a row, virtual tokens
    ("SmolLM2's shape, label", "smollm2-shape", "label", 45, 20),
    ("SmolLM2's shape, text", "smollm2-shape", "text", 45, 20),
    ("bloomz-560m's shape, text", "bloomz-560m", "text", 0, 4),
)
ROWS, EPOCHS, LONG = 152, 3, 15  # 57 steps of 8 rows; five times as many
FIRST, LAST = 30, 70  # steps between which prompts side by side are timed


def options(given: argparse.Namespace, base: str, task: str, words: int, length: int, **more: Any) -> Any:
    settings: dict[str, Any] = {"base": base, "device": given.device, "rows": given.rows, "batch_size": 8}
    settings |= {"length": length, "rate": 0.005, "epochs": EPOCHS, "task": task, "words": words}
    return argparse.Namespace(**{**settings, "curves": False, "arm": "softprompt-bf16", **more})


def run(given: argparse.Namespace, arm: str, lm: FrozenLM, folder: str, settings: Any) -> dict[str, float]:
    """One run of an arm: seconds a step and in all, and the peak of memory."""
    gc.collect()
    before, weights = 0, 0
    if given.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    if arm == "peft":
        result = run_peft(settings, folder, "bfloat16")
    else:
        weights = sum(weight.nbytes for weight in lm.model.parameters())
        result = run_softprompt(settings, folder, lm)
    steps = settings.rows // settings.batch_size
    figures = {"seconds_a_step": result["epoch_seconds"] / steps, "seconds": result["whole_run_seconds"]}
    if given.device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before + weights
    return figures


def case(given: argparse.Namespace, lm: FrozenLM, folder: str, settings: Any) -> dict[str, Any]:
    """One base and task: every round runs PEFT and softprompt, in turns, after a few steps of each that do not count."""
    runs: dict[str, list[dict[str, float]]] = {"peft": [], "softprompt": []}
    for arm in runs:
        run(given, arm, lm, folder, argparse.Namespace(**{**vars(settings), "rows": 16, "epochs": 1}))
    for turn in range(given.rounds):
        for arm in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            runs[arm].append(run(given, arm, lm, folder, settings))
            print(settings.base, settings.task, arm, runs[arm][-1], flush=True)
    pairs = list(zip(runs["peft"], runs["softprompt"], strict=True))
    figures: dict[str, Any] = {"runs": runs}
    figures["times_faster"] = [
        round(theirs["seconds_a_step"] / ours["seconds_a_step"], 2) for theirs, ours in pairs
    ]
    if given.device == "cuda":
        figures["share_of_memory"] = [
            round(ours["peak_bytes"] / theirs["peak_bytes"], 3) for theirs, ours in pairs
        ]
    if settings.task == "label":
        longer = run(
            given, "softprompt", lm, folder, argparse.Namespace(**{**vars(settings), "epochs": LONG})
        )
        theirs = statistics.median(each["seconds_a_step"] for each in runs["peft"])
        figures["five_times_the_steps"] = {
            **longer,
            "times_faster": round(theirs / longer["seconds_a_step"], 2),
        }
        print(figures["five_times_the_steps"], flush=True)
    return figures


def side_by_side(lm: FrozenLM, prompts: int = 8, rows: int = 8) -> dict[str, Any]:
    """Rows a second of one prompt, of several side by side, and of one with as many rows a step as all of these together.

    Taken from the end of step FIRST to that of step LAST, so that no recording of graphs and no validation counts."""
    rates = {}
    for road, count, batch in (
        ("one prompt", 1, rows),
        ("one prompt, as many rows", 1, prompts * rows),
        ("prompts side by side", prompts, rows),
    ):
        ends: dict[int, float] = {}

        def note(run: int, event: Event, ends: dict[int, float] = ends) -> None:
            if isinstance(event, Stepped):
                ends[event.step] = time.perf_counter()

        with tempfile.TemporaryDirectory() as out:
            tune_together(recipes(count, batch, LAST, out), lm=lm, on_event=note, progress=False)
        rates[road] = count * batch * (LAST - FIRST) / (ends[LAST] - ends[FIRST])
        print(road, rates[road], flush=True)
    side, wide = rates["prompts side by side"], rates["one prompt, as many rows"]
    return {"prompts": prompts, "rows": rows, "rows_a_second": rates, "share_of_one_wide_prompt": side / wide}


def heads(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds and memory of loss and gradient through a head: the plain road, and cut-cross-entropy where it is installed."""
    return [
        head(given, *shape)
        for shape in ((16, 49_152, 576), (1000, 49_152, 576), (1000, 250_880, 1024), (8000, 250_880, 1024))
    ]


def head(given: argparse.Namespace, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """One size of head."""
    drawn = torch.Generator(given.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, device=given.device)

    weight_VD = (normal(vocabulary, width) / width**0.5).bfloat16()
    hidden_ND = normal(tokens, width).bfloat16()
    targets_N = torch.randint(0, vocabulary, (tokens,), generator=drawn, device=given.device)
    head = Head(weight_VD)
    row: dict[str, Any] = {"tokens": tokens, "vocabulary": vocabulary, "width": width}
    cut = cut_head(head)
    roads: dict[str, Any] = {"plain": lambda: dense(hidden_ND, targets_N, head, True)}
    if cut is not None:
        roads["cut"] = lambda: cut.cut(hidden_ND, targets_N, True)
    for name, road in roads.items():
        began = time.perf_counter()
        road()
        if given.device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - began
        times = seconds(road, 5, given.device)
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            road()
            row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        row |= {
            f"{name}_ms": round(1e3 * statistics.median(times), 3),
            f"{name}_first_seconds": round(first, 2),
        }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--shape", help="of the bases, in place of the real ones; for a trial")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    demand_device(parser, given.device)
    given.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**describe(), "rounds": given.rounds, "cases": {}}
    loaded: dict[str, FrozenLM] = {}

    def write() -> None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name, shape, task, words, length in CASES:
        shape = given.shape or shape
        folder = base_folder(shape, given.work)
        if shape not in loaded:
            loaded = {shape: FrozenLM.load(folder, dtype="bfloat16", device=given.device)}
        settings = options(given, shape, task, words, length)
        result["cases"][name] = case(given, loaded[shape], folder, settings)
        if task == "label":
            result["side_by_side"] = side_by_side(loaded[shape])
        write()
    result["heads"] = heads(given)
    write()
    for name, figures in result["cases"].items():
        print(name, {key: value for key, value in figures.items() if key != "runs"})
    print(result["side_by_side"])


if __name__ == "__main__":
    main()
