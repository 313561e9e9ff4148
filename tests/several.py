"""Several processes of one program on this machine, as torchrun starts them: by their environment."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def started(count: int, command: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts `command` (python's arguments) `count` times; the processes find each other through gloo, and end with the context."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **os.environ, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for all of them."""
    done = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=500)
        done.append(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    return done


def launched(count: int, command: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Starts `command` several times and waits for all."""
    with started(count, command) as processes:
        return finished(processes)
