"""A million rows are judged in bounded memory: rows stay in their file, figures in flat arrays, and nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle
import random
import shutil
import statistics
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from softprompt.data.example import Example
from softprompt.data.examples import Examples
from softprompt.data.template import Template
from softprompt.errors import SoftPromptError
from softprompt.evaluation import metric, rows
from softprompt.evaluation.evaluate import Answer, Evaluation, default_metrics, judge_rows
from softprompt.evaluation.metric import METRICS, metrics_named
from softprompt.evaluation.row_counts import RowCounts
from softprompt.evaluation.rows import Row, RowLines, read_rows

LAYOUT = Template.parse("{text} is {label}", target="label")
ALL = [name for name in METRICS if name != "bleu"]


def examples(count: int) -> Examples:
    """Rows of three labels; every tenth asks what the row before asks, with another answer wanted."""
    return Examples(
        Example(
            {"text": f"parcel {i - (i % 10 == 9)}", "label": ("late", "lost", "re\u2028fund")[i % 3]}, row=i
        )
        for i in range(count)
    )


def answers(asked: Sequence[Example]) -> list[Answer]:
    """Wrong in two of seven rows, and a loss of few different values."""
    return [
        Answer(
            "late" if one.row % 7 < 2 else one.fields["label"],
            nll=0.25 * (one.row % 5 + 1), tokens=1 + one.row % 2, text_bytes=4, new_tokens=1, finish_reason="stop",
            scores={"late": -0.5, "lost": -1.5},
        )
        for one in asked
    ]  # fmt: skip


def judge(count: int = 200, names: Sequence[str] = ALL, out: Path | None = None) -> Evaluation:
    return judge_rows(answers, examples(count), metrics_named(list(names)), LAYOUT, out=out)


@pytest.mark.parametrize("kept", [False, True])
def test_rows_in_their_file_are_those_in_memory_with_the_same_figures(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = judge()
    assert isinstance(few.rows, tuple)
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 1000)
    many = judge(out=tmp_path if kept else None)
    assert not isinstance(many.rows, tuple)
    assert many.rows == few.rows
    assert many.estimates == few.estimates
    assert many.confusion == few.confusion
    assert many.rows[-1] == few.rows[-1]
    assert many.rows[5:9] == few.rows[5:9]
    with pytest.raises(IndexError):
        many.rows[200]
    assert copy.deepcopy(many.rows) == pickle.loads(pickle.dumps(many.rows)) == few.rows
    # By hand: every row's loss, and the rows of one input with all their wanted texts.
    assert many.rows[9].references == ("re\u2028fund", "late")
    assert [many.rows[i].repeated for i in (8, 9)] == [False, True]
    assert many.estimates["nll"].value == pytest.approx(
        math.fsum(0.25 * (i % 5 + 1) for i in range(200)) / sum(1 + i % 2 for i in range(200)), rel=1e-15
    )
    right = [float(i % 7 >= 2 or i % 3 == 0) for i in range(200)]
    assert many.estimates["accuracy"].value == statistics.fmean(right)
    assert many.estimates["accuracy"].stderr == pytest.approx(statistics.stdev(right) / 200**0.5, rel=1e-12)


def test_rows_in_a_file_stay_as_they_are_when_the_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 0)
    result = judge(20, out=tmp_path / "judged")
    expected = list(result.rows)
    again = judge(20, out=tmp_path / "judged")
    assert again.reused == 20
    shutil.rmtree(tmp_path / "judged")
    assert list(result.rows) == list(again.rows) == expected


def test_a_killed_evaluation_goes_on_from_a_line_cut_inside_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 0)
    whole = judge(150, out=tmp_path / "whole")

    def killed(asked: Sequence[Example]) -> list[Answer]:
        if asked[0].row >= 64:
            raise KeyboardInterrupt
        return answers(asked)

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        judge_rows(killed, examples(150), metrics_named(ALL), LAYOUT, out=out)
    path = out / "rows.jsonl"
    content = path.read_bytes()
    assert content.count(b"\n") == 64
    cut = content.rindex("\u2028".encode()) + 1  # the character has three bytes
    path.write_bytes(content[:cut])
    complete = content[:cut].count(b"\n")
    resumed = judge(150, out=out)
    assert resumed.reused == complete
    assert resumed.rows == whole.rows
    assert resumed.estimates == whole.estimates
    assert path.read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_rows_out_of_order_and_twice_are_read_in_the_order_of_their_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list(range(30)) * 2
    random.Random(1).shuffle(order)
    lines = [Row(index, index, "in", "out", answer=f"{n}", nll=1.0) for n, index in enumerate(order)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row.to_line() for row in lines))
    expected = {row.index: row for row in lines}
    in_memory = read_rows(path)
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 0)
    assert list(read_rows(path)) == list(in_memory) == [expected[index] for index in range(30)]


@pytest.mark.parametrize("index", [-1, 2**63, 10**30])
def test_a_row_of_an_impossible_index_is_no_row(index: int) -> None:
    with pytest.raises(SoftPromptError, match="index"):
        Row.from_json(Row(index, 0, "in", "out").to_json())


def test_half_a_surrogate_pair_and_a_score_that_is_not_known_come_back(tmp_path: Path) -> None:
    row = Row(0, 0, "a \ud83d", "b", answer="\udc00", scores={"b": -math.inf, "c": -1.0})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row.to_line())
    path.read_bytes().decode()  # any program can read it
    (back,) = read_rows(path)
    assert (back.input, back.answer) == (row.input, row.answer)
    assert back.scores is not None
    assert math.isnan(back.scores["b"])
    assert back.scores["c"] == -1.0


def test_counts_in_flat_arrays_are_the_mappings_that_were_added() -> None:
    counts = [{"sum": 1.0, "n": 1.0}, {}, {"hit:a b": 1.0}, {"sum": 0.1, "n": 1.0}, {"n": 2.0, "sum": 0.7}]
    table = RowCounts(counts)
    assert list(table) == counts
    assert [list(row) for row in table] == [list(row) for row in counts]
    assert table[-1] == counts[-1]
    assert list(table[1:4]) == counts[1:4]
    assert table.summed() == {"sum": math.fsum([1.0, 0.1, 0.7]), "n": 4.0, "hit:a b": 1.0}
    with pytest.raises(IndexError):
        table[5]


def test_as_many_labels_as_rows_make_no_table_of_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "MOST_LABELS", 2)
    assert judge(30).confusion is None
    many = [Example({"text": "a", "label": f"number {i}"}) for i in range(40)]
    assert default_metrics(LAYOUT, many)[0] == "rouge_l"
    assert default_metrics(LAYOUT, many + many)[0] == "accuracy"


def test_memory_grows_by_little_with_every_row_that_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 2**16)

    def peak(count: int) -> int:
        given = examples(count)
        tracemalloc.start()
        judge_rows(
            answers, given, metrics_named(["nll", "accuracy", "macro_f1"]), LAYOUT, out=tmp_path / str(count)
        )
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(1_000), peak(4_000)
    # Each row has about 300 bytes in its file; held as an object it takes 900.
    assert (large - small) / 3_000 < 300


def test_a_temporary_folder_that_is_full_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RowLines, rows: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowLines, "add", full)
    with pytest.raises(SoftPromptError, match=r"No space left on device.*--out"):
        judge(5)
