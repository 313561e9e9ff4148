"""Rows are taken from whatever holds them in memory, or refused in one line that says what to pass instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from softprompt.data.example import Example, Message
from softprompt.data.source import load_splits
from softprompt.errors import DataError

ROWS = [{"text": f"Grüße {i}", "label": "ja" if i % 2 else "nein"} for i in range(6)]


class PolarsFrame:
    """The part of polars.DataFrame that is read, for machines without polars."""

    __module__ = "polars.dataframe.frame"

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.columns = list(rows[0])

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, Any]]:
        assert named
        return iter(self._rows)


def polars_frame(rows: list[dict[str, Any]]) -> Any:
    return PolarsFrame(rows)


FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "examples": lambda rows: [Example(row) for row in rows],
    "frame": pd.DataFrame,
    "frame with another index": lambda rows: pd.DataFrame(rows, index=range(50, 50 + len(rows))),
    "polars": polars_frame,
    "table": pa.Table.from_pylist,
    "record batch": pa.RecordBatch.from_pylist,
    "data set": datasets.Dataset.from_list,
    "data set of tensors": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "iterable data set": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "splits of a data set": lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    "splits of lists": lambda rows: {"train": rows},
    "splits of frames": lambda rows: {"train": pd.DataFrame(rows)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_gives_the_same_examples(form: str) -> None:
    splits = load_splits(FORMS[form](ROWS), target="label", limit=6, validation=0)
    assert [dict(example.fields) for example in splits.train] == ROWS
    assert [example.row for example in splits.train] == list(range(6))


def test_texts_alone_are_the_text_column() -> None:
    for texts in (["a", "b"], ("a", "b"), iter(["a", "b"]), np.array(["a", "b"])):
        assert [dict(one.fields) for one in load_splits(texts).train] == [{"text": "a"}, {"text": "b"}]


def test_the_splits_of_a_data_set_are_its_own() -> None:
    whole = datasets.Dataset.from_list(ROWS)
    parts = datasets.DatasetDict(train=whole, validation=whole.select([0, 1]), test=whole.select([2]))
    splits = load_splits(parts)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 1)
    assert load_splits(parts, split="test").train[0].fields == ROWS[2]
    mapping = load_splits({"train": ROWS, "dev": pd.DataFrame(ROWS[:3])})
    assert (len(mapping.train), len(mapping.validation)) == (6, 3)
    with pytest.raises(DataError, match=r"no split 'tset'; it has: .*Did you mean 'test'"):
        load_splits(parts, split="tset")


def test_class_numbers_of_a_data_set_are_their_names() -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    given = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    assert [one.fields["label"] for one in load_splits(given, target="label").train] == ["yes", "no"]


def test_a_frame_keeps_whole_numbers_whole_and_missing_cells_missing() -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "n": [3, 4], "x": [0.5, float("nan")], "ok": [True, False]})
    given = [dict(one.fields) for one in load_splits(frame).train]
    assert given == [
        {"text": "a", "n": "3", "x": "0.5", "ok": "true"},
        {"text": "b", "n": "4", "ok": "false"},
    ]
    for missing in (None, float("nan"), np.nan, pd.NA, pd.NaT):
        with pytest.raises(DataError, match=r"1 of 2 rows have nothing in column 'label' \(rows 1"):
            load_splits([{"text": "a", "label": "x"}, {"text": "b", "label": missing}], target="label")


def test_numbers_of_numpy_are_numbers() -> None:
    rows = [{"text": "a", "label": np.int64(3)}, {"text": "b", "label": np.float32(0.5)}]
    assert [one.fields["label"] for one in load_splits(rows, target="label").train] == ["3", "0.5"]


def test_examples_keep_their_chats() -> None:
    chat = (
        Message("user", "hi"),
        Message("assistant", "hello", learned=False),
        Message("assistant", "", (("tool_calls", '[{"function": {"name": "f"}}]'),)),
    )
    assert load_splits([Example({}, chat)]).train[0].messages == chat


def test_an_endless_data_set_needs_a_limit_and_is_read_no_further() -> None:
    read = []

    def endless() -> Iterator[dict[str, str]]:
        while True:
            read.append(1)
            yield {"text": f"row {len(read)}"}

    given = datasets.IterableDataset.from_generator(endless)
    with pytest.raises(DataError, match=r"need not end. Set data.limit"):
        load_splits(given)
    assert len(load_splits(given, limit=5, validation=0).train) == 5
    assert len(read) < 10


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Example({"text": "a"}), "found a single Example, wanted rows. Put it into a list"),
        ({"text": "a", "label": "b"}, r"found a single mapping \(text, label\)"),
        ({"text": ["a", "b"]}, "for columns use datasets.Dataset.from_dict"),
        ({}, r"single mapping \(empty\)"),
        ({"train": "rows.csv"}, "single mapping"),
        (None, "found None"),
        (5, "found int"),
        (b"text", "found bytes.*Decode"),
        ({"a", "b"}, "found a set.*Pass a list"),
        (np.zeros((2, 2)), "2 dimensions"),
        (pd.Series([1.0, 2.0]), r"a pandas Series.*to_frame"),
        (pa.array(["a"]), "a pyarrow StringArray.*Pass a Table"),
        ([5], "row 0 is int; wanted a text, a mapping"),
        ([["a", "b"]], "row 0 is list"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "has the column 'text' twice"),
        (pd.DataFrame({"text": []}), "has no row"),
        ([], "has no row"),
    ],
)
def test_what_is_no_rows_is_refused_in_one_line(given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        load_splits(given)
    assert "\n" not in str(refused.value)


def test_an_open_file_and_read_splits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("a\nb\n")
    with path.open() as file, pytest.raises(DataError, match=r"an open file.*Pass its path"):
        load_splits(file)
    with pytest.raises(DataError, match="a Splits, which is read already"):
        load_splits(load_splits(["a", "b"]))  # type: ignore[arg-type]
