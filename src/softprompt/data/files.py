"""Local files to raw rows, one at a time, so that a limit reads no more than it needs.

csv and tsv by Python's csv module, json and jsonl by its json module (both exact, both lazy), parquet by `datasets`.
Compressed text files (.gz, .xz, .bz2) are read as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from softprompt.data.delimited import Quoting, delimited_rows
from softprompt.data.encoding import CESU_8, detected, joined_halves, named
from softprompt.errors import DataError, MissingExtra, first_line

Raw = dict[str, Any]

_COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_SNIFFED_BYTES = (
    16 * 2**20
)  # shows the encoding and the quoting; later surprises are reported with their place
_UNPACKED_BYTES = 64 * 2**20  # of a compressed file, always allowed
_UNPACKED_RATIO = 200  # text packs 3 to 20 times, repeated rows 100 times


def data_suffix(path: Path) -> str | None:
    """The suffix that decides how `path` is read, a compression's left out; None for what is no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_file(
    path: Path, *, encoding: str | None, notes: list[str], quoting: Quoting = "auto"
) -> Iterator[Raw]:
    """Rows of one file as the file has them, numbers and nested values included.

    Without `encoding` it is detected (data/encoding.py), and `notes` says what was guessed. `quoting` is that of csv
    and tsv. Raises DataError with the place for whatever cannot be read.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: its name ends in none of {', '.join(SUFFIXES)}. Convert it to one of these."
        )
    refuse_special(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with _opened(path) as file:
            sample = file.read(_SNIFFED_BYTES)
        whole = len(sample) < _SNIFFED_BYTES
        codec = named(encoding) if encoding else detected(sample, path, notes, whole=whole)
        if not sample.strip():
            raise DataError(f"{path} is empty. Give a file with at least one row.")
        with _text(path, codec, newline="" if suffix in (".csv", ".tsv") else "\n") as text:
            match suffix:
                case ".csv" | ".tsv":
                    start = sample.decode("utf-8" if codec == CESU_8 else codec, "replace")
                    if not whole:
                        start = start[: start.rfind("\n")]
                    usual = "\t" if suffix == ".tsv" else ","
                    yield from delimited_rows(text, start.lstrip("\ufeff"), path, usual, quoting, notes)
                case ".json":
                    yield from _json(text, path)
                case _:
                    yield from _jsonl(text, path)
    except UnicodeError as error:
        raise DataError(_undecodable(path, encoding, error)) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the file and its permissions.") from error


def refuse_special(path: Path) -> None:
    """Raises DataError for a pipe, a device, a socket or a folder, which would be read for ever or not at all."""
    if path.is_file() or not path.exists():
        return
    kinds = {"is_dir": "a folder", "is_fifo": "a named pipe", "is_socket": "a socket"}
    kind = next((kind for test, kind in kinds.items() if getattr(path, test)()), "a device")
    raise DataError(f"{path} is {kind}, wanted a file. Save the rows in one.")


@contextmanager
def _text(path: Path, codec: str, newline: str) -> Iterator[io.TextIOBase]:
    with _opened(path) as file:
        if codec == CESU_8:
            yield io.StringIO(joined_halves(file.read()), newline=newline)
            return
        with io.TextIOWrapper(file, encoding=codec, newline=newline) as text:
            yield text


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
                f"{path} cannot be read as parquet: {first_line(error).rstrip('.')}. Check that the download is complete."
            ) from error


def _json(text: io.TextIOBase, path: Path) -> Iterator[Raw]:
    whole = text.read().lstrip("\ufeff")
    try:
        value = _parsed(whole, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the name of .json
            yield from _jsonl(io.StringIO(whole), path)
            return
        raise _not_json(path, error, error.lineno) from None
    yield from _rows_of(value, path)


def _parsed(text: str, where: str) -> Any:
    """A JSON text, its numbers as they are written, NaN as null. JSONDecodeError for what is none."""
    try:
        return json.loads(text, parse_float=Number, parse_int=_whole, parse_constant=_constant)
    except RecursionError:
        raise DataError(
            f"{where}: lists or objects nested deeper than any data is. Write flat rows."
        ) from None


class Number(float):
    """A number with a fraction or an exponent, and how the file writes it: as a label, 1.10 is not 1.1."""

    def __new__(cls, written: str) -> Number:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) < 19 else digits  # what does not fit 64 bits is kept as it is written


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def _jsonl(text: io.TextIOBase, path: Path) -> Iterator[Raw]:
    for number, line in enumerate(text, 1):
        if number == 1:
            line = line.lstrip("\ufeff")  # a second byte order mark
        if not line.strip():
            continue
        try:
            value = _parsed(line.rstrip("\r\n"), f"{path}, line {number}")
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip()[0] == "[":  # a list over several lines, under the name of .jsonl
                yield from _json(io.StringIO(line + text.read()), path)
                return
            raise _not_json(path, error, number) from None
        if isinstance(value, list) and number == 1:
            yield from _rows_of(value, path)
        elif isinstance(value, dict):
            yield value
        else:
            raise DataError(
                f"{path}, line {number}: {_kind(value)} instead of an object. Write one object a line."
            )


def _rows_of(document: object, path: Path) -> Iterator[Raw]:
    """Rows of a parsed json file: a list, or an object that holds one list of objects under any name."""
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list) and value]
        lists = [value for value in lists if isinstance(value[0], dict)] or lists
        if len(lists) != 1:
            raise DataError(
                f"{path} holds an object with {len(lists)} lists of rows ({', '.join(map(repr, document)) or 'empty'}); "
                'wanted a list of objects, or {"data": [...]}. Save the rows as such a list, or as jsonl.'
            )
        document = lists[0]
    if not isinstance(document, list):
        raise DataError(
            f"{path} holds {_kind(document)}; wanted a list of objects. Save the rows as such a list."
        )
    for number, entry in enumerate(document):
        if isinstance(entry, str):
            yield {"text": entry}
        elif isinstance(entry, dict):
            yield entry
        else:
            raise DataError(
                f"{path}, entry {number}: {_kind(entry)} instead of an object. Make every row an object."
            )


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _not_json(path: Path, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(
        f"{path}, line {line}, column {error.colno}: not JSON ({error.msg}). Mend or remove that line."
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. DataError for a small file that unpacks to more than data ever does."""
    opener = _COMPRESSED.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            yield file
        return
    limit = max(_UNPACKED_BYTES, _UNPACKED_RATIO * path.stat().st_size)
    with opener(path, "rb") as packed, io.BufferedReader(_Bounded(packed, limit, path)) as unpacked:
        yield cast(BinaryIO, unpacked)


class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes."""

    def __init__(self, stream: BinaryIO, limit: int, path: Path) -> None:
        self._stream, self._left, self._limit, self._path = stream, limit, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        self._left -= len(chunk)
        if self._left < 0:
            raise DataError(
                f"{self._path} unpacks to more than {self._limit / 1e6:,.0f} MB, over {_UNPACKED_RATIO} times its size, "
                "as no file of text does. Unpack it yourself if it is meant so."
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _undecodable(path: Path, encoding: str | None, error: UnicodeError) -> str:
    what = f"data.encoding {encoding}" if encoding else "the encoding that its first bytes show"
    at = f" (byte 0x{error.object[error.start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
    advice = (
        "Leave data.encoding out to have it detected, or set the right one"
        if encoding
        else "Set data.encoding"
    )
    return f"{path} does not fit {what}{at}: {error.args[-1]}. {advice}, for example latin-1."
