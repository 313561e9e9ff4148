"""The engine in this process: requests under any prompt, continued side by side by one thread that owns the model.

It runs inference.lanes. Every answer is the one that its request gets alone, whatever joins, leaves or is cancelled
beside it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.packed_weights import pack_weights
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.score import RatedToken, rate_continuation, rate_text
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import (
    Answer,
    EngineFailed,
    Overloaded,
    Room,
    ShuttingDown,
    Work,
)
from softprompt.serving.held_prompts import HeldPrompts
from softprompt.serving.scheduler import Scheduler
from softprompt.serving.waiting import Ticket, Waiting

Result = TypeVar("Result")
Compiled: TypeAlias = Callable[[str | None], CompiledPrompt]

MAX_ROWS = 32

log = logging.getLogger(__name__)


@dataclass
class Task:
    """A function to run on the model's thread between two steps."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None] = lambda error: None


class LocalEngine:
    """An engine in this process. Use `start` and `stop`, or as a context."""

    kind = "softprompt"

    def __init__(
        self,
        lm: FrozenLM,
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int = 256,
        memory_bytes: int | None = None,
        read_beside: int | None = None,
    ) -> None:
        self.lm = lm
        pack_weights(lm)
        self.max_rows, self.max_waiting, self.memory_bytes = max_rows, max_waiting, memory_bytes
        self._prompts = HeldPrompts(lm)
        self._tasks: deque[Task] = deque()
        self._wake = threading.Condition()
        self._waiting = Waiting(self._wake)
        self._scheduler = Scheduler(
            lm,
            self._prompts,
            self._waiting,
            max_rows=max_rows,
            memory_bytes=memory_bytes,
            read_beside=read_beside,
        )
        self._tickets: dict[int, Ticket] = {}  # by id of the work, those that are not over
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def close(self) -> None:
        """Takes nothing more; what runs or waits is still answered."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Takes nothing more, gives what runs or waits so long to end, then cuts it with an error."""
        self.close()
        if not self._thread.is_alive():
            return
        self._thread.join(grace_seconds)
        if self._thread.is_alive():
            self._later(self._cut_everything)
            self._thread.join(10)

    def __enter__(self) -> LocalEngine:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop(0.0 if error[0] else 30.0)

    @property
    def prompts(self) -> frozenset[str]:
        """Digests of the prompts that requests may name."""
        return self._prompts.digests

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt ready. Raises WrongBase where it belongs to another base."""
        self._prompts.load(prompt, digest)

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""
        self._prompts.unload(digest)
        self._later(lambda: self._prompts.discard(digest))

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered: its thread runs and has not failed."""
        return self._failure is None and self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any request: none waits, is read, runs or is counted."""
        return self._waiting.is_idle and not (
            self._scheduler.reading or self._tickets or len(self._scheduler.lanes)
        )

    def room(self) -> Room:
        """The room for requests now; see Engine."""
        left = None if self.memory_bytes is None else max(0, self.memory_bytes - self._scheduler.lanes.bytes)
        rows = max(0, self.max_rows - len(self._scheduler.running))
        return Room(rows, max(0, self.max_waiting - self._queued), left)

    def health(self) -> dict[str, int]:
        """Whether it works (`alive`), rows running and waiting, and bytes of their keys and values."""
        return {
            "alive": int(self.is_alive),
            "running": len(self._scheduler.running),
            "waiting": self._queued,
            "kv_bytes": self._scheduler.lanes.bytes,
        }

    async def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes; see Engine.

        Raises Overloaded where too much is waiting, PromptGone, ShuttingDown, EngineFailed, and what is wrong with the
        request itself as softprompt.errors."""
        with self._wake:
            self._demand_open()
            # A request that finds a row free waits for the coming turn alone.
            free = max(0, self.max_rows - len(self._scheduler.running))
            if self._queued >= self.max_waiting + free:
                raise Overloaded(f"{self._queued} requests are waiting already. Try again in a moment.")
            ticket = Ticket(work, self._prompts.find(work.digest), asyncio.get_running_loop())
            self._tickets[id(work)] = ticket
            self._arrive(ticket)
            self._wake.notify()
        try:
            while True:
                answer = await ticket.answers.get()
                if answer is None:
                    return
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            self._tickets.pop(id(work), None)
            self._leave(ticket)

    def cancel(self, work: Work) -> None:
        """Ends a work: its stream ends with what its rows have so far; see Engine."""
        ticket = self._tickets.get(id(work))
        if ticket is not None:
            self._end_early(ticket)

    async def score(
        self,
        digest: str | None,
        given: str | Example | Sequence[int],
        continuation: str | None = None,
        top: int = 0,
        end: End = "never",
    ) -> list[RatedToken]:
        """Rates the tokens of a continuation, or of the input itself; see Engine."""

        def rate(compiled: Compiled) -> list[RatedToken]:
            if continuation is None:
                return rate_text(self.lm, compiled(digest), given, top)
            assert isinstance(given, str | Example), "a continuation follows a text or an example"
            return rate_continuation(self.lm, compiled(digest), given, continuation, top, end)

        return await self.call(rate)

    async def call(self, task: Callable[[Compiled], Result]) -> Result:
        """Runs a task that needs the model, on its thread between two steps; it is given a way to the compiled prompts."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the client has gone
            try:
                future.set_result(task(self._compiled_by_digest))
            except BaseException as error:
                future.set_exception(error)

        def fail(error: BaseException) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        with self._wake:
            self._demand_open()
            self._tasks.append(Task(run, fail))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _demand_open(self) -> None:
        if self._failure is not None:
            raise failed()
        if self._stopping:
            raise ShuttingDown("The server is shutting down. Ask another one.")

    @property
    def _queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def _arrive(self, ticket: Ticket) -> None:
        """Lets a ticket wait for its turn."""
        self._waiting.add(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Drops what is left of a ticket that nobody listens to any more."""
        if not ticket.is_over:  # the client has gone
            ticket.is_over = True
            self._waiting.remove(ticket)
            self._later(lambda: self._scheduler.drop(ticket))

    def _end_early(self, ticket: Ticket) -> None:
        """Ends a ticket in order before the next step."""
        self._later(lambda: self._scheduler.cancel(ticket))

    def _later(self, run: Callable[[], None]) -> None:
        with self._wake:
            self._tasks.append(Task(run))
            self._wake.notify()

    # What follows runs on the engine's own thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # a fault of ours: nobody may wait for an answer that never comes
            log.exception("The engine has failed.")
            self._fail(error)

    def _turn(self) -> bool:
        """Does what has been asked for, reads and admits some texts, takes a step. False when there is nothing more to do."""
        tasks = self._taken()
        if tasks is None:
            return False
        for task in tasks:
            task.run()
        self._scheduler.admit()
        self._scheduler.advance()
        return True

    def _taken(self) -> list[Task] | None:
        """Waits for something to do, and takes the tasks that there are. None when there is nothing more to do."""
        with self._wake:
            while not (self._tasks or self._waiting or self._scheduler.running or self._stopping):
                self._wake.wait()
            tasks = list(self._tasks)
            self._tasks.clear()
            is_ending = self._stopping and not (tasks or self._waiting or self._scheduler.running)
            return None if is_ending else tasks

    def _cut_everything(self) -> None:
        error = ShuttingDown(
            "The server is shutting down, and this answer was not finished. Ask another one."
        )
        self._scheduler.refuse_all(error)

    def _fail(self, error: BaseException) -> None:
        failure = failed()
        with self._wake:
            self._failure = error
            tasks = list(self._tasks)
            self._tasks.clear()
            tickets = self._scheduler.tickets
        self._scheduler.running.clear()
        for ticket in tickets:
            self._waiting.remove(ticket)
            ticket.is_over = True
            ticket.tell(failure)
        for task in tasks:
            task.fail(failure)

    def _compiled_by_digest(self, digest: str | None) -> CompiledPrompt:
        return self._prompts.compiled(digest, self._prompts.find(digest))


def failed() -> EngineFailed:
    """The error of whoever waits for an engine that has failed."""
    return EngineFailed("The engine has failed, and its server must be started again. Its log says why.")
