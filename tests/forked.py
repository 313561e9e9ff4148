"""Processes of `python` that begin with torch, transformers and softprompt already imported: forked from one that has done so.

What a process imports takes most of its time in a test. Each of these has its own pid, environment, folder, streams and signals, and
ends as any other; hash seed and memory are those of the process that it was forked from."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

CAN_FORK = hasattr(os, "pidfd_open")  # on Linux alone
IMPORTED = (
    "softprompt.cli.tune", "softprompt.cli.generate", "softprompt.cli.evaluate", "softprompt.cli.serve",
    "softprompt.tuning.loop", "softprompt.evaluation.judge", "softprompt.serving.local_engine", "softprompt.serving.server",
    "transformers.models.bloom.modeling_bloom", "transformers.models.llama.modeling_llama", "torch.distributed.tensor",
)  # fmt: skip


class Forked:
    """One process of `python`, with as much of subprocess.Popen as tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stdout, out = _stream(stdout, 1)
        self.stderr, err = _stream(stderr, 2)
        self._source = _source()
        asked = {"arguments": list(arguments), "environment": dict(env or os.environ), "folder": os.getcwd()}
        self._number, self.pid = self._source.fork(asked, [out, err])
        for ours, mine in ((self.stdout, out), (self.stderr, err)):
            if ours is not None:
                os.close(mine)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._source.status_of(self._number, timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = self._source.status_of(self._number, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes, once it has ended."""
        ends = None if timeout is None else time.monotonic() + timeout
        said: dict[Any, bytes] = {stream: b"" for stream in (self.stdout, self.stderr) if stream is not None}
        with selectors.DefaultSelector() as open_streams:
            for stream in said:
                if not stream.closed:
                    open_streams.register(stream, selectors.EVENT_READ)
            while open_streams.get_map():
                left = None if ends is None else max(0.0, ends - time.monotonic())
                if not (ready := open_streams.select(left)):
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0)
                for key, _ in ready:
                    found = os.read(key.fd, 1 << 16)
                    said[key.fileobj] += found
                    if not found:
                        open_streams.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
        self.wait(None if ends is None else max(0.0, ends - time.monotonic()))
        texts = [said.get(stream, b"").decode() for stream in (self.stdout, self.stderr)]
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and nobody has said so yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


Process = subprocess.Popen[str] | Forked


def begun(arguments: Sequence[str], *, anew: bool = False, **options: Any) -> Process:
    """A process of `python` with these arguments; with `anew` it imports all that it needs itself, as a user's does.

    `options` are env, stdout and stderr, as subprocess.Popen takes them."""
    if CAN_FORK and not anew:
        return Forked(arguments, **options)
    ready = _default_signals if os.name == "posix" else None
    return subprocess.Popen([sys.executable, *arguments], text=True, preexec_fn=ready, **options)


def _default_signals() -> None:
    """A shell that runs tests in the background has signals ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _stream(wanted: int | IO[Any] | None, inherited: int) -> tuple[IO[bytes] | None, int]:
    """What the parent reads, if it reads, and what the child writes to."""
    if wanted == subprocess.PIPE:
        reading, writing = os.pipe()
        return os.fdopen(reading, "rb", buffering=0), writing
    if wanted == subprocess.DEVNULL:
        return None, _nowhere()
    if wanted is None:
        return None, inherited
    return None, wanted if isinstance(wanted, int) else wanted.fileno()


@functools.cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDWR)


class _Source:
    """The process that others are forked from, as its parent sees it: asked and answered in lines of JSON."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        arguments = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(arguments, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.told, self.one_at_a_time = threading.Condition(), threading.Lock()
        self.pids: list[int] = []  # of all processes, in the order of their numbers
        self.statuses: dict[int, int] = {}  # by number: a pid may come again
        self.has_ended = False
        threading.Thread(target=self._listen, name="forked", daemon=True).start()
        atexit.register(self.channel.shutdown, socket.SHUT_RDWR)

    def _listen(self) -> None:
        with self.channel.makefile() as lines:
            for line in lines:
                kind, *numbers = json.loads(line)
                with self.told:
                    if kind == "forked":
                        self.pids += numbers
                    else:
                        self.statuses[numbers[0]] = numbers[1]
                    self.told.notify_all()
        with self.told:
            self.has_ended = True
            self.told.notify_all()

    def fork(self, what: Mapping[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """The number and the pid of a new process."""
        line = json.dumps(what).encode() + b"\n"
        with self.one_at_a_time, self.told:
            socket.send_fds(self.channel, [len(line).to_bytes(8, "little")], list(streams))
            self.channel.sendall(line)
            number = len(self.pids)
            self.told.wait_for(lambda: len(self.pids) > number or self.has_ended)
            assert len(self.pids) > number, "the process that others are forked from has ended"
            return number, self.pids[number]

    def status_of(self, number: int, timeout: float | None) -> int | None:
        """The exit code of a process, once it has ended; None if it has not in time."""
        with self.told:
            self.told.wait_for(lambda: number in self.statuses or self.has_ended, timeout)
            found = self.statuses.get(number)
            assert found is not None or not self.has_ended, (
                "the process that others are forked from has ended"
            )
            return found


@functools.cache
def _source() -> _Source:
    return _Source()


def _fork_when_asked(channel: socket.socket) -> list[str] | None:
    """Forks for each request; in a child, the arguments of what it is to run. None at the parent's end."""
    count = 0
    running: dict[int, tuple[int, int]] = {}  # numbers and pids, by what tells their end
    with selectors.DefaultSelector() as told:
        told.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in told.select():
                if key.fileobj is not channel:
                    told.unregister(key.fileobj)
                    number, pid = running.pop(key.fd)
                    status = os.waitpid(pid, 0)[1]
                    os.close(key.fd)
                    _tell(channel, "ended", number, os.waitstatus_to_exitcode(status))
                    continue
                size, streams, _, _ = socket.recv_fds(channel, 8, 2)
                if not size:
                    for _, pid in running.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                line = b""
                while len(line) < int.from_bytes(size, "little"):
                    line += channel.recv(1 << 20)
                asked = json.loads(line)
                if (pid := os.fork()) == 0:
                    for descriptor in running:
                        os.close(descriptor)
                    return _become(asked, streams, channel)
                for stream in streams:
                    os.close(stream)
                ends = os.pidfd_open(pid)
                running[ends] = count, pid
                count += 1
                told.register(ends, selectors.EVENT_READ)
                _tell(channel, "forked", pid)


def _tell(channel: socket.socket, *what: object) -> None:
    channel.sendall(json.dumps(what).encode() + b"\n")


def _become(asked: Mapping[str, Any], streams: Sequence[int], channel: socket.socket) -> list[str]:
    channel.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, stream in enumerate([nothing, *streams]):
        os.dup2(stream, target)
        os.close(stream)
    # Anew, since a stream knows what its descriptor was: whether it can seek, say. No output is held back, as with python -u.
    encoding = asked["environment"].get("PYTHONIOENCODING")
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding=encoding, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, encoding, closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)  # type: ignore[misc]
    _default_signals()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    return list(asked["arguments"])


def _run(arguments: list[str]) -> None:
    """As python runs its arguments: -m module, -c code, or a file; -u before them is how streams are here."""
    arguments = [*arguments]
    if arguments[0] == "-u":
        del arguments[0]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import torch

    for name in IMPORTED:
        __import__(name)
    torch.set_num_threads(1)  # before anything runs: threads do not outlive a fork
    # A terminal's Ctrl-C goes to all; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = _fork_when_asked(socket.socket(fileno=int(sys.argv[1])))
    if told is not None:
        _run(told)
