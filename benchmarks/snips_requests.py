"""The rows of the published comparison (docs/report): requests and their intents, from SNIPS' files (CC0).

    python benchmarks/snips_requests.py FOLDER    # of train_*_full.json and validate_*.json; writes two csv files here

SNIPS: github.com/sonos/nlu-benchmark, 2017-06-custom-intent-engines; Coucke et al. 2018. Of each of the seven intents 100
requests to learn from and 30 to judge on, drawn with seed 0.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

LEARNED, JUDGED = 100, 30


def main() -> None:
    folder = Path(sys.argv[1])
    if not any(folder.glob("train_*_full.json")):
        sys.exit(f"{folder}: found no train_*_full.json, wanted the folder of SNIPS' requests.")
    draw = random.Random(0)
    learned = drawn(sorted(folder.glob("train_*_full.json")), LEARNED, draw)
    judged = drawn(sorted(folder.glob("validate_*.json")), JUDGED, draw)
    draw.shuffle(learned)
    draw.shuffle(judged)
    for name, rows in (("requests", learned), ("requests_test", judged)):
        with Path(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "intent"])
            writer.writerows(rows)


def drawn(files: list[Path], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """`count` requests of each file, with the file's intent."""
    rows: list[tuple[str, str]] = []
    for file in files:
        # One of the files is Latin-1, all others are UTF-8.
        encoding = "latin-1" if file.name == "train_PlayMusic_full.json" else "utf-8"
        ((intent, requests),) = json.loads(file.read_text(encoding)).items()
        texts = ["".join(piece["text"] for piece in request["data"]).strip() for request in requests]
        draw.shuffle(texts)
        rows += [(text, intent) for text in texts[:count]]
    return rows


if __name__ == "__main__":
    main()
