"""A Ray cluster of several nodes on this machine, to be killed one by one, and work that waits for it. Everything stays on
loopback."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from softprompt.scale.ray_workers import RayWorkers
from softprompt.store.atomic import replace_file

OBJECT_STORE_BYTES = 100_000_000
TRIES = 4
HERE = str(Path(__file__).resolve().parent)
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else workers starve on a busy machine
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Nodes:
    """A head without room for work, and nodes that have a CPU each."""

    def __init__(self, count: int, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self.cpus = cpus
        self.cluster = Cluster()
        self.workers: list[Any] = []
        self._start(0)
        for _ in range(count):
            self.add()
        self.address = str(self.cluster.address)

    def _start(self, cpus: int) -> Any:
        """Starts a node, whose workers find the functions of the tests. Ray gives one 30 seconds, which a busy machine may
        exceed."""
        for tries_left in reversed(range(TRIES)):
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
                    return self.cluster.add_node(
                        num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False
                    )
            except Exception:
                if not tries_left:
                    raise

        raise AssertionError("unreachable")

    def add(self) -> None:
        """One more node."""
        self.workers.append(self._start(self.cpus))

    def kill(self, node: Any) -> None:
        """SIGKILL for a node; what runs on it ends with it, about a second later."""
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def kill_under(self, part: Held) -> None:
        """Kills the node that a part is done on, and waits for the end of the part's process."""
        self.kill(next(node for node in self.workers if node.node_id == part.node))
        ended([part])

    def refill(self, count: int = 3) -> None:
        """Adds nodes until there are `count`. Call it in the main thread: a node ends with the thread that started it."""
        while len(self.workers) < count:
            self.add()

    def close(self) -> None:
        """Ends all of them."""
        self.cluster.shutdown()


@contextmanager
def nodes(count: int, cpus: int = 1) -> Iterator[Nodes]:
    """A cluster, and this process connected to it."""
    import ray

    os.environ.update(VARIABLES)
    started = Nodes(count, cpus)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = started.address
    try:
        yield started
    finally:
        for tries_left in reversed(range(TRIES)):
            ray.shutdown()
            try:
                started.close()
                break
            except ValueError:  # a thread of Ray's own has connected this process again
                if not tries_left:
                    raise
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


@dataclass(frozen=True)
class Held:
    """A part at work that waits: where."""

    node: str
    pid: int


@dataclass
class Gate:
    """Holds every part at one moment of its work until some wait there and `kill` has killed what they are done on.

    So something is lost however fast or slow the machine is. The moment is an event for which `moment` (a function of a
    module) holds, or the part's begin without one. Work in a `with` of it."""

    folder: Path
    kill: Callable[[list[Held]], None]
    waiting: int
    moment: Callable[[Any], bool] | None = None
    killed: list[Held] = field(default_factory=list)

    def __enter__(self) -> Gate:
        self.folder.mkdir()
        threading.Thread(target=self._kill_and_open, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        (self.folder / "open").touch()  # also where the work has failed

    @property
    def begun(self) -> int:
        """How often a part was begun."""
        return len(list(self.folder.glob("begun-*")))

    def _kill_and_open(self) -> None:
        while not (self.folder / "open").exists():
            time.sleep(0.05)
            held = [Held(**json.loads(path.read_text())) for path in self.folder.glob("waits-*")]
            if len(held) >= self.waiting:
                try:
                    self.kill(held)
                    self.killed += held
                finally:
                    (self.folder / "open").touch()


class GatedWorkers(RayWorkers):
    """Workers whose parts pass a gate."""

    def __init__(self, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self.gate = gate

    def map(self, do: Any, parts: Iterable[Any], *rest: Any, **options: Any) -> Iterator[Any]:
        """The same, through the gate."""
        yield from super().map(
            partial(_gated, do, self.gate.folder, self.gate.moment), parts, *rest, **options
        )


def _gated(
    do: Any, folder: Path, moment: Callable[[Any], bool] | None, part: Any, tell: Callable[[Any], None]
) -> Any:
    import ray

    name = secrets.token_hex(8)
    (folder / f"begun-{name}").touch()

    def wait() -> None:
        me = {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        replace_file(folder / f"waits-{name}", json.dumps(me))
        while not (folder / "open").exists():
            time.sleep(0.02)

    def passing(event: Any) -> None:
        tell(event)
        if moment is not None and moment(event):
            wait()

    if moment is None:
        wait()
    return do(part, passing)


def ended(parts: Iterable[Held]) -> None:
    """Waits for the end of the processes of parts."""
    for part in parts:
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(part.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
