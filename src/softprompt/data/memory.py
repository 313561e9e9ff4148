"""Rows that are in memory already: lists, examples, data frames, tables and data sets, each as one stream of raw rows.

Frames and tables are recognised by the package that they come from, so that none of these packages is imported here.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from softprompt.data.example import EXAMPLE_REFERENCES, Example, Splits
from softprompt.data.files import Raw
from softprompt.errors import DataError

_FRAME_ROWS = 10_000  # rows of a frame that are turned into Python values at a time


class Frame(Protocol):
    """A pandas or polars DataFrame."""

    @property
    def columns(self) -> Any: ...


class Table(Protocol):
    """A pyarrow Table, or a Dataset or IterableDataset of the datasets package."""

    @property
    def column_names(self) -> Any: ...


Row: TypeAlias = Mapping[str, Any] | Example | str
Source: TypeAlias = str | os.PathLike[str] | Iterable[Row] | Mapping[str, Iterable[Row]] | Frame | Table
"""Whatever `load_splits` reads rows from."""


def package_of(source: object) -> str:
    """The package that the class of `source` comes from: "pandas", "polars", "pyarrow", "datasets", ..."""
    return type(source).__module__.partition(".")[0]


@dataclass(frozen=True)
class MemoryRows:
    """One split of rows in memory. Reading it twice gives the same rows, except for a generator."""

    given: Any
    name: str

    def rows(self) -> Iterator[Raw]:
        match package_of(self.given):
            case "pandas":
                yield from _pandas_rows(self.given, self.name)
            case "polars":
                yield from self.given.iter_rows(named=True)
            case "pyarrow":
                batches = self.given.to_batches() if hasattr(self.given, "to_batches") else [self.given]
                for batch in batches:
                    yield from batch.to_pylist()
            case _:
                for number, row in enumerate(self.given):
                    yield raw_row(row, self.name, number)


def checked(source: object, name: str) -> MemoryRows:
    """`source` as one split of rows. Raises DataError for what is not rows, and says what to pass instead."""
    kind = type(source).__name__
    package = package_of(source)
    if package == "pandas" and hasattr(source, "columns"):
        return MemoryRows(source, name)
    if package == "pandas" and kind == "Series":
        raise _refused(name, "a pandas Series", 'Pass a frame, such as series.to_frame("text")')
    if package == "polars" and hasattr(source, "iter_rows"):
        return MemoryRows(source, name)
    if package == "polars":
        advice = "Call .collect() first" if kind == "LazyFrame" else "Pass a DataFrame"
        raise _refused(name, f"a polars {kind}", advice)
    if package == "pyarrow" and hasattr(source, "to_pylist") and hasattr(source, "column_names"):
        return MemoryRows(source, name)
    if package == "pyarrow" and hasattr(source, "schema") and hasattr(source, "to_batches"):
        return MemoryRows(source, name)  # a RecordBatch of an older pyarrow, or a data set of files
    if package == "pyarrow":
        raise _refused(name, f"a pyarrow {kind}", "Pass a Table")
    if isinstance(source, Example):
        raise _refused(name, "a single Example", "Put it into a list")
    if isinstance(source, Splits):
        raise _refused(name, "a Splits, which is read already", "Use it as it is, or pass its .train")
    if isinstance(source, Mapping):
        raise _refused(
            name,
            f"a single mapping ({', '.join(map(str, list(source)[:6])) or 'empty'})",
            "Put a row into a list; for columns use datasets.Dataset.from_dict; for splits name them train, "
            "validation and test",
        )
    if isinstance(source, (bytes, bytearray, memoryview)):
        raise _refused(name, kind, "Decode it to text, and pass a list of texts or a file's path")
    if isinstance(source, io.IOBase):
        raise _refused(name, "an open file", "Pass its path")
    if isinstance(source, Set):
        raise _refused(name, f"a {kind}, whose order is not fixed", "Pass a list")
    if package in ("numpy", "torch") and getattr(source, "ndim", 1) != 1:
        raise _refused(name, f"a {package} {kind} of {source.ndim} dimensions", "Pass a list of mappings")  # type: ignore[attr-defined]
    if not isinstance(source, Iterable):
        raise _refused(
            name,
            kind if source is not None else "None",
            "Pass a file, a folder, an id on the hub, a list of rows, a data frame, a table or a data set",
        )
    return MemoryRows(source, name)


def raw_row(row: object, name: str, number: int) -> Raw:
    """One row as columns and values. Raises DataError for what is no row."""
    if isinstance(row, str):
        return {"text": str(row)}
    if isinstance(row, Example):
        return _of_example(row)
    if isinstance(row, Mapping):
        return {str(column): value for column, value in row.items()}
    raise DataError(
        f"{_begin(name)}: row {number} is {type(row).__name__}; wanted a text, a mapping of column to value, "
        "or an Example."
    )


def split_mapping(source: object, aliases: Iterable[str]) -> bool:
    """Whether `source` holds one set of rows a split: a DatasetDict, or {"train": rows, "test": rows}."""
    if not isinstance(source, Mapping) or not source:
        return False
    if package_of(source) == "datasets":
        return True
    expected = set(aliases)
    return all(name in expected for name in source) and not any(
        value is None or isinstance(value, (str, bytes, int, float, Example)) for value in source.values()
    )


def _of_example(example: Example) -> Raw:
    raw: Raw = dict(example.fields)
    if example.references:
        raw[EXAMPLE_REFERENCES] = list(example.references)
    if example.messages is not None:
        raw["messages"] = [
            {
                "role": message.role,
                "content": message.content,
                "weight": int(message.learned),
                **{key: json.loads(text) for key, text in message.more},
            }
            for message in example.messages
        ]
    return raw


def _pandas_rows(frame: Any, name: str) -> Iterator[Raw]:
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise DataError(
            f"{_begin(name)}: the frame has the column {twice!r} twice. Give each column its own name."
        )
    names = [str(column) for column in frame.columns]
    for start in range(0, len(frame), _FRAME_ROWS):
        part = frame.iloc[start : start + _FRAME_ROWS]
        columns = [part.iloc[:, column].astype(object).tolist() for column in range(len(names))]
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))


def _refused(name: str, kind: str, advice: str) -> DataError:
    return DataError(f"{_begin(name)}: found {kind}, wanted rows. {advice}.")


def _begin(name: str) -> str:
    return name[:1].upper() + name[1:]


def json_text(value: object) -> str:
    """A nested value as text, its keys in their order."""
    return json.dumps(value, ensure_ascii=False, default=str)
