"""Distillation of three kinds of long text: how near a short prompt comes, what it costs, and what compaction alone gives.

    python benchmarks/distil.py --base bases/smollm2 --data ../shared/data --seeds 3 --out benchmarks/distil_smollm2.json

few-shot    28 labelled SNIPS requests; answers are labels
instruction how to answer a bank's customers, with 18 rules; the questions are Banking77's, without labels
document    an article of the CIA World Factbook; the base writes the questions itself

KL is that of the teacher's probabilities from the student's at every token of its answers to held-out questions, over the
teacher's 20 likeliest tokens (nats a token).
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from softprompt import DistilSettings, FrozenLM, distil

INSTRUCTION = """You answer customers of a bank by chat. Follow all of these rules.

1. Begin with one short sentence that says what you understood the customer to ask.
2. Never ask for a full card number, a PIN or a password. Ask for the last four digits if you must tell cards apart.
3. If a card is lost or stolen, tell the customer to freeze it in the app under Cards, Freeze, before anything else.
4. If a payment is not recognised, ask for its date and amount, and say that the money is held back for ten days.
5. If a transfer is late, say that transfers within the country take one working day and others up to three.
6. If a customer wants to know about a fee, name the fee and the page Fees in the app. Do not defend it.
7. Exchange rates change every minute. Never state one. Point to the page Rates.
8. A new card arrives within five working days. A tracked delivery costs six euros.
9. If an identity check has failed, ask the customer to send the photograph again in daylight and without glasses.
10. Cash machines pay out at most five hundred euros a day. A limit can be raised for a day in the app.
11. If a top-up is pending, ask the customer to wait for an hour, and then to write again.
12. Do not promise refunds. Say that the case is passed on and answered within two working days.
13. If the customer is angry, say sorry once and go on to the next step.
14. Do not speak of other banks.
15. Write at most three sentences in all. Use plain words. No lists, no bold type.
16. If a question is not about the bank, say that you can only help with the account and the cards.
17. If a customer is younger than eighteen, point to the page Young Accounts, where a parent has to sign.
18. End every answer with the words: Anything else I can do?
"""


def snips(data: Path, folder: Path) -> dict[str, Any]:
    rows = []
    for path in sorted((data / "snips").glob("train_*_full.json")):
        ((intent, found),) = json.loads(path.read_text(encoding="latin-1")).items()
        rows += [("".join(part["text"] for part in one["data"]).strip(), intent) for one in found[:100]]
    random.Random(0).shuffle(rows)
    write(folder / "snips.csv", ("text", "intent"), rows[:660])
    return {
        "context": {"shots": 28},
        "data": {
            "source": str(folder / "snips.csv"),
            "target": "intent",
            "template": "Request: {text}\nIntent: {intent}",
            "validation": 40,
            "test": 300,
        },
        "distil": {"length": 32, "answer_tokens": 16, "answers": 1, "temperature": 0.0},
    }


def bank(data: Path, folder: Path) -> dict[str, Any]:
    with (data / "banking77" / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(texts)
    write(folder / "bank.csv", ("text",), [(text,) for text in texts[:200]])
    (folder / "rules.txt").write_text(INSTRUCTION, encoding="utf-8")
    return {
        "context": {"instruction": str(folder / "rules.txt")},
        "data": {"source": str(folder / "bank.csv"), "column": "text", "validation": 24, "test": 40},
        "distil": {"length": 32, "answer_tokens": 48, "answers": 1},
    }


def factbook(data: Path, folder: Path) -> dict[str, Any]:
    with lzma.open(data / "pretrain" / "usgov_pd" / "factbook.jsonl.xz", "rt", encoding="utf-8") as file:
        articles = [json.loads(line).get("text", "") for _, line in zip(range(400), file, strict=False)]
    text = max(articles, key=lambda article: min(len(article), 3_000))[:3_000]
    (folder / "article.txt").write_text(text, encoding="utf-8")
    return {
        "context": {"document": str(folder / "article.txt")},
        "data": {"written": 120},
        "distil": {"length": 32, "answer_tokens": 48, "answers": 1},
    }


KINDS = {"few-shot": snips, "instruction": bank, "document": factbook}


def write(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--work", type=Path, help="A folder for the runs; one that was killed goes on from there."
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="What else the machine did, for the record.")
    arguments = parser.parse_args()
    lm = FrozenLM.load(arguments.base, dtype=arguments.dtype)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.kinds:
            folder = (arguments.work or Path(temporary)) / kind
            folder.mkdir(parents=True, exist_ok=True)
            tree = KINDS[kind](arguments.data, folder)
            for seed in range(arguments.seeds):
                tune = {"epochs": 100, "max_steps": arguments.steps, "valid_every_steps": 40, "seed": seed}
                settings = DistilSettings(base=arguments.base, out=str(folder / str(seed)), tune=tune, **tree)
                began = time.process_time()
                result = distil(settings, lm=lm, resume=arguments.work is not None)
                record = {
                    "kind": kind,
                    "seed": seed,
                    "cpu_seconds": time.process_time() - began,
                    **result.to_record(),
                }
                del record["path"], record["base"]
                results.append(record)
                print(json.dumps(record), flush=True)
                if arguments.out:
                    told = {
                        "base": Path(arguments.base).name,
                        "dtype": arguments.dtype,
                        "steps": arguments.steps,
                    }
                    whole = {**machine.describe(), "note": arguments.note, **told, "runs": results}
                    arguments.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
