"""Bits per character, by one script for every model.

    python pretrain/bits.py --text WORK/tokens/heldout/children.jsonl --text ../shared/data/heldout-text/wikitext2_valid.txt MODEL ...

A text is cut into windows of 256 of the model's own tokens, side by side. The first token of a window only gives context:
the bits of all others are added up and divided by the characters that those others stand for, so that models with
different tokenizers can be compared. The documents of a .jsonl file are joined by blank lines; a .txt file is one text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 256


def read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    return text


def windows(spans: list[tuple[int, int]], size: int = WINDOW) -> list[tuple[int, int, int]]:
    """(first token, token after the last, characters of all tokens but the first) of each window.

    `spans` are the tokens' (start, end) in characters. A last window of a single token has nothing to score and is left out.
    """
    found = []
    for start in range(0, len(spans), size):
        stop = min(start + size, len(spans))
        if stop - start > 1:
            found.append((start, stop, spans[stop - 1][1] - spans[start][1]))
    return found


@torch.inference_mode()
def bits_per_character(
    model: Any, tokenizer: Any, text: str, size: int = WINDOW, batch: int = 16
) -> tuple[float, int]:
    """(bits per character, scored tokens) of `text`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, cut = encoded["input_ids"], windows(encoded["offset_mapping"], size)
    nats, characters, scored = 0.0, sum(chars for _, _, chars in cut), 0
    by_length: dict[int, list[int]] = {}
    for start, stop, _ in cut:
        by_length.setdefault(stop - start, []).append(start)
    for length, starts in by_length.items():
        for at in range(0, len(starts), batch):
            ids_BT = torch.tensor(
                [ids[start : start + length] for start in starts[at : at + batch]], device=model.device
            )
            logits = model(ids_BT).logits[:, :-1].float()
            labels = ids_BT[:, 1:].reshape(-1)
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
            scored += len(labels)
    if not characters:
        raise ValueError("found no text to score, wanted at least two tokens; give a longer text")
    return nats / math.log(2) / characters, scored


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders in transformers' layout")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument(
        "--characters", type=int, help="only so many characters of each text, for a quick look"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for folder in arguments.models:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
        model = model.eval().to(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for path in arguments.text:
            bits, scored = bits_per_character(
                model, tokenizer, read(path)[: arguments.characters], arguments.window
            )
            row = {"model": folder, "text": path.name, "window": arguments.window, "dtype": arguments.dtype,
                   "bits_per_character": round(bits, 4), "scored_tokens": scored}  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
