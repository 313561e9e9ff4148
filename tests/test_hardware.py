"""What a process is said to hold: its own memory, never its parent's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from softprompt.base import hardware

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FAT = 1_500_000_000  # bytes; more than a child ever holds that has imported torch
PARENT = """
import subprocess, sys
ballast = bytearray({fat})
ballast[::4096] = b"x" * len(ballast[::4096])
sys.exit(subprocess.call({child}))
"""
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="a child inherits its parent's peak on Linux alone"
)


@linux
def test_a_peak_is_the_processs_own_below_a_parent_that_holds_more() -> None:
    if psutil.virtual_memory().available < 2 * FAT:
        pytest.skip(f"needs {2 * FAT:,} bytes of free memory")
    peak = "import torch; from softprompt.base import hardware; print(hardware.peak_memory_bytes(torch.device('cpu')))"
    run = [sys.executable, "-c", PARENT.format(fat=FAT, child=[sys.executable, "-c", peak])]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    assert 0 < int(out) < FAT


def test_the_peak_grows_with_what_is_held_and_is_forgotten_when_asked() -> None:
    before = hardware.memory_bytes(CPU)
    assert before == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    held = torch.ones(60_000_000)  # 240 MB
    assert hardware.peak_memory_bytes(CPU) > before + 200e6
    del held
    hardware.forget_peak(CPU)
    if sys.platform == "linux":
        assert hardware.peak_memory_bytes(CPU) < before + 150e6


def test_the_machines_memory_is_that_of_the_system() -> None:
    assert hardware.total_memory_bytes() == psutil.virtual_memory().total > 1e8
