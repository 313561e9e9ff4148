"""How near compaction alone comes to a long text, and what decides that: positions, rounds, queries, ridge.

    python benchmarks/compaction.py --base bases/smollm2 --data ../shared/data --kind few-shot --out benchmarks/compaction_smollm2.json

KL of the teacher's probabilities from those under the short prefix at every token of the teacher's answers to held-out questions,
in nats a token; `first` is that of the first token of each answer alone. CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import machine
from distil import KINDS
from softprompt import DistilSettings, FrozenLM
from softprompt.data.batch import collate
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.compaction import compact
from softprompt.tuning.distil_source import read_source
from softprompt.tuning.lessons import Lesson, lessons_of
from softprompt.tuning.teacher import Teacher, Teachers, teacher_of

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "keys as they are": {"rounds": 0},
    "one round": {"rounds": 1},
    "16 positions": {"length": 16},
    "64 positions": {"length": 64},
    "16 texts": {"texts": 16},
    "questions alone": {"answers": False},
    "ridge 0.1": {"ridge": 0.1},
    "ridge 1e-5": {"ridge": 1e-5},
}


def divergence(teacher: Teacher, lessons: list[Lesson], fast: FastLoss, plain: Plain) -> tuple[float, float]:
    """Mean KL at every token of the answers, and at the first of each."""
    loss = DivergenceLoss(fast, {n: lesson.targets for n, lesson in enumerate(lessons)})
    rows = [teacher.student_row(lesson.question, lesson.answer.ids, n) for n, lesson in enumerate(lessons)]
    with torch.inference_mode():
        found_N = torch.cat(
            [loss(collate(rows[first : first + 8]), plain) for first in range(0, len(rows), 8)]
        )
    firsts = [own_S[0] for own_S in torch.split(found_N, [row.trained_tokens for row in rows])]
    return float(found_N.mean()), float(torch.stack(firsts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kind", default="few-shot", choices=list(KINDS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--judged", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="What else the machine did, for the record.")
    arguments = parser.parse_args()
    lm = FrozenLM.load(arguments.base, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        settings = DistilSettings(base=arguments.base, **KINDS[arguments.kind](arguments.data, Path(folder)))
        source = read_source(settings, lm, lambda event: None)
        teacher = teacher_of(lm, source.contexts[0], source.layout)
        taught = lessons_of(Teachers((teacher,)), source.splits.train[: arguments.texts], settings)
        judged = lessons_of(
            Teachers((teacher,)), source.splits.validation[: arguments.judged], settings, likeliest=True
        )
    fast, results = FastLoss(lm), dict[str, Any]()
    for name in arguments.variants:
        options = {"length": 32, "texts": arguments.texts, "answers": True} | VARIANTS[name]
        length, texts, answers = (options.pop(key) for key in ("length", "texts", "answers"))
        rows = [
            [
                *teacher.compiled.marks(lm, teacher.example(lesson.question))[teacher.context_positions :],
                *(lesson.answer.ids if answers else ()),
            ]
            for lesson in taught[:texts]
        ]
        began = time.process_time()
        compacted = compact(lm, teacher.compiled.state, rows, length, **options)
        seconds = time.process_time() - began
        kl, first = divergence(teacher, judged, fast, compacted.plain)
        results[name] = {"kl": kl, "first": first, "cpu_seconds": seconds}
        print(name, json.dumps(results[name]), flush=True)
    record = {
        **machine.describe(),
        "note": arguments.note,
        "base": Path(arguments.base).name,
        "kind": arguments.kind,
        "context_positions": teacher.context_positions,
        "texts": len(taught),
        "judged": len(judged),
        "variants": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
