"""Rows are held out unless the user says otherwise: a tenth, each label's share of it, the same for the same seed."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from softprompt.data.example import Example
from softprompt.data.source import load_splits
from softprompt.evaluation.judge import recipe_for


def rows(count: int, labels: str = "aab") -> list[dict[str, str]]:
    return [{"text": f"row {i}", "label": labels[i % len(labels)]} for i in range(count)]


def labels(examples: Any) -> Counter[str]:
    return Counter(example.fields["label"] for example in examples)


@pytest.mark.parametrize(
    ("count", "held"), [(39, 0), (40, 10), (99, 10), (100, 10), (200, 20), (999, 100), (20_000, 1000)]
)
def test_a_tenth_is_held_out_and_at_least_ten_of_forty(count: int, held: int) -> None:
    splits = load_splits(rows(count), target="label")
    assert (len(splits.train), len(splits.validation), splits.test) == (count - held, held, ())
    said = [note for note in splits.notes if "held out" in note]
    assert said == (
        [
            f"{held} of {count} rows are held out for validation, drawn by data.seed. "
            "Set data.validation to choose others, or to 0 to learn from all."
        ]
        if held
        else []
    )


def test_every_label_has_its_share_and_keeps_a_row_to_learn_from() -> None:
    splits = load_splits(rows(300, "aaaaaaabbc"), target="label")
    assert labels(splits.validation) == {"a": 21, "b": 6, "c": 3}
    rare = [{"text": f"row {i}", "label": "a"} for i in range(99)] + [{"text": "x", "label": "rare"}]
    assert "rare" in labels(load_splits(rare, target="label").train)
    for seed in range(5):
        assert labels(load_splits(rows(100, "abc"), target="label", seed=seed).validation).total() == 10


def test_it_is_drawn_by_the_seed_and_a_test_part_leaves_it_as_it_was() -> None:
    given = rows(100)
    one = load_splits(given, target="label", seed=3)
    assert load_splits(given, target="label", seed=3) == one
    assert load_splits(given, target="label", seed=4).validation != one.validation
    assert load_splits(given, target="label", seed=3, test=20).validation == one.validation
    everything = [example.row for example in (*one.train, *one.validation)]
    assert sorted(everything) == list(range(100))


def test_texts_and_answers_that_are_all_different_are_drawn_too() -> None:
    assert len(load_splits([f"text {i}" for i in range(50)]).validation) == 10
    answers = [{"text": f"q {i}", "label": f"answer {i}"} for i in range(50)]
    assert len(load_splits(answers, target="label").validation) == 10


def test_nothing_is_drawn_where_the_user_or_the_source_says_what_is_held_out(tmp_path: Path) -> None:
    given = rows(100)
    assert load_splits(given, validation=0).validation == ()
    assert load_splits(given, validation="own").validation == ()
    assert len(load_splits(given, validation=7).validation) == 7
    for name, part in (("train", given), ("dev", given[:3])):
        with (tmp_path / f"{name}.csv").open("w") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)
    assert (
        len(load_splits(tmp_path).validation) == len(load_splits(tmp_path, validation="own").validation) == 3
    )
    parts = datasets.DatasetDict(
        train=datasets.Dataset.from_list(given), valid=datasets.Dataset.from_list(given[:4])
    )
    assert len(load_splits(parts).validation) == 4
    assert len(load_splits([Example({"text": f"{i}"}) for i in range(100)], validation=0.5).validation) == 50


def test_rows_that_are_given_to_be_judged_are_all_judged() -> None:
    assert recipe_for(None, {"source": "rows.csv"}).data.validation == "own"
    learned = SimpleNamespace(
        name="p",
        template="{soft:2}{text}",
        target=None,
        kind="soft",
        length=2,
        base=SimpleNamespace(name="builtin", revision=None),
        notes={
            "recipe": {"data": {"source": "old.csv", "validation": None}},
            "metrics": {"judged_on": "training"},
        },
    )
    # Learned before rows were held out by default: none of its rows may count as held out now.
    assert recipe_for(learned, {}).data.validation == "own"
    learned.notes["metrics"]["judged_on"] = "validation"
    assert recipe_for(learned, {}).data.validation is None
    assert recipe_for(learned, {"source": "new.csv"}).data.validation == "own"
    assert recipe_for(learned, {"source": "new.csv", "validation": 5}).data.validation == 5
