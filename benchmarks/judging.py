"""The comparison on real tasks: small slices of banking77, snips, e2e_nlg and gsm8k, written out as csv files.

    python benchmarks/judging.py [--data ../shared/data] [--out runs/judging] [--steps 60] [--rows 60] [TASK...]

Prints each verdict and leaves the figures of all tasks in benchmarks/judging.json. A base as small as the bundled one
scores near zero on gsm8k whatever is done; the task is here for its format.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt.comparison.compare import compare
from softprompt.comparison.settings import CompareSettings
from softprompt.report.render import write_reports
from softprompt.report.verdict import verdict
from softprompt.tuning.recipe import Recipe

HERE = Path(__file__).resolve().parent
Rows = list[dict[str, str]]


def banking77(data: Path) -> tuple[Rows, Rows]:
    """Questions to a bank, 77 intents; their names with blanks, as words."""
    parts = (_csv(data / "banking77" / f"{name}.csv") for name in ("train", "test"))
    train, test = (
        [{"text": one["text"], "label": one["category"].replace("_", " ")} for one in part] for part in parts
    )
    return train, test


def snips(data: Path) -> tuple[Rows, Rows]:
    """Spoken commands, 7 intents; the text lies in pieces."""
    folder = data / "snips"

    def read(path: Path) -> Iterator[dict[str, str]]:
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")  # train_PlayMusic_full.json
        for intent, rows in json.loads(text).items():
            words = "".join(" " + letter.lower() if letter.isupper() else letter for letter in intent).strip()
            for row in rows:
                yield {
                    "text": " ".join("".join(piece["text"] for piece in row["data"]).split()),
                    "label": words,
                }

    train = [row for path in sorted(folder.glob("train_*_full.json")) for row in read(path)]
    test = [row for path in sorted(folder.glob("validate_*.json")) for row in read(path)]
    return train, test


def e2e_nlg(data: Path) -> tuple[Rows, Rows]:
    """A restaurant's facts to a sentence; one reference a row, inputs of the test part never learned from."""
    train, test = (_csv(data / "e2e_nlg" / name) for name in ("devset.csv", "testset_w_refs.csv"))
    return (
        [{"text": one["mr"], "label": one["ref"]} for one in train],
        [{"text": one["mr"], "label": one["ref"]} for one in test],
    )


def gsm8k(data: Path) -> tuple[Rows, Rows]:
    """Word problems; the worked answer ends in "#### number"."""

    def read(name: str) -> Rows:
        lines = (data / "gsm8k" / name).read_text("utf-8").splitlines()
        return [{"text": one["question"], "label": one["answer"]} for one in map(json.loads, lines)]

    return read("train.jsonl"), read("test.jsonl")


# What is read, how a row becomes text, and what judges. The slot stands right before the answer where it is a label.
TASKS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "banking77": (banking77, "Question: {text} Topic:{soft:20} {label}", ("accuracy", "macro_f1", "nll")),
    "snips": (snips, "Command: {text} Kind:{soft:20} {label}", ("accuracy", "macro_f1", "nll")),
    "e2e_nlg": (
        e2e_nlg,
        "{soft:20}{text} Sentence: {label}",
        ("bleu", "chrf", "rouge_l", "nll", "bits_per_byte"),
    ),
    "gsm8k": (gsm8k, "{soft:20}Question: {text} Answer: {label}", ("numeric_match", "nll", "bits_per_byte")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs/judging"))
    parser.add_argument("--arms", default="base,few-shot,soft")
    parser.add_argument("--base", default="builtin")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    kept = HERE / "judging.json"
    results = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    for task in asked.tasks:
        read, template, metrics = TASKS[task]
        folder = asked.out / task
        _slices(folder / "data", *read(asked.data), rows=asked.rows)
        recipe = Recipe(
            base=asked.base,
            out=str(folder),
            data={"source": str(folder / "data"), "template": template, "target": "label"},
            prompt={"init": "labels" if "accuracy" in metrics else "vocabulary"},
            tune={
                "max_steps": asked.steps,
                "epochs": 100,
                "batch_size": 8,
                "valid_every_steps": max(1, asked.steps // 3),
            },
        )
        settings = CompareSettings(
            arms=asked.arms.split(","), metrics=list(metrics), seeds=asked.seeds, shots=3
        )
        comparison = compare(recipe, settings, folder)
        write_reports([folder], folder)
        print(f"{task}: {verdict(comparison)}", flush=True)
        record = comparison.to_record()
        results[task] = {
            "verdict": verdict(comparison),
            "arms": {name: arm["metrics"] for name, arm in record["summary"]["arms"].items()},
            **{key: record[key] for key in ("failed", "made", "base", "machine", "versions")},
            "rows": record["data"]["rows"],
            "steps": asked.steps,
        }
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _slices(folder: Path, train: Rows, test: Rows, rows: int) -> None:
    """Rows drawn by a fixed seed, so that sorted files give every label a chance."""
    rng = random.Random(0)
    rng.shuffle(train)
    rng.shuffle(test)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("train", train[: rows * 10]),
        ("validation", train[rows * 10 :][: rows // 2]),
        ("test", test[:rows]),
    ):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
