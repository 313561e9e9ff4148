"""A Ray cluster of several nodes on this machine, to be killed one by one. Everything stays on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OBJECT_STORE_BYTES = 100_000_000
TRIES = 4
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
        """Starts a node. Ray gives one 30 seconds, which a busy machine may exceed."""
        for tries_left in reversed(range(TRIES)):
            try:
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
        """SIGKILL for a node and all that runs on it."""
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

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
