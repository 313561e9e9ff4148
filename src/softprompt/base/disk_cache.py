"""Files kept on this machine between processes: the user's cache folder, small tables in it, digests of files.

Nothing here is needed: without a folder to write to, everything is measured or computed again in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from softprompt.store.atomic import replace_file
from softprompt.store.plain_file import read_text

MAX_ENTRIES = 1000  # of one table; the oldest go first
SETTLED_SECONDS = 2.0  # a file changed this recently could change again without its times showing it
DIGESTS = "digests.json"


def cache_folder() -> Path:
    """The user's cache folder for softprompt, where this system keeps such: ~/.cache/softprompt on Linux."""
    return platformdirs.user_cache_path("softprompt", appauthor=False)


def read_table(name: str) -> Mapping[str, Any]:
    """The entries of a table; empty if there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        table = json.loads(read_text(cache_folder() / name))
        if isinstance(table, dict):
            return table
    return {}


def remember(name: str, key: str, value: Any) -> None:
    """Adds one entry to a table. A folder that cannot be written is passed over."""
    table = {**read_table(name), key: value}
    for oldest in list(table)[:-MAX_ENTRIES]:
        del table[oldest]
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        replace_file(cache_folder() / name, json.dumps(table, indent=2))


@dataclass(frozen=True)
class Stamp:
    """A snapshot of files: names, sizes and times to the nanosecond; not `settled` if one changed only just now."""

    key: str
    settled: bool

    @classmethod
    def of(cls, files: Iterable[Path]) -> Stamp:
        """Must be taken before the files are read: a change in the meantime then belongs to another stamp."""
        stats = [(os.path.realpath(path), os.stat(path)) for path in sorted(files)]
        newest = max((max(stat.st_mtime, stat.st_ctime) for _, stat in stats), default=0.0)
        rows = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
        return cls(json.dumps(rows), bool(stats) and time.time() - newest > SETTLED_SECONDS)


def kept_digest(stamp: Stamp | None, what: str, compute: Callable[[], str]) -> str:
    """The digest that `compute` makes of these files, or made of them earlier; `what` names the way it is made."""
    if stamp is None:
        return compute()
    key = hashlib.sha256(f"{what} {stamp.key}".encode()).hexdigest()
    digest = read_table(DIGESTS).get(key)
    if not isinstance(digest, str):
        digest = compute()
        if stamp.settled:
            remember(DIGESTS, key, digest)
    return digest


def file_sha256(path: Path) -> str:
    """Digest of a file's content, computed once for as long as the file stays as it is."""
    return kept_digest(Stamp.of([path]), "content", lambda: _content_sha256(path))


def _content_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
