"""One writer a folder: a lock that names its owner and ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softprompt.errors import SaveError

RUN, SAVE = ".softprompt.lock", ".softprompt.save.lock"
POLL_SECONDS = 0.02

_patience: ContextVar[float] = ContextVar("_patience", default=0.0)


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Every lock waits at least `seconds` for its present owner: one that is expected to end, since its work was given to
    another process."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


class FolderLock:
    """The right to write into a folder, for one process at a time.

    The operating system holds the lock (flock) and drops it when the process ends, so a killed owner is never in the
    way. The file says who owns it: process, host and since when. Where a file system has no locks, that record decides
    by itself, and an owner that is dead on this host is passed over.
    """

    def __init__(self, folder: Path, doing: str, name: str = RUN) -> None:
        self.path, self.doing = folder / name, doing
        self._descriptor: int | None = None

    def take(self, wait_seconds: float = 0.0) -> None:
        """Becomes the owner, unless it is, after at most `wait_seconds` or those of `patient`. Raises SaveError that names the
        present owner."""
        if self._descriptor is not None:
            return
        until = time.monotonic() + max(wait_seconds, _patience.get())
        while not self._try():
            if time.monotonic() >= until:
                raise SaveError(
                    f"{self.path.parent}: {_named(_owner(self.path))} is writing there. Wait until it ends, or choose "
                    "another folder."
                )
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Gives the lock back; nothing happens without it."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # the folder may be gone
            self.path.unlink()  # while still locked: whoever opened it before sees that it is another file now
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> FolderLock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _try(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise SaveError(
                f"{self.path.parent}: cannot be written to ({error.strerror or error}). Choose another folder."
            ) from error
        try:
            if not _lock(descriptor, self.path) or not _same_file(descriptor, self.path):
                os.close(descriptor)
                return False
        except BaseException:
            os.close(descriptor)
            raise
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "doing": self.doing,
        }
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its record
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(owner).encode())
        self._descriptor = descriptor
        return True


@contextlib.contextmanager
def locked(folder: Path, doing: str, *, name: str = RUN, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder that exists. Raises SaveError."""
    lock = FolderLock(folder, doing, name)
    lock.take(wait_seconds)
    try:
        yield
    finally:
        lock.release()


def _lock(descriptor: int, path: Path) -> bool:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # this file system has no locks
            pass
    owner = _owner(path)
    return not owner or not _lives(owner)


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether the locked file still has its name: the owner before may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner may still run; of another host, nothing is known."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return (
        f"another process ({owner.get('doing')}: process {owner.get('pid')} on {owner.get('host')}, since "
        f"{owner.get('since')})"
    )
