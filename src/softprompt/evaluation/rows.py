"""One judged row, and the file that keeps every one of them: a run that was killed goes on where it was.

No torch here, so that a report can read rows without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from softprompt.errors import DataError, SaveError
from softprompt.store.atomic import replace_file

ROWS, SUMMARY = "rows.jsonl", "evaluation.json"


@dataclass(frozen=True)
class Row:
    """What was wanted of one example and what came of it.

    `index` counts the judged examples, `row` is its place in the source. `said` is the generated text, or the label
    of highest score; None where nothing was asked to be said. `nll` sums the loss of the wanted text in nats over
    `tokens` tokens, which stand for `text_bytes` UTF-8 bytes; nan where it was not measured. `scores` holds every
    label's log-probability where labels were ranked.
    """

    index: int
    row: int
    input: str
    wanted: str
    said: str | None = None
    nll: float = math.nan
    tokens: int = 0
    text_bytes: int = 0
    new_tokens: int = 0
    finish_reason: str = ""
    scores: Mapping[str, float] | None = None

    def to_json(self) -> str:
        """One line; a figure that is not known is null."""
        values = asdict(self)
        if not math.isfinite(self.nll):
            values["nll"] = None
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        values: Any = json.loads(line)
        if not isinstance(values, dict) or not {"index", "wanted"} <= set(values):
            raise ValueError("not a judged row")
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        if values.get("nll") is None:
            values["nll"] = math.nan
        return cls(**values)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file in the order of their index. Raises DataError for a file that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: the judged rows cannot be read ({error.strerror}). Run the evaluation again."
        ) from error
    found = {row.index: row for row in _whole(lines)}
    if not found:
        raise DataError(f"{path}: there is no judged row in it. Run the evaluation again.")
    return [found[index] for index in sorted(found)]


def _whole(lines: Iterable[str]) -> Iterator[Row]:
    """Rows of all lines that were written to their end: a kill leaves at most the last one unfinished."""
    for line in lines:
        try:
            yield Row.from_json(line)
        except (ValueError, TypeError):
            continue


class RowFile:
    """Rows on disk as they come. `known` are those of a former, unfinished run of the same evaluation.

    `digest` stands for everything that a row depends on. Rows of another digest are refused, not mixed in.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        self.path = folder / ROWS
        self.known: dict[int, Row] = {}
        former = _former_digest(folder)
        if former is not None and former != digest:
            raise DataError(
                f"{folder}: holds the rows of another evaluation (another base, prompt, data or way of answering). "
                "Choose another folder, or delete this one to start afresh."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if former is not None and self.path.exists():
                self.known = {row.index: row for row in _whole(self.path.read_text("utf-8").splitlines())}
            write_json(folder / SUMMARY, {"digest": digest, "complete": False})
            # Written afresh, so that an unfinished last line is gone.
            text = "".join(row.to_json() + "\n" for _, row in sorted(self.known.items()))
            replace_file(self.path, text)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise SaveError(
                f"{folder}: rows cannot be kept there ({error.strerror}). Choose another folder with --out."
            ) from error

    def add(self, rows: Iterable[Row]) -> None:
        """Append, and see that it is on its way to the disk."""
        try:
            self._file.writelines(row.to_json() + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        """Close the file; what was added stays."""
        self._file.close()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that a reader finds the old file or the new one, never half of it."""
    replace_file(path, json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a figure that is not known becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _former_digest(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / SUMMARY).read_text("utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
