"""A run that is killed with kill -9 at moments drawn at random and resumed, again and again, in processes of its own."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import begun

Begin = Callable[[Path], Callable[[], object]]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def runs_killed_and_undisturbed(begin: Begin, folder: Path, *, seconds: float) -> tuple[Path, Path]:
    """Two folders: of a run that was killed for `seconds` and then let run to its end, and of one left in peace.

    `begin`, a function of a test module, is given the run's folder; what it returns runs, or goes on.
    """
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    assert _kills(begin, killed, seconds) >= 1  # how many depends on the machine's other work
    assert _kills(begin, undisturbed, 0) == 0
    return killed, undisturbed


def _kills(begin: Begin, folder: Path, seconds: float) -> int:
    arguments = [__file__, begin.__module__, begin.__name__, str(folder), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = begun(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    kills, status = map(int, said.split())
    assert status == 0, errors
    return kills


def _drive(run: Callable[[], object], seconds: float) -> None:
    """A child is forked for each attempt, so that nothing is loaded anew. Prints the kills and the last exit status."""
    draw, kills, began = random.Random(7), 0, time.monotonic()
    while True:
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        if time.monotonic() - began < seconds:
            time.sleep(draw.uniform(0.0, 0.6))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            print(kills, os.WEXITSTATUS(status))
            break
        kills += 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything runs: threads do not outlive a fork
    module, function, folder, seconds = sys.argv[1:]
    _drive(getattr(importlib.import_module(module), function)(Path(folder)), float(seconds))
