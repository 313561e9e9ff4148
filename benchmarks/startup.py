"""How long until something happens: `softprompt --help`, `import softprompt`, the base loaded, the first step learned.

    python benchmarks/startup.py --rounds 5

Each is a process of its own; clock seconds, from its start to its end.
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
from pathlib import Path

from machine import describe

STEP = (
    "from softprompt.tuning.loop import tune; from softprompt.tuning.recipe import Recipe; import sys;"
    "tune(Recipe(out=sys.argv[1], data={'source': 'builtin:roles', 'column': 'prompt', 'limit': 8, 'validation': 0},"
    "tune={'max_steps': 1}))"
)
CASES = {
    "python -c pass": ["-c", "pass"],
    "import softprompt": ["-c", "import softprompt"],
    "softprompt --help": ["-m", "softprompt", "--help"],
    "import torch, transformers": ["-c", "import torch, transformers"],
    "load the bundled base": [
        "-c",
        "from softprompt.base.frozen_lm import FrozenLM; FrozenLM.load('builtin')",
    ],
    "load it and learn one step": ["-c", STEP],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(options.rounds):
        for name, arguments in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments, folder]
                    if name.endswith("step")
                    else [sys.executable, *arguments],
                    check=True,
                    capture_output=True,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
                found[name].append(time.perf_counter() - began)
    seconds = {
        name: {"median": statistics.median(one), "least": min(one), "most": max(one), "n": len(one)}
        for name, one in found.items()
    }
    for name, one in seconds.items():
        print(f"{name}: {one['median']:.2f} s ({one['least']:.2f} to {one['most']:.2f})")
    result = {**describe(), "note": options.note, "seconds": seconds}
    (Path(__file__).parent / "startup.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
