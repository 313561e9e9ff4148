"""Memory of many short rows: read, encoded and planned on the bundled base, up to the first step.

    python benchmarks/data_scale.py --rows 200000

A process of its own for each case; memory is what the process holds above an empty plan of ten rows, in megabytes.
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


CASES = (("held out by default", None), ("nothing held out", 0))


def write_rows(path: Path, count: int) -> str:
    lines = (
        f"message number {i} asks where parcel {i * 7919 % 100_003} is,{'delivery' if i % 3 else 'refund'}\n"
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
    parser.add_argument("--default-only", action="store_true", help="leave out the case of nothing held out")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        few = write_rows(Path(folder) / "few.csv", 10)
        for count in options.rows:
            many = write_rows(Path(folder) / "many.csv", count)
            for name, validation in CASES[: 1 if options.default_only else 2]:
                done = subprocess.run(
                    [sys.executable, "-c", PLAN, few, many, json.dumps(validation)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                cases.append({"case": name, "csv_rows": count, **json.loads(done.stdout)})
                print(cases[-1], flush=True)
                record = {
                    "machine": describe(),
                    "made": time.strftime("%Y-%m-%d"),
                    "note": options.note,
                    "cases": cases,
                }
                options.out.write_text(json.dumps(record, indent=1) + "\n")  # a long run may be ended early


if __name__ == "__main__":
    main()
