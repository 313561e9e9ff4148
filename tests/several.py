"""Several processes of one program on this machine, as torchrun starts them: by their environment."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence

from forked import Process, begun


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started(count: int, command: Sequence[str], *, anew: bool = False) -> Iterator[list[Process]]:
    """Starts `command` (python's arguments) `count` times; the processes find each other through gloo, and end with the context.

    With `anew` each imports all that it needs itself, as a user's do."""
    port = free_port()
    processes: list[Process] = []
    for rank in range(count):
        environment = {
            **os.environ, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        pipe = subprocess.PIPE
        processes.append(begun(command, anew=anew, env=environment, stdout=pipe, stderr=pipe))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(processes: Sequence[Process]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for all of them."""
    done = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=500)
        done.append(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    return done


def launched(
    count: int, command: Sequence[str], *, anew: bool = False
) -> list[subprocess.CompletedProcess[str]]:
    """Starts `command` several times and waits for all."""
    with started(count, command, anew=anew) as processes:
        return finished(processes)
