"""Rows that come sorted by label: the first of them teach or judge a part of the labels alone, and that is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from softprompt.cli.app import main
from softprompt.data.example import Example
from softprompt.data.sorted_rows import single_note, sorted_note
from softprompt.data.source import load_splits
from softprompt.evaluation.judge import first_rows


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
