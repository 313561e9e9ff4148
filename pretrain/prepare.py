"""Turn the text mix into one file of token ids per source, once.

    python pretrain/prepare.py --text ../shared/data/pretrain --own pretrain/text --out WORK/tokens

Every document becomes `<s> text </s>`; single sentences are gathered into documents of one to six lines first. Held out
as whole documents, and never written to the token files: every 20th children's story and The Wonderful Wizard of Oz;
their text goes to OUT/heldout for the evaluation.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

HELD_OUT_BOOK = "The Wonderful Wizard of Oz"
HELD_OUT_STORY_EVERY = 20
BOS, EOS = 1, 2


def documents(path: Path) -> Iterator[dict[str, str]]:
    """The records of one .jsonl or .jsonl.xz file, in the file's order."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    else:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield json.loads(line)


def sources(text: Path, own: Path | None, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """(name, documents to train on) for every source, held-out documents left out."""
    books = (
        document
        for path in sorted((text / "books_pd_simple").glob("*.jsonl.xz"))
        for document in documents(path)
    )
    yield "books", [book["text"] for book in books if book["title"] != HELD_OUT_BOOK]
    yield "openstax", [page["text"] for page in documents(text / "openstax_ccby/openstax.jsonl.xz")]
    yield "gov", [page["text"] for page in documents(text / "usgov_pd/digitalgov_18f.jsonl.xz")]
    yield "factbook", [page["text"] for page in documents(text / "usgov_pd/factbook.jsonl.xz")]
    yield "children", split(stories(text))[0]
    yield "dialogues", [talk["text"] for talk in documents(text / "dialogues_ccby/taskmaster4.jsonl.xz")]
    lines = (text / "commonvoice_cc0/sentences_en.txt").read_text(encoding="utf-8").splitlines()
    yield "sentences", list(gathered(lines, random.Random(seed)))
    if own is not None and own.is_dir():
        yield "own", [piece["text"] for path in sorted(own.glob("*.jsonl")) for piece in documents(path)]


def stories(text: Path) -> list[str]:
    return [story["text"] for story in documents(text / "children_ccby/stories.jsonl.xz")]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out). Some stories are told twice in the collection: near copies of held-out ones are left out."""
    kept = [story for row, story in enumerate(texts) if row % HELD_OUT_STORY_EVERY == 0]
    known = [phrases(story) for story in kept]
    rest = [story for row, story in enumerate(texts) if row % HELD_OUT_STORY_EVERY]
    return [story for story in rest if not any(near(phrases(story), other) for other in known)], kept


def phrases(text: str) -> set[tuple[str, ...]]:
    """Every six words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 6]) for at in range(max(1, len(words) - 5))}


def near(ours: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> bool:
    return len(ours & other) > 0.2 * min(len(ours), len(other))


def held_out(text: Path) -> dict[str, list[str]]:
    """The documents kept for evaluation: {"children": [...], "oz": [...]}."""
    books = (
        document
        for path in sorted((text / "books_pd_simple").glob("*.jsonl.xz"))
        for document in documents(path)
    )
    return {
        "children": split(stories(text))[1],
        "oz": [book["text"] for book in books if book["title"] == HELD_OUT_BOOK],
    }


def gathered(lines: list[str], rng: random.Random) -> Iterator[str]:
    """Documents of one to six shuffled lines: alone, a sentence would be mostly document marks."""
    lines = list(lines)
    rng.shuffle(lines)
    at = 0
    while at < len(lines):
        size = rng.randint(1, 6)
        yield "\n".join(lines[at : at + size])
        at += size


def write_tokens(texts: list[str], tokenizer: Tokenizer, path: Path, seed: int = 0) -> int:
    """Shuffle the documents, write their ids as uint16 to `path`, and return how many there are."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    count = 0
    with path.open("wb") as file:
        for start in range(0, len(texts), 64):
            for encoded in tokenizer.encode_batch(texts[start : start + 64], add_special_tokens=False):
                ids = np.asarray([BOS, *encoded.ids, EOS], dtype=np.uint16)
                file.write(ids.tobytes())
                count += len(ids)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the folder with the text mix")
    parser.add_argument("--own", type=Path, help="folder of .jsonl files with the project's own pieces")
    parser.add_argument("--tokenizer", type=Path, default=Path("src/softprompt/base/builtin/tokenizer.json"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="prepare this source alone")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    (arguments.out / "heldout").mkdir(parents=True, exist_ok=True)
    counts_file = arguments.out / "counts.json"
    counts = json.loads(counts_file.read_text()) if counts_file.exists() else {}
    for name, texts in sources(arguments.text, arguments.own):
        if arguments.only in (None, name):
            counts[name] = write_tokens(texts, tokenizer, arguments.out / f"{name}.bin")
            print(f"{name}: {len(texts):,} documents, {counts[name]:,} tokens", flush=True)
    for name, texts in held_out(arguments.text).items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (arguments.out / f"heldout/{name}.jsonl").write_text(lines, encoding="utf-8")
    counts_file.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
