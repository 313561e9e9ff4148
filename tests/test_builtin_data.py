"""The bundled data sets keep their promises: sizes, balance, no leak between splits or into the base's own text."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "src" / "softprompt" / "data" / "builtin"
PRETRAIN_TEXT = ROOT / "pretrain" / "text"

SPLITS = ("train", "validation", "test")
SIZES = {
    "roles": {"train": 133, "validation": 27, "test": 27},
    "messages": {"train": 480, "validation": 90, "test": 120},
    "facts": {"train": 245, "validation": 40, "test": 40},
}
COLUMNS = {
    "roles": ["act", "prompt"],
    "messages": ["text", "label"],
    "facts": ["name", "kind", "place", "detail", "sentence"],
}
# The column that holds the running text of a row, and the one that names it where names must not repeat.
BODY = {"roles": "prompt", "messages": "text", "facts": "sentence"}
UNIQUE = {"roles": ["act", "prompt"], "messages": ["text"], "facts": ["name", "place", "sentence"]}
LABELS = {"delivery", "payment", "return", "account", "thanks", "job"}
NEAR = 0.5

Row = dict[str, str]


def rows_of(name: str, split: str) -> list[Row]:
    with open(BUILTIN / name / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def all_rows(name: str) -> list[tuple[str, Row]]:
    return [(split, row) for split in SPLITS for row in rows_of(name, split)]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def normalised(text: str) -> str:
    return " ".join(words(text))


def grams(text: str, n: int = 5) -> frozenset[tuple[str, ...]]:
    """All runs of n words; a text shorter than that counts as one run."""
    found = words(text)
    return frozenset(tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1)))


def overlap(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def pretrain_pieces() -> Iterator[tuple[str, str]]:
    for path in sorted(PRETRAIN_TEXT.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield f"{path.name}:{number}", json.loads(line)["text"]


@pytest.mark.parametrize("name", SIZES)
def test_a_set_has_the_rows_its_card_promises(name: str) -> None:
    assert {split: len(rows_of(name, split)) for split in SPLITS} == SIZES[name]
    card = (BUILTIN / name / "README.md").read_text(encoding="utf-8")
    assert "CC0-1.0" in card
    for split, size in SIZES[name].items():
        assert f"`{split}.csv` {size}" in card


@pytest.mark.parametrize("name", SIZES)
def test_every_cell_is_filled_and_free_of_stray_space(name: str) -> None:
    for split in SPLITS:
        for number, row in enumerate(rows_of(name, split)):
            assert list(row) == COLUMNS[name]
            for column, cell in row.items():
                where = f"{name}/{split} row {number}: {column}"
                assert cell, where
                assert cell == " ".join(cell.split()), where


def test_every_label_has_the_same_number_of_messages_in_each_split() -> None:
    for split, size in SIZES["messages"].items():
        counts = Counter(row["label"] for row in rows_of("messages", split))
        assert counts == dict.fromkeys(LABELS, size // len(LABELS))


def test_most_messages_do_not_hold_their_own_label() -> None:
    rows = all_rows("messages")
    held = sum(row["label"] in words(row["text"]) for _, row in rows)
    assert held < len(rows) / 5


def test_role_prompts_speak_in_the_manner_of_the_tutorial() -> None:
    for _, row in all_rows("roles"):
        assert row["prompt"].startswith("I want you to act as ")
        assert 30 <= len(row["prompt"].split()) <= 100, row["act"]


def test_a_fact_sentence_holds_its_fields() -> None:
    for _, row in all_rows("facts"):
        sentence = row["sentence"].lower()
        for column in ("name", "kind", "place"):
            assert re.sub(r"^(the|a) ", "", row[column].lower()) in sentence, row


@pytest.mark.parametrize("name", SIZES)
def test_no_row_stands_twice_in_a_set(name: str) -> None:
    for column in UNIQUE[name]:
        counts = Counter(normalised(row[column]) for _, row in all_rows(name))
        assert [text for text, times in counts.items() if times > 1] == []


@pytest.mark.parametrize("name", SIZES)
def test_no_two_rows_are_near_copies(name: str) -> None:
    bodies = [(row[BODY[name]], grams(row[BODY[name]])) for _, row in all_rows(name)]
    near = [
        (a, b)
        for (a, one), (b, other) in combinations(bodies, 2)
        if one & other and overlap(one, other) >= NEAR
    ]
    assert near == []


def test_the_written_pretraining_text_is_large_and_without_repeats() -> None:
    pieces = [text for _, text in pretrain_pieces()]
    assert len(pieces) >= 300
    assert all(text == text.strip() and text for text in pieces)
    assert len({normalised(text) for text in pieces}) == len(pieces)


@pytest.mark.parametrize("name", SIZES)
def test_no_row_of_a_set_stands_in_the_pretraining_text(name: str) -> None:
    pieces = [(where, f" {normalised(text)} ", grams(text)) for where, text in pretrain_pieces()]
    for split, row in all_rows(name):
        body = row[BODY[name]]
        plain, own = f" {normalised(body)} ", grams(body)
        for where, text, found in pieces:
            assert plain not in text, f"{name}/{split}: {body!r} stands in {where}"
            shared = len(own & found) / len(own)
            assert shared < NEAR, f"{name}/{split}: {body!r} is nearly in {where}"
