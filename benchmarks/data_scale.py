"""Memory of many short rows: read, encoded and planned up to the first step; learned from; and judged.

    python benchmarks/data_scale.py --rows 200000
    python benchmarks/data_scale.py --rows 100000 1000000 --cases judged learned --base PATH

A process of its own for each case; memory is what the process holds above the same work on few rows, in megabytes.
Cases that were measured before stay in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

PLAN = """
import json, resource, sys, time
import psutil
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan

def held():
    return psutil.Process().memory_info().rss / 2**20

def plan(source, validation):
    data = {"source": source, "target": "label", "template": "{soft:10} {text} Kind: {label}"}
    return make_plan(Recipe(data=data if validation is None else data | {"validation": validation}))

few, many, validation = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plan(few, 0)
before = held()
began = time.process_time()
made = plan(many, validation)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print(json.dumps({
    "held_mb": round(held() - before), "peak_mb": round(peak - before),
    "cpu_seconds": round(time.process_time() - began, 1),
    "rows": len(made.train.encoded), "held_out": len(made.held_out),
    "positions": sum(len(row) for row in made.train.encoded),
}))
"""


JUDGE = """
import json, resource, sys, time
import psutil
from softprompt import JudgeSettings, evaluate

def held():
    return psutil.Process().memory_info().rss / 2**20

few, many, base, out = sys.argv[1:]
about = dict(base=base, template="{text} is {label}", target="label", progress=False)
settings = JudgeSettings(metrics=["nll"], batch_rows=64)
evaluate(None, few, settings=settings, **about)
before = held()
began = time.process_time()

def show(done, rows):
    if done % 6400 == 0 or done == rows:
        print(done, round(time.process_time() - began), round(held() - before), file=sys.stderr, flush=True)

result = evaluate(None, many, settings=settings, out=out, **about | {"progress": show})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
assert sum(1 for row in result.rows if row.nll > 0) == len(result.rows)  # every row can be read again
print(json.dumps({
    "held_mb": round(held() - before), "peak_mb": round(peak - before),
    "cpu_seconds": round(time.process_time() - began, 1),
    "judged": len(result.rows), "reused": result.reused,
    "figures": {name: [figure.value, figure.stderr] for name, figure in result.estimates.items()},
}))
"""

LEARN = """
import json, resource, sys, time
import psutil
from softprompt.tuning.recipe import Recipe
from softprompt import tune

def held():
    return psutil.Process().memory_info().rss / 2**20

def run(source, out, validation):
    data = {"source": source, "target": "label", "template": "{soft:10} {text} is {label}", "validation": validation}
    return tune(Recipe(base=base, data=data, tune={"max_steps": 50}, out=out))

few, many, base, out = sys.argv[1:]
run(few, out + "/few", 0)
before = held()
began = time.process_time()
result = run(many, out + "/many", None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print(json.dumps({
    "held_mb": round(held() - before), "peak_mb": round(peak - before),
    "cpu_seconds": round(time.process_time() - began, 1), "steps": 50,
}))
"""

CASES = {
    "held out by default": (PLAN, "null"),
    "nothing held out": (PLAN, "0"),
    "judged": (JUDGE, None),
    "learned": (LEARN, None),
}


def write_rows(path: Path, count: int, short: bool) -> str:
    """Rows that all differ, of two labels."""
    lines = (
        f"parcel {i * 7919 % 1_000_003},{'late' if i % 3 else 'lost'}\n"
        if short
        else f"message number {i} asks where parcel {i * 7919 % 100_003} is,{'delivery' if i % 3 else 'refund'}\n"
        for i in range(count)
    )
    with path.open("w") as file:
        file.write("text,label\n")
        file.writelines(lines)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--base", default="builtin", help="of the cases judged and learned")
    parser.add_argument("--note", default="")
    parser.add_argument("--folder", type=Path, help="keep what is written there: a stopped judgement goes on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for count in options.rows:
            for case in options.cases:
                measure(case, count, folder, options)


def measure(case: str, count: int, folder: Path, options: argparse.Namespace) -> None:
    script, validation = CASES[case]
    short = validation is None
    few = write_rows(folder / f"few{short}.csv", 100 if short else 10, short)
    many = write_rows(folder / f"many{short}-{count}.csv", count, short)
    last = [validation] if validation is not None else [options.base, str(folder / f"{case}-{count}")]
    done = subprocess.run(
        [sys.executable, "-c", script, few, many, *last], check=True, stdout=subprocess.PIPE, text=True
    )
    named = {} if validation is not None else {"base": Path(options.base).name}
    measured = {
        "case": case, "csv_rows": count, **named, **json.loads(done.stdout.splitlines()[-1]),
        "measured": time.strftime("%Y-%m-%d"), "note": options.note,
    }  # fmt: skip
    print(measured, flush=True)
    former = json.loads(options.out.read_text())["cases"] if options.out.exists() else []
    cases = [known for known in former if (known["case"], known["csv_rows"]) != (case, count)]
    record = {"machine": describe(), "cases": [*cases, measured]}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
