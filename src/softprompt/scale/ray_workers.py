"""Workers on a Ray cluster: each part is a task, which Ray does again on another machine when it loses one.

The machines share a file system: a part reads and writes the same paths as here. What a part leaves there is whole or not
at all, so doing it again counts nothing twice.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from softprompt.base.workers import Outcome, Part, Tell
from softprompt.errors import ClusterError, SoftPromptError, first_line
from softprompt.scale.ray_cluster import connected, demand_ray
from softprompt.scale.ray_site import Site
from softprompt.store.lock import patient

RETRIES = 4  # of a part whose worker was lost
POLL_SECONDS = 0.2
TELL_EVERY_SECONDS = 0.5
LOOK_EVERY_SECONDS = 5.0
ROOMLESS_SECONDS = 300.0  # that a work waits for machines after all of them were lost
LOST_WORKER_SECONDS = 120.0
"""How long a part waits for a folder that is still locked. A worker whose machine the cluster has given up may write there for
a while: Ray ends it about a second after the machine's raylet, and a raylet that is cut off after a minute."""
AHEAD = 2  # parts for each worker that are handed out before the first of them is back
PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")
"""Variables of the environment that workers get from here."""


class RayWorkers:
    """Workers on the cluster at `address`: `ray` for this machine's, or ray://HOST:PORT. Use it as a context.

    Each worker takes `cpus` and `gpus` of a machine. A part is done again up to `retries` times when its worker is lost.
    Raises MissingExtra without Ray, ClusterError where the cluster does not answer."""

    are_here = False

    def __init__(
        self, address: str = "ray", *, cpus: int = 1, gpus: float = 0.0, retries: int = RETRIES
    ) -> None:
        demand_ray()
        self.address, self.cpus, self.gpus, self.retries = address, cpus, gpus, retries
        self._connection = ExitStack()
        self._room_seen: float | None = None  # when a machine had room for a worker, as far as is known

    def __enter__(self) -> Self:
        self._connection.enter_context(connected(self.address))
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def __repr__(self) -> str:
        return f"RayWorkers({self.address!r}, cpus={self.cpus}, gpus={self.gpus:g})"

    @property
    def count(self) -> int:
        """Workers that the machines have room for now. Raises ClusterError for none."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = sum(self._room(node) for node in nodes)
        if not count:
            largest = max((node.get("CPU", 0) for node in nodes), default=0)
            raise ClusterError(
                f"--on {self.address}: no machine has {self.cpus} CPUs and {self.gpus:g} GPUs for a worker; the largest has "
                f"{largest:g} CPUs. Lower --worker-cpus or --worker-gpus."
            )
        self._room_seen = time.monotonic()
        return count

    def _count_or_wait(self) -> int:
        """`count`, or 1 where the machines that were there are lost, and others may come.

        Raises ClusterError where there were none at the start, or where none came for ROOMLESS_SECONDS."""
        try:
            return self.count
        except ClusterError:
            if self._room_seen is None:
                raise
            if time.monotonic() - self._room_seen < ROOMLESS_SECONDS:
                return 1
            raise ClusterError(
                f"--on {self.address}: all machines with room for a worker were lost, and none has come for "
                f"{ROOMLESS_SECONDS:g} seconds. Start machines, and the command again: it continues (a sweep with --resume)."
            ) from None

    def _room(self, node: dict[str, float]) -> int:
        by_cpus = int(node.get("CPU", 0) // self.cpus)
        return min(by_cpus, int(node.get("GPU", 0) // self.gpus)) if self.gpus else by_cpus

    def map(
        self,
        do: Callable[[Part, Tell], Outcome],
        parts: Iterable[Part],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Outcome]:
        """`do` of each part, in their order; a few more parts than there are workers are under way.

        Raises what a part raises, and ClusterError where a part's worker was lost too often."""
        import ray

        task = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_retries=self.retries,
            max_calls=int(own_process),
            scheduling_strategy="SPREAD",
            runtime_env=environment(),
        )(_done)
        site, shared = Site.here(folder), ray.put(do)
        mailbox = None if tell is None else _Mailbox()
        numbered = enumerate(parts)
        under_way: deque[tuple[int, Any]] = deque()
        most, looked = AHEAD * self._count_or_wait(), time.monotonic()
        try:
            while True:
                while len(under_way) < most and (following := next(numbered, None)) is not None:
                    number, part = following
                    box = None if mailbox is None else mailbox.actor
                    under_way.append((number, task.remote(shared, part, number, box, site)))
                if not under_way:
                    return
                number, reference = under_way[0]
                while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
                    if mailbox is not None and tell is not None:
                        mailbox.empty(tell)
                    if (
                        time.monotonic() - looked > LOOK_EVERY_SECONDS
                    ):  # Ray waits for machines without an end
                        most, looked = AHEAD * self._count_or_wait(), time.monotonic()
                outcome, error, events = self._get(reference, number)
                under_way.popleft()
                if mailbox is not None and tell is not None:
                    mailbox.empty(tell)
                    for event in events:
                        tell(number, event)
                if error is not None:
                    raise error
                yield outcome
        finally:
            for _, reference in under_way:
                with contextlib.suppress(Exception):  # it may have ended, and the cluster may be gone
                    ray.cancel(reference, force=True)
            if mailbox is not None:
                mailbox.close()

    def _get(self, reference: Any, number: int) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(reference)
        except RayTaskError:
            raise
        except RayError as error:
            raise lost_too_often(number, self.retries, first_line(error)) from error


def environment() -> dict[str, Any]:
    """The part of this process' environment that workers get, as Ray takes it."""
    return {"env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}}


def near_the_driver() -> Any:
    """Places an actor on the node of this process, which the work does not outlive anyway.

    On no other one (soft): Ray takes a soft wish of an actor without CPUs for none at all, and its node may be lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def lost_too_often(number: int, retries: int, why: str) -> ClusterError:
    """The error for a part whose worker was lost each time."""
    return ClusterError(
        f"Part {number + 1} of the work was lost with its worker {retries + 1} times ({why}). If memory runs out there, let "
        "each worker take more of a machine (--worker-cpus)."
    )


def _done(
    do: Callable[[Part, Tell], Outcome], part: Part, number: int, mailbox: Any, site: Site
) -> tuple[Outcome | None, SoftPromptError | None, list[Any]]:
    """Does a part in a worker. Its outcome, or the error that a user can help; and the events that were not sent yet."""
    told: list[Any] = []
    last = -math.inf  # the first event is sent at once: whoever watches sees that the part has begun

    def tell(event: Any) -> None:
        nonlocal last
        if mailbox is None:
            return
        told.append(event)
        if time.monotonic() - last > TELL_EVERY_SECONDS:
            last = time.monotonic()
            mailbox.put.remote(number, list(told))  # nobody waits for it: work does not depend on who watches
            told.clear()

    try:
        site.enter()
        with patient(LOST_WORKER_SECONDS):
            return do(part, tell), None, told
    except SoftPromptError as error:
        return None, error, told


class _Mailbox:
    """Events on their way from the workers to the process that watches. Where it is lost, events are, and nothing else."""

    def __init__(self) -> None:
        import ray

        events = ray.remote(num_cpus=0)(_Events)
        self.actor: Any = events.options(scheduling_strategy=near_the_driver()).remote()
        self._coming: Any = None

    def empty(self, tell: Callable[[int, Any], None]) -> None:
        """Hands over the events that have come; never waits."""
        import ray
        from ray.exceptions import RayError

        if self._coming is None:
            self._coming = self.actor.take.remote()
        if not ray.wait([self._coming], timeout=0)[0]:
            return
        try:
            events = ray.get(self._coming)
        except RayError:
            events = []
        self._coming = None
        for number, event in events:
            tell(number, event)

    def close(self) -> None:
        """Ends it."""
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(self.actor)


class _Events:
    """The events in a mailbox."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Any]] = []

    def put(self, number: int, events: list[Any]) -> None:
        """Takes events of a part."""
        self.events += [(number, event) for event in events]

    def take(self) -> list[tuple[int, Any]]:
        """Gives all events, once."""
        events, self.events = self.events, []
        return events
