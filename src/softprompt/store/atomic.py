"""Files that are written whole or not at all: first a draft in the same folder, then a rename."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from softprompt.errors import SaveError

ABANDONED_SECONDS = 3600.0  # a draft folder this old belongs to a process that was killed


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes `path` so that a reader finds the old file or the new one, never half of it. Raises OSError."""
    with replaced_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` when the block ends, and is removed when it fails. Raises OSError."""
    draft = draft_path(path.parent, path.name, secrets.token_hex(8))
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_together(
    folder: Path, files: Mapping[str, bytes], mark: str = "", *, without: Sequence[str] = ()
) -> None:
    """Writes all files in full before the first takes its place; then files named `without` are removed, if present.

    Raises SaveError, leaving nothing behind. Once the first has taken its place the others' drafts, named by `mark`,
    stay until they have taken theirs. Drafts of the same files that a killed write left are removed at the end."""
    mark = mark or secrets.token_hex(8)
    drafts = [draft_path(folder, name, mark) for name in files]
    made, whole = not folder.exists(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, content in zip(drafts, files.values(), strict=True):
            _write(draft, content)
        whole = True
        with _interrupts_held():
            for index, (draft, name) in enumerate(zip(drafts, files, strict=True)):
                os.replace(draft, folder / name)
                if index == 0:  # from here on the new files count
                    for former in without:
                        (folder / former).unlink(missing_ok=True)
    except OSError as error:
        if whole and not drafts[0].exists():
            raise SaveError(
                f"{folder}: not every file could be moved to its place ({error.strerror or error}). The prompt was "
                "saved, but PEFT cannot read it. Save it again."
            ) from error
        raise SaveError(
            f"{folder}: could not be written ({error.strerror or error}). What was there before is unchanged. "
            "Free some space or choose another folder."
        ) from error
    finally:
        if not whole or drafts[0].exists():
            for draft in drafts:
                draft.unlink(missing_ok=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    sweep_drafts(folder, files)


def sweep_drafts(folder: Path, names: Iterable[str] = ("*",), *, keep: str = "") -> None:
    """Removes the drafts of `names` (glob patterns) that killed writes left, all but those of the mark `keep`.

    Only for the one writer of these files: a draft that is just being written looks the same."""
    for name in names:
        for draft in folder.glob(draft_path(folder, name if name == "*" else glob.escape(name), "*").name):
            if not (keep and draft.name.endswith(f".{keep}.draft")):
                with contextlib.suppress(OSError):
                    draft.unlink()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft folder to fill, which takes its place as `folder` when the block ends, and is removed when it fails.

    Where another process was first, its folder stays. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for former in folder.parent.glob(f".{folder.name}.*.draft"):
        with contextlib.suppress(OSError):
            if time.time() - former.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(former)
    draft = draft_path(folder.parent, folder.name, secrets.token_hex(8))
    draft.mkdir()
    try:
        yield draft
        for path in filter(Path.is_file, draft.rglob("*")):
            path.chmod(draft.stat().st_mode & 0o666)  # some libraries write for their owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            os.rename(draft, folder)
        except OSError:
            if not (folder.is_dir() and any(folder.iterdir())):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draft_path(folder: Path, name: str, mark: str) -> Path:
    """The path of a file's draft."""
    return folder / f".{name}.{mark}.draft"


def _write(draft: Path, content: bytes) -> None:
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C until after the block: between two renames it would leave new files beside old ones."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    came: list[int] = []
    former = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former if former is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(signal.SIGINT)
