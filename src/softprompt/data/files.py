"""Local files to raw rows, one at a time, so that a limit reads no more than it needs.

csv and tsv by Python's csv module, json and jsonl by its json module (both exact, both lazy), parquet by `datasets`.
Compressed text files (.gz, .xz, .bz2) are read as they are.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from softprompt.data.template import did_you_mean
from softprompt.errors import DataError, MissingExtra

Raw = dict[str, Any]

_COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_SNIFFED_BYTES = (
    16 * 2**20
)  # what is read to tell the encoding; later surprises are reported with their place


def data_suffix(path: Path) -> str | None:
    """The suffix that tells how `path` is read, a compression's left out; None for what is no data file."""
    suffixes = [one.lower() for one in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_file(path: Path, *, encoding: str | None, notes: list[str]) -> Iterator[Raw]:
    """Rows of one file as the file has them, numbers and nested values included.

    Without `encoding` a byte order mark decides, then UTF-8; a file that is not UTF-8 is read as UTF-16 or Windows-1252
    by its bytes, and `notes` says so. Raises DataError with the place for whatever cannot be read.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: its name ends in none of {', '.join(SUFFIXES)}. Convert it to one of these."
        )
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with _opened(path) as file:
            sample = file.read(_SNIFFED_BYTES)
        codec = _known(encoding) if encoding else _detected(sample, path, notes)
        if not sample.strip():
            raise DataError(f"{path} is empty. Give a file with at least one row.")
        with _opened(path) as file, io.TextIOWrapper(file, encoding=codec, newline="") as text:
            match suffix:
                case ".csv" | ".tsv":
                    yield from _delimited(text, path, "\t" if suffix == ".tsv" else ",", notes)
                case ".json":
                    yield from _json(text, path)
                case _:
                    yield from _jsonl(text, path)
    except UnicodeError as error:
        raise DataError(_undecodable(path, encoding, error)) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the file and its permissions.") from error


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The `datasets` package without its progress bars and warnings; both as they were afterwards."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            "The datasets package is needed for this source. Install it: pip install datasets"
        ) from error
    from datasets.utils import logging

    level, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def named_classes(raw: Raw, features: Any) -> Raw:
    """The row with class numbers put into words, where the data set knows them; -1 (no label) becomes None."""
    for name, feature in (features or {}).items():
        names = getattr(feature, "names", None)
        value = raw.get(name)
        if names and isinstance(value, int):
            raw[name] = names[value] if 0 <= value < len(names) else None
    return raw


def _parquet(path: Path) -> Iterator[Raw]:
    with quiet_datasets() as datasets:
        try:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            for raw in rows:
                yield named_classes(dict(raw), rows.features)
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise DataError(
                f"{path} cannot be read as parquet: {_first_line(error)}. Check that the download is complete."
            ) from error


def _delimited(text: io.TextIOBase, path: Path, delimiter: str, notes: list[str]) -> Iterator[Raw]:
    lines = _Lines(text)
    with _long_cells():
        first = next((line for line in lines if line.strip()), "")
        delimiter = _delimiter(first, delimiter, path, notes)
        reader = csv.reader(_chain(first, lines), delimiter=delimiter)
        try:
            header = [name.strip() for name in next(reader)]
            twice = {name for name in header if name and header.count(name) > 1}
            if twice:
                raise DataError(
                    f"{path} names the column {sorted(twice)[0]!r} twice. Give each column its own name."
                )
            for cells in reader:
                if not cells or (len(header) > 1 and cells in ([""], [])):
                    continue  # a blank line
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {lines.read}: {len(cells)} cells, but the header has {len(header)} "
                        f"({', '.join(header)}). Put cells that contain {delimiter!r} or line breaks in double quotes."
                    )
                yield {name: cell for name, cell in zip(header, cells, strict=True) if name}
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.read}: {error}. Save it again as csv.") from error
    if lines.quotes % 2:
        notes.append(
            f"{path} has an odd number of double quotes: a quote that is never closed may have joined rows."
        )


class _Lines:
    """The lines of a text, with how many were read and how many double quotes were in them."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self.read, self.quotes = text, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self.read += 1
        self.quotes += line.count('"')
        return line


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(first: str, usual: str, path: Path, notes: list[str]) -> str:
    """What separates the cells of the header line: the usual, or another where the usual would leave one cell."""
    if usual in first:
        return usual
    counts = {one: first.count(one) for one in (";", "\t", "|", ",") if one in first}
    if not counts:
        return usual
    other = max(counts, key=lambda one: counts[one])
    notes.append(f"{path} separates its columns by {other!r}.")
    return other


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit()
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the usual limit, 131,072, is shorter than a book
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json(text: io.TextIOBase, path: Path) -> Iterator[Raw]:
    whole = text.read()
    try:
        found = json.loads(whole)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the name of .json
            yield from _jsonl(io.StringIO(whole), path)
            return
        raise _not_json(path, error, error.lineno) from None
    yield from _rows_of(found, path)


def _jsonl(text: io.TextIOBase, path: Path) -> Iterator[Raw]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip()[0] == "[":  # a list over several lines, under the name of .jsonl
                yield from _json(io.StringIO(line + text.read()), path)
                return
            raise _not_json(path, error, number) from None
        if isinstance(found, list) and number == 1:
            yield from _rows_of(found, path)
        elif isinstance(found, dict):
            yield found
        else:
            raise DataError(
                f"{path}, line {number}: {_kind(found)} instead of an object. Write one object a line."
            )


def _rows_of(found: object, path: Path) -> Iterator[Raw]:
    """Rows of a parsed json file: a list, or an object that holds one list of objects under any name."""
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value]
        lists = [value for value in lists if isinstance(value[0], dict)] or lists
        if len(lists) != 1:
            raise DataError(
                f"{path} holds an object with {len(lists)} lists of rows ({', '.join(map(repr, found)) or 'empty'}); "
                'wanted a list of objects, or {"data": [...]}. Save the rows as such a list, or as jsonl.'
            )
        found = lists[0]
    if not isinstance(found, list):
        raise DataError(
            f"{path} holds {_kind(found)}; wanted a list of objects. Save the rows as such a list."
        )
    for number, one in enumerate(found):
        if isinstance(one, str):
            yield {"text": one}
        elif isinstance(one, dict):
            yield one
        else:
            raise DataError(
                f"{path}, entry {number}: {_kind(one)} instead of an object. Make every row an object."
            )


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _not_json(path: Path, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(
        f"{path}, line {line}, column {error.colno}: not JSON ({error.msg}). Mend or remove that line."
    )


def _opened(path: Path) -> BinaryIO:
    opener: Callable[[Path, str], Any] = _COMPRESSED.get(path.suffix.lower(), open)
    return cast(BinaryIO, opener(path, "rb"))


def _known(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        "".encode(encoding)  # refuses codecs that do not make text, such as zlib
    except LookupError:
        usual = [
            "utf-8",
            "utf-8-sig",
            "utf-16",
            "latin-1",
            "cp1252",
            "cp1251",
            "gb18030",
            "shift_jis",
            "euc-kr",
        ]
        raise DataError(
            f"data.encoding is {encoding!r}, which is no text encoding.{did_you_mean(encoding, usual)} "
            f"Use one that Python knows, such as {', '.join(usual[:5])}, or leave it out."
        ) from None
    return (
        "utf-8-sig" if name == "utf-8" else name
    )  # a byte order mark is never part of the first column's name


def _detected(sample: bytes, path: Path, notes: list[str]) -> str:
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if sample.startswith(mark):
            return codec
    head = sample[:4096]
    if b"\0" in head:
        codec = "utf-16-le" if head[1::2].count(0) >= head[::2].count(0) else "utf-16-be"
        notes.append(
            f"{path} has zero bytes and no byte order mark; read as {codec}. Set data.encoding if that is wrong."
        )
        return codec
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=len(sample) < _SNIFFED_BYTES)
    except UnicodeDecodeError as error:
        try:
            sample.decode("cp1252")
            codec = "cp1252"
        except UnicodeDecodeError:
            codec = "latin-1"
        notes.append(
            f"{path} is not UTF-8 (byte 0x{sample[error.start]:02x} at {error.start:,}); read as {codec}. "
            "Set data.encoding if letters look wrong."
        )
        return codec
    return "utf-8"


def _undecodable(path: Path, encoding: str | None, error: UnicodeError) -> str:
    what = f"data.encoding {encoding}" if encoding else "the encoding that its first bytes show"
    at = f" (byte 0x{error.object[error.start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
    advice = (
        "Leave data.encoding out to have it detected, or set the right one"
        if encoding
        else "Set data.encoding"
    )
    return f"{path} does not fit {what}{at}: {error.args[-1]}. {advice}, for example latin-1."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
