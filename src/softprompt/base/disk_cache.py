"""What stays on this machine between processes: the user's cache folder, small tables in it, digests of files.

Nothing here is needed: without a folder to write to, everything is measured or computed again in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from softprompt.store.atomic import replace_file

MAX_ENTRIES = 1000  # of one table; the oldest go first
SETTLED_SECONDS = 2.0  # a file changed this recently could change again without its times showing it
DIGESTS = "digests.json"


def cache_folder() -> Path:
    """The user's cache folder for softprompt: $XDG_CACHE_HOME/softprompt, or ~/.cache/softprompt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softprompt"


def read_table(name: str) -> Mapping[str, Any]:
    """The entries of a table; empty where there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        table = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
        if isinstance(table, dict):
            return table
    return {}


def remember(name: str, key: str, value: Any) -> None:
    """Add one entry to a table. A folder that cannot be written is passed over."""
    table = {**read_table(name), key: value}
    for oldest in list(table)[:-MAX_ENTRIES]:
        del table[oldest]
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        replace_file(cache_folder() / name, json.dumps(table, indent=2))


def file_sha256(path: Path) -> str:
    """Digest of a file's content, computed once for as long as the file stays as it is."""
    return digest_of_files([path], "content", lambda: _content_sha256(path))


def digest_of_files(files: Iterable[Path], what: str, compute: Callable[[], str]) -> str:
    """The digest that `compute` makes of these files; `what` names the way it is made.

    It is kept under the files' names, sizes and times, to the nanosecond. Files that changed just now are not kept:
    a second change within one tick of the clock would not show."""
    stats = [(os.path.realpath(path), os.stat(path)) for path in files]
    key = hashlib.sha256(
        json.dumps(
            [what, *((path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats)]
        ).encode()
    ).hexdigest()
    kept = read_table(DIGESTS).get(key)
    if isinstance(kept, str):
        return kept
    digest = compute()
    if all(time.time() - max(s.st_mtime, s.st_ctime) > SETTLED_SECONDS for _, s in stats):
        remember(DIGESTS, key, digest)
    return digest


def _content_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
