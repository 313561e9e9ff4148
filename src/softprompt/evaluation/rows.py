"""A judged row, and the file that keeps all of them, so that an interrupted evaluation can continue.

No torch here, so that a report can read rows without it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, BinaryIO, cast, overload

from pydantic import AliasChoices, Field

from softprompt.errors import DataError, SaveError
from softprompt.evaluation.record import SCHEMA, Value, typed, write_json
from softprompt.store.atomic import replaced_file
from softprompt.store.json_values import plain
from softprompt.store.lock import FolderLock
from softprompt.store.ownership import check_replaceable, claim, make_folder
from softprompt.store.plain_file import demand_plain, read_text

ROWS, SUMMARY = "rows.jsonl", "evaluation.json"
IN_MEMORY_BYTES = (
    32 * 2**20
)  # of rows as lines of JSON; more are read from their file when they are asked for
LONGEST_LINE = 2**26  # bytes; no row of ours is longer
MOST_ROWS = 2**40


@dataclass(frozen=True, slots=True)
class Row:
    """One judged example: its input, the wanted text, and the answer.

    `wanted` is the wanted text as the base's tokenizer can write it: an answer is compared with nothing else.
    `index` counts the judged examples, `row` is its number in the source. `answer` is the generated text, or the label
    of highest score; None where only the loss was measured. `nll` sums the loss of the wanted text in nats over
    `tokens` tokens, which stand for `text_bytes` UTF-8 bytes; nan where it was not measured. `scores` holds every
    label's log-probability where labels were ranked. Where several rows ask the same, `references` holds all their
    wanted texts, and all but the first are `repeated`: BLEU and chrF count the input once, against all references.
    """

    index: int
    row: int
    input: str
    wanted: str
    answer: Annotated[str | None, Field(validation_alias=AliasChoices("answer", "said"))] = (
        None  # said: in 0.1
    )
    nll: Value = math.nan
    tokens: int = 0
    text_bytes: int = 0
    new_tokens: int = 0
    finish_reason: str = ""
    scores: Mapping[str, Value] | None = None
    references: tuple[str, ...] = ()
    repeated: bool = False

    def to_json(self) -> str:
        """The row as one line of JSON; an unknown figure is null."""
        return json.dumps(plain(asdict(self)), ensure_ascii=False)

    def to_line(self) -> bytes:
        """The line as it is written to a file; half a surrogate pair, which UTF-8 has not, is escaped."""
        try:
            return self.to_json().encode() + b"\n"
        except UnicodeEncodeError:
            return json.dumps(plain(asdict(self))).encode() + b"\n"

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Reads what `to_json` wrote, in this version or in 0.1. Raises ValueError for anything else."""
        row = typed(cls, json.loads(line), "a judged row")
        if not 0 <= row.index < MOST_ROWS:
            raise DataError(f"a judged row: index: found {row.index}, wanted a count of rows.")
        return row


class RowsInFile(Sequence[Row]):
    """Judged rows that stay in their file: each is read when it is asked for, so that a million take 8 MB here.

    `starts` says where in the file the line of every row begins. The file stays open, so these rows stay as they are
    when another file takes its name."""

    def __init__(self, file: BinaryIO, starts: array[int]) -> None:
        self._file, self._starts = file, starts
        self._lock = threading.Lock()
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...

    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            return tuple(map(self.__getitem__, range(*index.indices(len(self)))))
        start = self._starts[index]
        with self._lock:
            self._file.seek(start)
            line = self._file.readline()
        return Row.from_json(line.decode())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (RowsInFile, tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[tuple[Row, ...]], tuple[list[Row]]]:
        """Copied and pickled as a tuple of its rows, since an open file belongs to its process."""
        return tuple, (list(self),)

    def __repr__(self) -> str:
        return f"RowsInFile({len(self):,})"


class RowLines:
    """A file of rows, a line each, and where the line of each begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._taken = False
        self._indices, self._starts = array("q"), array("q")

    def read(self) -> Iterator[Row]:
        """Every row that was written to its end, from the start of the file: a kill leaves at most the last unfinished.

        A line ends at \\n alone: U+2028, U+0085 and their like are text, which JSON does not escape."""
        self._file.seek(0)
        start = 0
        while line := self._file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line in it has more than {LONGEST_LINE:,} bytes")
            try:
                row = Row.from_json(line.decode())
            except (ValueError, TypeError, RecursionError):
                pass
            else:
                self._note(row, start)
                yield row
            start += len(line)

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows and flushes them. Raises OSError."""
        start = self._file.seek(0, io.SEEK_END)
        for row in rows:
            line = row.to_line()
            self._file.write(line)
            self._note(row, start)
            start += len(line)
        self._file.flush()

    def rows(self) -> Sequence[Row]:
        """All of them in the order of their index, of several with one index the last: few are read into memory."""
        starts = self._starts
        if any(before >= after for before, after in pairwise(self._indices)):
            last = dict(zip(self._indices, starts, strict=True))
            starts = array("q", (last[index] for index in sorted(last)))
        self._taken = True
        rows = RowsInFile(self._file, starts)
        return rows if self._file.seek(0, io.SEEK_END) > IN_MEMORY_BYTES else tuple(rows)

    def close(self) -> None:
        """Closes the file, unless `rows` reads from it; what was added stays."""
        if not self._taken:
            with contextlib.suppress(OSError):  # a full disk was said when rows were added
                self._file.close()

    def _note(self, row: Row, start: int) -> None:
        self._indices.append(row.index)
        self._starts.append(start)


def read_rows(path: Path) -> Sequence[Row]:
    """All rows of a file in the order of their index. Raises DataError for a file that holds none."""
    try:
        demand_plain(path)
        lines = RowLines(path.open("rb"))
        try:
            for _ in lines.read():  # finds where each begins
                pass
            rows = lines.rows()
        finally:
            lines.close()
    except OSError as error:
        raise DataError(
            f"{path}: the judged rows cannot be read ({error.strerror}). Run the evaluation again."
        ) from None
    if not rows:
        raise DataError(f"{path}: there is no judged row in it. Run the evaluation again.")
    return rows


class RowsWithoutFolder:
    """Rows kept when no folder is named: in memory while they are small, then in a temporary file."""

    def __init__(self) -> None:
        self._lines = RowLines(cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)))  # noqa: SIM115

    def judged(self) -> Iterator[Row]:
        """Rows of an earlier run: none."""
        return iter(())

    def add(self, rows: Iterable[Row]) -> None:
        """Appends `rows`. Raises SaveError."""
        try:
            self._lines.add(rows)
        except OSError as error:
            raise SaveError(
                f"{tempfile.gettempdir()}: the judged rows do not fit there ({error.strerror}). Keep them in a folder "
                "(--out), or free some space."
            ) from error

    def rows(self) -> Sequence[Row]:
        """All rows."""
        return self._lines.rows()

    def close(self) -> None:
        """Forgets the rows, unless `rows` gave them."""
        self._lines.close()


class RowFile:
    """Rows on disk, appended as they are judged. `judged` gives those of an earlier, unfinished run of the same evaluation.

    `digest` covers everything that a row depends on. A folder with rows of another digest is refused, not mixed.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        self.path = folder / ROWS
        former = _former_digest(folder)
        if former is not None and former != digest:
            raise DataError(
                f"{folder}: holds the rows of another evaluation (another base, prompt, data or way of answering). "
                "Choose another folder, or delete this one to start again."
            )
        folder = check_replaceable(folder, (ROWS, SUMMARY), kind="evaluation")
        make_folder(folder)
        claim(folder, "evaluation", (ROWS, SUMMARY))
        self._lock = FolderLock(folder, "an evaluation")
        self._lock.take()
        try:
            write_json(folder / SUMMARY, {"schema": SCHEMA, "digest": digest, "complete": False})
            # Rewritten, so that an unfinished last line is gone.
            with replaced_file(self.path) as fresh:
                if former is not None and self.path.exists():
                    with self.path.open("rb") as former_file:
                        fresh.writelines(row.to_line() for row in RowLines(former_file).read())
            self._lines = RowLines(self.path.open("r+b"))
        except OSError as error:
            self._lock.release()
            raise SaveError(
                f"{folder}: rows cannot be kept there ({error.strerror}). Choose another folder with --out."
            ) from error

    def judged(self) -> Iterator[Row]:
        """The rows of an earlier run, read once before any is added."""
        return self._lines.read()

    def add(self, rows: Iterable[Row]) -> None:
        """Appends `rows` and flushes them to the file. Raises SaveError."""
        try:
            self._lines.add(rows)
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def rows(self) -> Sequence[Row]:
        """All rows, those of the earlier run too."""
        return self._lines.rows()

    def close(self) -> None:
        """Gives the folder free for other processes; what was added stays."""
        self._lines.close()
        self._lock.release()


def _former_digest(folder: Path) -> str | None:
    try:
        return str(json.loads(read_text(folder / SUMMARY))["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
