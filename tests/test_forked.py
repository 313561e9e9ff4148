"""What tests run in forked processes is what would run in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from forked import CAN_FORK, begun

TELLS = """
import os, sys
print(sys.argv[1:], os.environ["ASKED"], "HOME" in os.environ, os.getcwd(), __name__, os.getppid() != os.getpid())
print("said at the end", file=sys.stderr)
sys.exit(3)
"""
WAITS = "import sys, time\nprint('ready', flush=True)\ntime.sleep(600)\n"

needs_fork = pytest.mark.skipif(not CAN_FORK, reason="processes are not forked here")


@needs_fork
def test_a_forked_process_says_and_ends_as_one_that_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(["-c", "pass"]).wait(120)  # so that what others are forked from has another folder
    monkeypatch.chdir(tmp_path)
    Path("tells.py").write_text(TELLS)
    environment = {"ASKED": "é", "PATH": os.environ["PATH"], "PYTHONUTF8": "1"}
    found = []
    for anew in (False, True):
        pipe = subprocess.PIPE
        process = begun(["tells.py", "a b", "c"], anew=anew, env=environment, stdout=pipe, stderr=pipe)
        found.append((*process.communicate(timeout=120), process.returncode))
    assert found[0] == found[1]
    assert found[0] == (
        f"['a b', 'c'] é False {tmp_path} __main__ True\n",
        "said at the end\n",
        3,
    )


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_forked_process_and_its_exit_code_says_so(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    process = begun([str(tmp_path / "waits.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() in (b"ready\n", "ready\n")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    os.kill(process.pid, 0)
    process.send_signal(number)
    assert process.wait(60) == -number
    assert process.poll() == -number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.send_signal(number)  # nobody is there to take it, or another who has its number
    process.stdout.close()


def test_a_log_gets_what_a_process_writes(tmp_path: Path) -> None:
    (tmp_path / "tells.py").write_text("print('one')\nraise SystemExit('two')\n")
    with (tmp_path / "log").open("wb") as log:
        process = begun([str(tmp_path / "tells.py")], stdout=log, stderr=log)
        assert process.wait(120) == 1
    assert sorted((tmp_path / "log").read_text().split()) == ["one", "two"]
