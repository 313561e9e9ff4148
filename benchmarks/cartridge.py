"""Rows a second of a distillation against PEFT's cartridge example, in one run on the same rows and base.

    python benchmarks/cartridge.py --base bases/smollm2 --data ../shared/data --out benchmarks/cartridge_smollm2.json

PEFT's side does what examples/cartridge_self_study/train_distill.py of huggingface/peft does at every step, over the same
CartridgeConfig: the teacher reads context and row again, the student reads the row behind the cartridge, both compute the
logits of all positions, and the loss is the cross-entropy over the teacher's 20 likeliest tokens; AdamW, and the example's
default of one row a step, or `--rows`. Our side takes steps of 8 rows with the teacher's targets stored before; their
seconds are given beside. Rounds of both alternate. CPU seconds of the process, so that other work on the machine counts little.
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
from peft import CartridgeConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import machine
from distil import few_shot
from softprompt import DistilSettings, FrozenLM
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients
from softprompt.prompt.reparam import Direct
from softprompt.tuning.distil_source import read_source
from softprompt.tuning.learner import Learner
from softprompt.tuning.lessons import Lesson, lessons_of
from softprompt.tuning.recipe import TuneSettings
from softprompt.tuning.teacher import Teachers, teacher_of

TOP_K, OUR_ROWS = 20, 8


class Cartridge:
    """PEFT's cartridge with a teacher that reads the context at every step."""

    def __init__(self, base: str, length: int, context: list[int], rows: list[list[int]]) -> None:
        self.teacher: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        student: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, num_frozen_tokens=1)
        self.student: Any = get_peft_model(student, config)
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-3)
        self.context, self.rows = context, rows

    def step(self, numbers: list[int]) -> None:
        """One optimiser step on these rows."""
        longest = max(len(self.rows[n]) for n in numbers)
        padded = [self.rows[n] + [0] * (longest - len(self.rows[n])) for n in numbers]
        mask_BS = torch.tensor(
            [[1] * len(self.rows[n]) + [0] * (longest - len(self.rows[n])) for n in numbers]
        )
        first = len(self.context)
        behind_BT = torch.tensor([self.context + row for row in padded])
        mask_BT = torch.cat([torch.ones(len(numbers), first, dtype=torch.long), mask_BS], 1)
        with torch.no_grad():
            wanted_BSV = self.teacher(input_ids=behind_BT, attention_mask=mask_BT, use_cache=False).logits[
                :, first:
            ]
        own_BSV = self.student(
            input_ids=torch.tensor(padded), attention_mask=mask_BS, use_cache=False
        ).logits[:, -longest:]
        losses = []
        for b, n in enumerate(numbers):
            read = len(self.rows[n]) - 1
            wanted_SV = log_softmax(wanted_BSV[b, :read].float(), -1)
            likely = wanted_SV.topk(TOP_K, -1)
            own_Sk = log_softmax(own_BSV[b, :read].float(), -1).gather(-1, likely.indices)
            losses.append(-(likely.values.exp() * own_Sk).sum(-1).mean())
        torch.stack(losses).mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def lessons(base: str, data: Path, lm: FrozenLM, count: int) -> tuple[Teachers, list[Lesson], float]:
    """The teacher of a few-shot block, and some of its lessons, with the CPU seconds that answers and targets took."""
    with tempfile.TemporaryDirectory() as folder:
        tree = few_shot(data, Path(folder))
        tree["data"] |= {"limit": count + 40, "validation": 4, "test": 0}
        settings = DistilSettings(base=base, **tree)
        source = read_source(settings, lm, lambda event: None)
        began = time.process_time()
        teacher = Teachers((teacher_of(lm, source.contexts[0], source.layout),))
        taught = lessons_of(teacher, source.splits.train[:count], settings)
        return teacher, taught, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="Rows a step of PEFT's example.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="What else the machine did, for the record.")
    arguments = parser.parse_args()
    lm = FrozenLM.load(arguments.base, dtype="bfloat16")
    teacher, taught, teacher_seconds = lessons(arguments.base, arguments.data, lm, 2 * OUR_ROWS)
    encoded = [
        teacher.parts[0].student_row(each.question, each.answer.ids, n) for n, each in enumerate(taught)
    ]
    context = [mark for mark in teacher.parts[0].compiled.state.marks if mark >= 0]
    peft = Cartridge(arguments.base, arguments.length, context, [row.ids for row in encoded])

    state = teacher.parts[0].compiled.state.first(arguments.length)
    start = tuple(
        torch.stack([layer.transpose(0, 1) for layer in layers]).float()
        for layers in (state.keys, state.values)
    )
    loss = DivergenceLoss(FastLoss(lm), {n: each.targets for n, each in enumerate(taught)})
    learner = Learner(Direct(start), TuneSettings(), 1e-3, 100)
    gradients = Gradients(loss, OUR_ROWS)

    def ours() -> float:
        began = time.process_time()
        (nll,) = gradients([learner.form], [encoded[:OUR_ROWS]])
        learner.step(nll)
        return OUR_ROWS / (time.process_time() - began)

    def theirs(rows: int) -> float:
        steps = max(1, 2 // rows)
        began = time.process_time()
        for step in range(steps):
            peft.step([(step * rows + n) % len(encoded) for n in range(rows)])
        return steps * rows / (time.process_time() - began)

    ours()  # builds the fast body
    theirs(1)
    speeds: dict[str, list[float]] = {"softprompt": [], **{f"peft, {n} a step": [] for n in arguments.rows}}
    for _ in range(arguments.rounds):
        speeds["softprompt"].append(ours())
        for rows in arguments.rows:
            speeds[f"peft, {rows} a step"].append(theirs(rows))
        print(json.dumps({name: f"{figures[-1]:.2f}" for name, figures in speeds.items()}), flush=True)
    own = statistics.median(speeds["softprompt"])
    record = {
        **machine.describe(),
        "note": arguments.note,
        "base": Path(arguments.base).name,
        "context_positions": teacher.context_positions,
        "virtual_tokens": arguments.length,
        "mean_row_positions": statistics.mean(map(len, encoded)),
        "teacher_cpu_seconds_a_row_once": teacher_seconds / len(taught),
        "rows_a_cpu_second": speeds,
        "times_peft": {
            name: own / statistics.median(figures) for name, figures in speeds.items() if name != "softprompt"
        },
    }
    print(json.dumps(record))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
