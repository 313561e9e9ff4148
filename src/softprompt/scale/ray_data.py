"""Workers of Ray Data: parts stream through actors that keep what they have loaded, and come back in order."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from softprompt.base.workers import Outcome, Part, Tell
from softprompt.errors import SoftPromptError
from softprompt.scale.ray_site import Site
from softprompt.scale.ray_workers import (
    AHEAD,
    LOOK_EVERY_SECONDS,
    POLL_SECONDS,
    RayWorkers,
    environment,
    lost_too_often,
    near_the_driver,
)

_END = object()  # after the last row


class RayDataWorkers(RayWorkers):
    """Workers for a stream of many equal parts, as RayWorkers are for few large ones.

    Ray Data moves the parts, holds back actors that are far ahead of whoever takes the outcomes, and replaces lost ones."""

    def map(
        self,
        do: Callable[[Part, Tell], Outcome],
        parts: Iterable[Part],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Outcome]:
        """`do` of each part, in their order. Parts send no events here, and all of them are handed to Ray at the start,
        whose object store spills to disk what it has no room for.

        Raises what a part raises, and ClusterError where a part's worker was lost too often, or all machines were."""
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"number": number, "part": pickle.dumps(part)} for number, part in enumerate(parts)]
        if not rows:
            return
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        tries = ray.remote(num_cpus=0)(_Tries).options(scheduling_strategy=near_the_driver()).remote()
        with ray.data.DataContext.current(context):
            outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _Doing,
                fn_constructor_args=(do, Site.here(folder), tries, self.retries),
                compute=ray.data.ActorPoolStrategy(size=min(self.count, len(rows))),
                num_cpus=self.cpus,
                num_gpus=self.gpus or None,
                runtime_env=environment(),
            )
        for row in self._watched(outcomes.iter_rows()):
            outcome, error = pickle.loads(row["outcome"])
            if error is not None:
                raise error
            yield outcome

    def _watched(self, rows: Iterable[Any]) -> Iterator[Any]:
        """`rows` as they come. Ray waits for machines without an end; here ClusterError is raised where none is left for
        long (RayWorkers)."""
        coming: Queue[Any] = Queue(AHEAD)
        is_over = threading.Event()

        def put(item: Any) -> None:
            while not is_over.is_set():
                with contextlib.suppress(Full):
                    coming.put(item, timeout=POLL_SECONDS)
                    return

        def read() -> None:
            try:
                for row in rows:
                    put(row)
                    if is_over.is_set():
                        return
                put(_END)
            except BaseException as error:  # raised again where the rows are taken
                put(error)

        reader = threading.Thread(target=read, name="rows of Ray Data", daemon=True)
        reader.start()
        looked = time.monotonic()
        try:
            while True:
                try:
                    row = coming.get(timeout=POLL_SECONDS)
                except Empty:
                    if time.monotonic() - looked > LOOK_EVERY_SECONDS:
                        self._count_or_wait()
                        looked = time.monotonic()
                    continue
                if row is _END:
                    return
                if isinstance(row, BaseException):
                    raise row
                yield row
        finally:
            is_over.set()


class _Doing:
    """An actor that does parts."""

    def __init__(self, do: Callable[[Any, Tell], Any], site: Site, tries: Any, retries: int) -> None:
        self.do, self.site, self.tries, self.retries = do, site, tries, retries

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Does a part. Its outcome, or the error that a user can help."""
        try:
            self._demand_tries_left(int(row["number"]))
            self.site.enter()
            return {"outcome": pickle.dumps((self.do(pickle.loads(row["part"]), _tell_nobody), None))}
        except SoftPromptError as error:
            return {"outcome": pickle.dumps((None, error))}

    def _demand_tries_left(self, number: int) -> None:
        """Raises ClusterError where the part has ended its workers each time: Ray Data would try it without an end."""
        import ray
        from ray.exceptions import RayError

        try:
            begun = ray.get(self.tries.begin.remote(number))
        except RayError:  # the node of the counter is lost, and the work is not
            return
        if begun > self.retries + 1:
            raise lost_too_often(number, self.retries, "each of them ended")


class _Tries:
    """How often each part was begun."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Counts a try of a part, and gives how many there were with it."""
        self.begun[number] += 1
        return self.begun[number]


def _tell_nobody(event: Any) -> None:
    """Nobody watches."""
