"""Files that anyone may have written, read within bounds: no pipe, device or socket, and nothing without an end."""

from __future__ import annotations

import errno
from pathlib import Path

LARGEST = 2**28  # bytes of a record or a text; softprompt's own take megabytes at most


class NotPlain(OSError):
    """Something else than a file of a bearable size; as text its reason alone, since messages name the path."""

    def __str__(self) -> str:
        return str(self.strerror)


def read_text(path: Path, most_bytes: int = LARGEST) -> str:
    """The UTF-8 text of a file. Raises OSError as `read_bytes` does, UnicodeDecodeError for other text."""
    return read_bytes(path, most_bytes).decode("utf-8")


def read_bytes(path: Path, most_bytes: int = LARGEST) -> bytes:
    """The bytes of a file. Raises OSError: NotPlain, before anything is read, for what is no plain file or is larger."""
    demand_plain(path)
    size = path.stat().st_size
    if size > most_bytes:
        raise NotPlain(errno.EFBIG, f"it has {size:,} bytes, and at most {most_bytes:,} are read", str(path))
    with path.open("rb") as file:
        return file.read(size)  # what grows in the meantime, as files of /proc may, is left


def demand_plain(path: Path) -> None:
    """Raises NotPlain for a folder, and for a pipe, a device or a socket, whose reading may never end."""
    kind = special_kind(path)
    if kind is not None:
        raise NotPlain(errno.EINVAL, f"it is {kind}, wanted a file", str(path))


def special_kind(path: Path) -> str | None:
    """What a path is that exists and is no plain file; None for a file, and where nothing is."""
    if path.is_file() or not path.exists():
        return None
    kinds = {"is_dir": "a folder", "is_fifo": "a named pipe", "is_socket": "a socket"}
    return next((kind for test, kind in kinds.items() if getattr(path, test)()), "a device")
