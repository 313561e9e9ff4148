"""Rows that come sorted by label, or with one label for all, and answers that are withheld: what is done and said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.data.example import Example
from softprompt.data.label_notes import single_note, sorted_note, variants_note, withheld_note
from softprompt.data.labels import are_labels
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import default_metrics
from softprompt.evaluation.judge import first_rows
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan
from tiny_models import tiny_model, tiny_tokenizer


def rows(labels: Sequence[str]) -> tuple[Example, ...]:
    return tuple(Example({"text": f"t{n}", "label": label}, row=n) for n, label in enumerate(labels))


SORTED, ONE, MIXED = ["a"] * 12 + ["b"] * 12, ["a"] * 24, ["a", "b"] * 12


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (SORTED, "come sorted by label ('a', 'b')"),
        (["d"] * 6 + ["c"] * 6 + ["b"] * 6 + ["a"] * 6, "come sorted by label ('d', 'c', 'b', ...)"),
        (ONE, "all have the label 'a'"),
        (MIXED, None),
        ([*SORTED, "a"], None),  # a comes again: not sorted
        (SORTED[:13], None),  # too few to tell
        ([str(n) for n in range(24)], None),  # answers, not labels
        ([str(n // 3) for n in range(24)], None),  # eight labels of three rows: too few of each
    ],
)
def test_the_first_rows_are_noted_where_their_labels_come_one_after_another(
    labels: list[str], said: str | None
) -> None:
    note = sorted_note(rows(labels), "label", "data.limit")
    assert (note is None) if said is None else (note is not None and said in note and "data.limit" in note)
    assert sorted_note(rows(labels), None, "data.limit") is None


def test_one_label_for_all_rows_is_noted() -> None:
    assert "the label 'a'" in (single_note(rows(ONE), "label") or "")
    assert single_note(rows(SORTED), "label") is None
    assert single_note(rows(ONE[:5]), "label") is None


def test_labels_that_differ_in_capitals_or_white_space_alone_are_noted(tmp_path: Path) -> None:
    labels = ["good"] * 20 + ["Good", "GOOD", "Good", " bad", "bad"] * 2 + ["bad"] * 6
    note = variants_note(rows(labels), "label") or ""
    assert note.startswith("The label 'good' (20 rows) is also written 'Good' (4), 'GOOD' (2): ")
    assert note.endswith("So is one more label.")  # bad
    assert variants_note(rows(MIXED), "label") is None
    assert (
        variants_note(rows([f"A{n}" for n in range(20)] + [f"a{n}" for n in range(20)]), "label") is None
    )  # answers
    path = file_of(tmp_path, labels)
    assert any("is also written 'Good'" in text for text in load_splits(path, target="label").notes)


def file_of(folder: Path, labels: Sequence[str]) -> str:
    path = folder / "rows.csv"
    path.write_text(
        "text,label\n" + "".join(f"words {n},{label}\n" for n, label in enumerate(labels)), encoding="utf-8"
    )
    return str(path)


def test_reading_says_it_where_a_limit_cut_the_rows_and_only_there(tmp_path: Path) -> None:
    path = file_of(tmp_path, ["good"] * 40 + ["bad"] * 40)

    def notes(limit: int | None) -> str:
        return " ".join(load_splits(path, target="label", limit=limit).notes)

    assert "The first 30 rows, which data.limit takes, all have the label 'good'" in notes(30)
    assert "The first 60 rows, which data.limit takes, come sorted by label ('good', 'bad')" in notes(60)
    assert "sorted" not in notes(None)
    assert "sorted" not in notes(100)  # there are only 80
    assert "All 80 rows have the label 'x'" in " ".join(
        load_splits(file_of(tmp_path, ["x"] * 80), target="label").notes
    )


def test_a_comparison_judges_the_first_rows_and_says_so() -> None:
    first, notes = first_rows(rows(SORTED * 2)[:48], 24, "label")
    assert [example.row for example in first] == list(range(24))
    (note,) = notes
    assert "The first 24 rows, which judge_rows takes, come sorted by label ('a', 'b')" in note
    assert first_rows(rows(SORTED), 24, "label") == (rows(SORTED), [])
    assert first_rows(rows(SORTED), None, "label") == (rows(SORTED), [])


def test_judging_says_it_and_what_was_guessed_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(tmp_path, ["good"] * 40 + ["bad"] * 40)
    arguments = ["evaluate", "--data", path, "--target", "label", "--metric", "nll"]
    assert main([*arguments, "--judge-rows", "24"]) == 0
    told = capsys.readouterr()
    assert "The first 24 rows, which judge_rows takes, all have the label 'good'" in told.err + told.out
    Path(path).write_bytes("text,label\nGrüße,gut\nTschüß,schlecht\n".encode("cp1252"))
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "cp1252" in (told.err + told.out).lower() or "windows" in (told.err + told.out).lower()


@pytest.mark.parametrize(
    ("labels", "withheld"),
    [
        (["-1"] * 3, True),
        (["?"] * 24, True),
        (["?"] * 3, False),  # a few rows of a rare label look like that too
        (["a"] * 24, False),  # it is learned
        (["-1", "a"], False),
        (["-1"], False),
    ],
)
def test_a_split_whose_answers_are_withheld_is_known_by_a_label_that_is_never_learned(
    labels: list[str], withheld: bool
) -> None:
    note = withheld_note(rows(labels), rows(MIXED), "label", "test")
    assert (note is not None) is withheld
    answers = rows([f"answer {n}" for n in range(24)])
    assert withheld_note(rows(labels), answers, "label", "test") is None


def test_a_test_split_of_withheld_answers_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    """As GLUE's come, and their copies as plain numbers."""
    for split, labels in (("train", [0, 1] * 30), ("validation", [0, 1] * 5), ("test", [-1] * 10)):
        lines = [json.dumps({"text": f"{split} {n}", "label": label}) for n, label in enumerate(labels)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = load_splits(tmp_path, target="label")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (60, 10, 0)
    assert any(
        "'test' is not taken by itself: all of its 10 rows have the label '-1'" in note
        for note in splits.notes
    )
    assert len(load_splits(tmp_path, target="label", test="test").test) == 10
    (tmp_path / "validation.jsonl").write_text(
        (tmp_path / "test.jsonl").read_text(encoding="utf-8"), encoding="utf-8"
    )
    drawn = load_splits(tmp_path, target="label")
    assert (len(drawn.validation), len(drawn.train)) == (10, 50)  # held out of the training rows instead


@pytest.mark.parametrize(
    ("rows_of_each", "labels"),
    [
        ([50, 50], True),
        ([1] * 10, False),
        ([2] * 5, True),
        ([5, 1, 1, 1, 1, 1], True),  # half of ten rows share one
        ([4, 1, 1, 1, 1, 1, 1], False),
        # A hundred rows drawn from 77 intents: more distinct ones than half of the rows, and yet labels.
        ([1] * 27 + [2] * 23 + [3] * 6 + [4, 5], True),
        ([1], False),
    ],
)
def test_labels_are_what_at_least_half_of_the_rows_share(rows_of_each: list[int], labels: bool) -> None:
    assert are_labels(rows_of_each) is labels


def test_many_labels_are_labels_wherever_it_matters() -> None:
    """The same rows of 40 values, 15 of which one row alone has: judged, held out and learned as labels."""
    labels = [f"intent {n}" for n in range(15)] + [f"pair {n % 25}" for n in range(50)]
    assert default_metrics(Template.parse("{text} {label}", target="label"), rows(labels))[0] == "accuracy"
    splits = load_splits(
        [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)], target="label"
    )
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(bos=False), name="tiny")
    recipe = Recipe.from_flags(
        {}, ["data.source=x", "data.template={soft:4}{text} {label}", "data.target=label"]
    )
    assert make_plan(recipe, lm=lm, splits=splits).loss_falls_to_zero
    held_out = [example.fields["label"] for example in splits.validation]
    assert (
        len(held_out) == len(set(held_out)) == 10
    )  # no label twice: each has its share, which is less than a row
