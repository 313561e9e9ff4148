"""Files that may come from anyone, read within bounds: never a pipe, a device or a socket, and never without end."""

from __future__ import annotations

import errno
from pathlib import Path

LARGEST = 2**28  # bytes of a record, a text or a list of keys; those of softprompt take megabytes at most


def read_plain(path: Path, most_bytes: int = LARGEST) -> bytes:
    """The bytes of a file. Raises OSError, at once, for what is no plain file or larger than `most_bytes`."""
    demand_plain(path)
    size = path.stat().st_size
    if size > most_bytes:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most_bytes:,} are read", str(path))
    with path.open("rb") as file:
        return file.read(most_bytes)  # what grew in the meantime is cut


def demand_plain(path: Path) -> None:
    """Raise OSError for a pipe, a device or a socket, whose reading may never end, and for a folder."""
    if path.exists() and not path.is_file():
        kinds = {
            "is_dir": "a folder",
            "is_fifo": "a named pipe",
            "is_socket": "a socket",
        }
        kind = next((kind for test, kind in kinds.items() if getattr(path, test)()), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, wanted a file", str(path))
