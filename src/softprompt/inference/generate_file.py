"""Every row of a file continued, in the file's order: rows that are done are kept, and never written again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from softprompt.base.from_settings import kept_base, settings_of
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.workers import HERE, Tell, Workers
from softprompt.data.example import Example
from softprompt.data.source import load_splits
from softprompt.errors import DataError, SaveError
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.generate import generate, shown
from softprompt.inference.request import request
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.bar import Advance, progress_bar
from softprompt.prompt.soft_prompt import Fingerprint, Prompt
from softprompt.settings.base_settings import BaseSettings
from softprompt.store.atomic import replace_file, replaced_file
from softprompt.store.digest import digest_of
from softprompt.store.json_values import plain
from softprompt.store.lock import FolderLock
from softprompt.store.ownership import check_replaceable, claim, folder_named, make_folder
from softprompt.store.plain_file import read_text

ANSWERS, ABOUT = "answers.jsonl", "generation.json"
CHUNK = 64  # rows between two writes: at most so many are lost in a kill
SCHEMA = 2

Line = dict[str, Any]


@dataclass(frozen=True)
class FileAnswers:
    """The continued rows of a file: `path` holds a JSON object for each, `reused` of them from an earlier run.

    `failed` rows could not be continued, for instance because they do not fit the base: their lines hold an `error`."""

    path: Path
    rows: int
    lines: int
    reused: int
    failed: int = 0


def generate_file(
    lm: FrozenLM,
    source: str | Path,
    out: str | Path,
    prompts: Sequence[Prompt] = (),
    settings: DecodeSettings | None = None,
    *,
    with_base: bool | None = None,
    workers: Workers = HERE,
    progress: bool | Advance | None = None,
) -> FileAnswers:
    """Continues every row of `source` under each prompt (and the base, `with_base` or without a prompt), in order, and
    leaves a line for each continuation in `out`/answers.jsonl. The same call continues after an interruption.

    Raises DataError where the file cannot be read, or its first row not be laid out, SaveError where `out` holds other answers."""
    settings = settings or DecodeSettings()
    examples = load_splits(str(source), validation=0, test=0).train
    answering = AnswersOfRows(
        BaseSettings() if workers.are_here else settings_of(lm),
        lm.fingerprint,
        tuple(prompts),
        not prompts if with_base is None else with_base or not prompts,
        settings,
    )
    _held[answering.key] = (lm, answering.compiled(lm))
    answering.demand_fitting(examples[0] if examples else None)
    kept = _AnswerFile(folder_named(out), answering.digest(examples), answering.lines_each)
    try:
        reused = done = kept.rows_done()
        with progress_bar(progress, "generating") as advance:
            advance(done, len(examples))
            # An answer may depend on the rows that it is read with, where two tokens are as likely to the last digits. So
            # rows are read in the same chunks after an interruption, and what is there already is not written again.
            first = done - done % CHUNK if done < len(examples) else done
            starts = range(first, len(examples), CHUNK)
            chunks = (list(examples[start : start + CHUNK]) for start in starts)
            for start, lines in zip(starts, workers.map(partial(_answered, answering), chunks), strict=True):
                done = min(start + CHUNK, len(examples))
                rows = [row for row in range(start, done) for _ in range(answering.lines_each)]
                kept.add({"row": row, **line} for row, line in zip(rows, lines, strict=True) if row >= reused)
                advance(done, len(examples))
        kept.end(len(examples))
    finally:
        kept.close()
        _held.clear()
    return FileAnswers(kept.path, len(examples), len(examples) * answering.lines_each, reused, kept.failed)


_held: dict[str, tuple[FrozenLM, list[CompiledPrompt]]] = {}
"""The base and the compiled prompts that this process answers with, by their key."""


@dataclass(frozen=True)
class AnswersOfRows:
    """What continues rows, as plain data that can be sent to another process, which loads the base and compiles once."""

    base: BaseSettings
    fingerprint: Fingerprint
    prompts: tuple[Prompt, ...]
    with_base: bool
    settings: DecodeSettings
    key: str = field(default_factory=lambda: token_hex(8))

    @property
    def lines_each(self) -> int:
        """Continuations of each row."""
        return (len(self.prompts) + self.with_base) * self.settings.n

    def __call__(self, examples: Sequence[Example]) -> list[Line]:
        """A line for each continuation, in the order of the rows, then of the base and the prompts.

        A row that cannot be continued has lines with an error in their place, and hinders no other."""
        if self.key not in _held:
            lm = kept_base(self.base, self.fingerprint)
            _held.clear()
            _held[self.key] = (lm, self.compiled(lm))
        try:
            return self._continued(examples)
        except DataError:
            problems = [self._problem(example) for example in examples]
            if not any(problems):
                raise
        able = [example for example, problem in zip(examples, problems, strict=True) if problem is None]
        lines = iter(self._continued(able))
        return [
            next(lines) if problem is None else {**line, "error": problem}
            for example, problem in zip(examples, problems, strict=True)
            for line in self._without_text(example)
        ]

    def _problem(self, example: Example) -> str | None:
        """Why a row cannot be continued; None where it can."""
        lm, columns = _held[self.key]
        try:
            for column in columns:
                request(lm, column, example, self.settings)
        except DataError as error:
            return str(error)
        return None

    def _without_text(self, example: Example) -> list[Line]:
        """The lines of a row that has no continuations."""
        _, columns = _held[self.key]
        return [
            {"prompt": column.name, "input": shown(example), "sample": sample}
            for column in columns
            for sample in range(self.settings.n)
        ]

    def _continued(self, examples: Sequence[Example]) -> list[Line]:
        lm, columns = _held[self.key]
        generations = generate(
            lm,
            [example for example in examples for _ in columns],
            [column for _ in examples for column in columns],
            self.settings,
            progress=False,
        )
        return [
            {
                name: value
                for name, value in generation.to_record().items()
                if name != "token_ids" and (name != "log_probability" or value is not None)
            }
            for generation in generations
        ]

    def compiled(self, lm: FrozenLM) -> list[CompiledPrompt]:
        """The base, if wanted, in the layout of the first prompt, and then each prompt."""
        columns = [compile_prompt(lm, prompt) for prompt in self.prompts]
        if self.with_base:
            layout = columns[0].template if columns else None
            special_tokens = bool(columns) and columns[0].special_tokens
            columns.insert(0, compile_prompt(lm, None, template=layout, special_tokens=special_tokens))
        return columns

    def demand_fitting(self, example: Example | None) -> None:
        """Raises DataError where the first row cannot be laid out, before anything is written."""
        if example is None:
            raise DataError("There is no row to continue. Name a file that has some.")
        lm, columns = _held[self.key]
        for column in columns:
            column.marks(lm, example)

    def digest(self, examples: Sequence[Example]) -> str:
        """Stands for all that the answers depend on."""
        about = [
            self.fingerprint.digest,
            str(_held[self.key][0].dtype),
            [digest_of(prompt) for prompt in self.prompts],
            self.with_base,
            self.settings.model_dump(),
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for example in examples:
            digest.update(json.dumps([dict(example.fields), repr(example.messages)], sort_keys=True).encode())
        return digest.hexdigest()


def _answered(answering: AnswersOfRows, examples: Sequence[Example], tell: Tell) -> list[Line]:
    return answering(examples)


class _AnswerFile:
    """Answers on disk, appended a chunk at a time. Of a row that was written in part, nothing is kept."""

    def __init__(self, folder: Path, digest: str, lines_each: int) -> None:
        self.digest, self.lines_each = digest, lines_each
        self._failed: set[int] = set()
        self.folder = check_replaceable(folder, (ANSWERS, ABOUT), kind="answers")
        self.path = self.folder / ANSWERS
        former = self._former_digest()
        if former is not None and former != digest:
            raise DataError(
                f"{folder}: holds other answers (of another file, base, prompt or other settings). Choose another folder, or "
                "delete this one to start again."
            )
        make_folder(self.folder)
        claim(self.folder, "answers", (ANSWERS, ABOUT))
        self._lock = FolderLock(self.folder, "generating")
        self._lock.take()
        try:
            replace_file(
                self.folder / ABOUT, json.dumps({"schema": SCHEMA, "digest": digest, "complete": False})
            )
            lines = self._whole_lines() if former is not None and self.path.exists() else []
            self._rows = len(lines) // lines_each
            for line in lines[: self._rows * lines_each]:
                self._count(json.loads(line))
            with replaced_file(self.path) as fresh:
                fresh.writelines(lines[: self._rows * lines_each])
            self._file = self.path.open("ab")
        except OSError as error:
            self._lock.release()
            raise SaveError(
                f"{folder}: answers cannot be kept there ({error.strerror}). Choose another folder with --out."
            ) from error

    @property
    def failed(self) -> int:
        """Rows that could not be continued, those of an earlier run among them."""
        return len(self._failed)

    def _count(self, line: Line) -> None:
        if "error" in line:
            self._failed.add(line["row"])

    def rows_done(self) -> int:
        """Rows of an earlier run."""
        return self._rows

    def add(self, lines: Iterator[Line]) -> None:
        """Appends lines, and flushes them. Raises SaveError."""
        try:
            for line in lines:
                self._count(line)
                self._file.write(json.dumps(plain(line)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def end(self, rows: int) -> None:
        """Notes that all rows are there."""
        record = {"schema": SCHEMA, "digest": self.digest, "complete": True, "rows": rows}
        replace_file(self.folder / ABOUT, json.dumps(record))

    def close(self) -> None:
        """Gives the folder free; what was added stays."""
        self._file.close()
        self._lock.release()

    def _former_digest(self) -> str | None:
        try:
            return str(json.loads(read_text(self.folder / ABOUT))["digest"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _whole_lines(self) -> list[bytes]:
        """The lines that were written to their end, up to the first that was not."""
        lines: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or record.get("row") != len(lines) // self.lines_each:
                break
            lines.append(line)
        return lines
