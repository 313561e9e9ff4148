"""A judged row, and the file that keeps all of them, so that an interrupted evaluation can continue.

No torch here, so that a report can read rows without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from softprompt.errors import DataError, SaveError
from softprompt.evaluation.record import SCHEMA, Value, typed, write_json
from softprompt.store.atomic import replace_file
from softprompt.store.json_values import plain
from softprompt.store.lock import FolderLock
from softprompt.store.ownership import check_replaceable, claim, make_folder

ROWS, SUMMARY = "rows.jsonl", "evaluation.json"


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
    scores: Mapping[str, float] | None = None
    references: tuple[str, ...] = ()
    repeated: bool = False

    def to_json(self) -> str:
        """The row as one line of JSON; an unknown figure is null."""
        return json.dumps(plain(asdict(self)), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Reads what `to_json` wrote, in this version or in 0.1. Raises ValueError for anything else."""
        return typed(cls, json.loads(line), "a judged row")


def read_rows(path: Path) -> list[Row]:
    """All rows of a file in the order of their index. Raises DataError for a file that holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"{path}: the judged rows cannot be read ({reason}). Run the evaluation again."
        ) from None
    rows = {row.index: row for row in _whole(text)}
    if not rows:
        raise DataError(f"{path}: there is no judged row in it. Run the evaluation again.")
    return [rows[index] for index in sorted(rows)]


def _whole(text: str) -> Iterator[Row]:
    """The rows of all lines that were written to their end: a kill leaves at most the last one unfinished.

    A line ends at \\n alone: U+2028, U+0085 and similar are text, which JSON does not escape."""
    for line in text.split("\n"):
        try:
            yield Row.from_json(line)
        except (ValueError, TypeError, RecursionError):
            continue


class RowFile:
    """Rows on disk, appended as they are judged. `judged` holds those of an earlier, unfinished run of the same evaluation.

    `digest` covers everything that a row depends on. A folder with rows of another digest is refused, not mixed.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        self.path = folder / ROWS
        self.judged: dict[int, Row] = {}
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
            if former is not None and self.path.exists():
                self.judged = {row.index: row for row in _whole(self.path.read_text("utf-8"))}
            write_json(folder / SUMMARY, {"schema": SCHEMA, "digest": digest, "complete": False})
            # Rewritten, so that an unfinished last line is gone.
            text = "".join(row.to_json() + "\n" for _, row in sorted(self.judged.items()))
            replace_file(self.path, text)
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            self._lock.release()
            raise SaveError(
                f"{folder}: rows cannot be kept there ({error.strerror}). Choose another folder with --out."
            ) from error

    def add(self, rows: Iterable[Row]) -> None:
        """Appends `rows` and flush them to the file."""
        try:
            self._file.writelines(row.to_json() + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        """Closes the file; what was added stays."""
        self._file.close()
        self._lock.release()


def _former_digest(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / SUMMARY).read_text("utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
