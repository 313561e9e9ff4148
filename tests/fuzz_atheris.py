"""Coverage-guided fuzzing of the readers: `python tests/fuzz_atheris.py "rows in csv" --seconds 60`, or all of them in turn.

Needs atheris (pip install 'softprompt[fuzz]'; Linux). Inputs that fail are kept as crash-... beside the working folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["softprompt"]):
    from readers import READERS, refused_or_read, seeds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    options = parser.parse_args()
    names = options.readers or list(READERS)
    if len(names) > 1:  # libFuzzer ends its process: one for each reader
        codes = [
            subprocess.run(
                [sys.executable, __file__, name, "--seconds", str(options.seconds)], check=False
            ).returncode
            for name in names
        ]
        return max(map(abs, codes))
    (name,) = names
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(seeds()[name]):
            (Path(corpus) / str(number)).write_bytes(content)
        print(f"== {name}", flush=True)
        atheris.Setup(
            [
                sys.argv[0],
                corpus,
                f"-max_total_time={options.seconds}",
                "-max_len=65536",
                "-timeout=20",
                "-verbosity=0",
            ],
            lambda content: refused_or_read(name, content) and None,
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
