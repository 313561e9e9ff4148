"""What every machine of a cluster must have in common: the version of softprompt, and the files that work is done on."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import softprompt
from softprompt.errors import ClusterError
from softprompt.store.ownership import MARKER


@dataclass(frozen=True)
class Site:
    """What a worker must have in common with the process that hands out the work."""

    working_folder: str
    version: str
    folder: str | None
    marker: bytes | None

    @classmethod
    def here(cls, folder: Path | None) -> Site:
        """This process' own."""
        marker = None if folder is None else _marker(folder)
        return cls(os.getcwd(), softprompt.__version__, None if folder is None else str(folder), marker)

    def enter(self) -> None:
        """Works where the other process does. Raises ClusterError on a machine that does not see its files."""
        machine = socket.gethostname()
        if softprompt.__version__ != self.version:
            raise ClusterError(
                f"{machine} has softprompt {softprompt.__version__}, this process {self.version}. Install one version on all "
                "machines of the cluster."
            )
        try:
            os.chdir(self.working_folder)
        except OSError as error:
            raise ClusterError(
                f"{machine}: the working folder {self.working_folder} cannot be entered there ({error.strerror}). Work in a folder "
                "that all machines of the cluster share under one path."
            ) from None
        if self.folder is not None and _marker(Path(self.folder)) != self.marker:
            raise ClusterError(
                f"{machine} sees another folder as {self.folder} than this process. Write into a folder that all machines of the "
                "cluster share under one path."
            )


def _marker(folder: Path) -> bytes | None:
    try:
        return (folder / MARKER).read_bytes()
    except OSError:
        return None
