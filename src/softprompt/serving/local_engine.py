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
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.packed_weights import pack_weights
from softprompt.data.example import Example
from softprompt.errors import SoftPromptError
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.lanes import Lanes
from softprompt.inference.prefill import read_on
from softprompt.inference.running_batch import Request, request
from softprompt.inference.score import RatedToken, rate_continuation, rate_text
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import (
    Answer,
    EngineFailed,
    Finished,
    Overloaded,
    Piece,
    Room,
    ShuttingDown,
    Work,
)
from softprompt.serving.held_prompts import HeldPrompts
from softprompt.serving.waiting import Ticket, Waiting

Result = TypeVar("Result")
Compiled: TypeAlias = Callable[[str | None], CompiledPrompt]

MAX_ROWS = 32
# Text positions read between two steps: what running rows wait for. On a CPU about as long as two or three of their steps.
READ_BESIDE_CPU, READ_BESIDE_GPU = 128, 2048
READ_ALONE = 4096  # where no row runs, so that nobody waits
MAX_SKIPPED = 8  # requests that are looked past in one turn for one that fits
MAX_PASSED = 64  # rows that may join before one that waits for memory; then it is the next

log = logging.getLogger(__name__)


@dataclass
class _Task:
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
        on_cpu = torch.device(lm.device).type == "cpu"
        self.read_beside = read_beside or (READ_BESIDE_CPU if on_cpu else READ_BESIDE_GPU)
        self._lanes = Lanes(lm, max_rows=max_rows, memory_bytes=memory_bytes)
        self._prompts = HeldPrompts(lm)
        self._running: dict[int, Ticket] = {}  # by id of the row, rows that are being read included
        self._reading: list[Request] = []  # long texts that are read in parts
        self._tasks: deque[_Task] = deque()
        self._wake = threading.Condition()
        self._waiting = Waiting(self._wake)
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
        return self._waiting.is_idle and not (self._reading or self._tickets or len(self._lanes))

    def room(self) -> Room:
        """The room for requests now; see Engine."""
        left = None if self.memory_bytes is None else max(0, self.memory_bytes - self._lanes.bytes)
        rows = max(0, self.max_rows - len(self._running))
        return Room(rows, max(0, self.max_waiting - len(self._waiting)), left)

    def health(self) -> dict[str, int]:
        """Whether it works (`alive`), rows running and waiting, and bytes of their keys and values."""
        return {
            "alive": int(self.is_alive),
            "running": len(self._running),
            "waiting": len(self._waiting),
            "kv_bytes": self._lanes.bytes,
        }

    async def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes; see Engine.

        Raises Overloaded where too much is waiting, PromptGone, ShuttingDown, EngineFailed, and what is wrong with the
        request itself as softprompt.errors."""
        with self._wake:
            self._demand_open()
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already. Try again in a moment.")
            ticket = Ticket(work, self._prompts.find(work.digest), asyncio.get_running_loop())
            self._waiting.add(ticket)
            self._tickets[id(work)] = ticket
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
            if not ticket.is_over:  # the client has gone
                ticket.is_over = True
                self._waiting.remove(ticket)
                self._later(lambda: self._drop(ticket))

    def cancel(self, work: Work) -> None:
        """Ends a work: its stream ends with what its rows have so far; see Engine."""
        ticket = self._tickets.get(id(work))
        if ticket is not None:
            self._later(lambda: self._cancel(ticket))

    async def score(
        self,
        digest: str | None,
        given: str | Example | Sequence[int],
        continuation: str | None = None,
        top: int = 0,
    ) -> list[RatedToken]:
        """Rates the tokens of a continuation, or of the input itself; see Engine."""

        def rate(compiled: Compiled) -> list[RatedToken]:
            if continuation is None:
                return rate_text(self.lm, compiled(digest), given, top)
            assert isinstance(given, str | Example), "a continuation follows a text or an example"
            return rate_continuation(self.lm, compiled(digest), given, continuation, top)

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
            self._tasks.append(_Task(run, fail))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _demand_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed(
                "The engine has failed, and its server must be started again. Its log says why."
            )
        if self._stopping:
            raise ShuttingDown("The server is shutting down. Ask another one.")

    def _later(self, run: Callable[[], None]) -> None:
        with self._wake:
            self._tasks.append(_Task(run))
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
        with self._wake:
            while not (self._tasks or self._waiting or self._running or self._stopping):
                self._wake.wait()
            tasks = list(self._tasks)
            self._tasks.clear()
            if self._stopping and not (tasks or self._waiting or self._running):
                return False
        for task in tasks:
            task.run()
        self._admit()
        if len(self._lanes):
            self._advance(self._lanes.advance)
        return True

    def _admit(self) -> None:
        """Reads some of what waits, between two steps, and lets the rows whose texts have been read join."""
        left = self.read_beside if len(self._lanes) else READ_ALONE
        joining: list[Request] = []
        for row in self._reading[:1]:
            joining += self._read(row, left)
        while left > 0 and (coming := self._next(joining)) is not None:
            left -= coming.row.rest
            if left >= 0:
                joining.append(coming)
                continue
            self._reading.append(coming)
            if len(self._reading) == 1:  # one long text at a time, a part in every turn
                joining += self._read(coming, left + coming.row.rest)
        if joining:
            self._join(joining)

    def _read(self, row: Request, positions: int) -> list[Request]:
        """Reads the next part of a long text. Gives back the rows that may join: its last part is read as they do."""
        ticket = self._running[id(row)]
        try:
            if row.row.rest > positions:
                ready = read_on(self.lm, row.row, positions)
                for sample in ticket.rows:  # samples of one text share what has been read of it
                    if sample.row is row.row and sample is not row:
                        sample.row = ready
                row.row = ready
        except Exception as error:
            self._refuse(ticket, error)
            return []
        if row.row.rest > positions:
            return []
        self._reading.remove(row)
        return [row]

    def _next(self, joining: Sequence[Request]) -> Request | None:
        """The row whose turn it is, if it fits beside what runs, is read and is `joining`.

        A row that waits for memory is passed by at most MAX_PASSED others."""
        taken = [*joining, *self._reading]
        skipped: list[Ticket] = []
        while len(self._lanes) + len(taken) < self.max_rows:
            ticket = self._waiting.next(skipped)
            if ticket is None:
                return None
            if ticket.is_over or not self._prepare(ticket):
                self._waiting.remove(ticket)
                continue
            assert ticket.waiting
            if self._lanes.fits([*taken, ticket.waiting[0]]):
                row = ticket.waiting.pop(0)
                self._start(ticket, row)
                for other in skipped:
                    other.passed += 1
                return row
            if ticket.passed >= MAX_PASSED or len(skipped) >= MAX_SKIPPED:
                return None
            skipped.append(ticket)
        return None

    def _prepare(self, ticket: Ticket) -> bool:
        """Lays out the ticket's rows, once. False where that failed, which the client is told."""
        if ticket.waiting is not None:
            return True
        try:
            ticket.rows = self._requests(ticket)
            self._lanes.demand_possible(ticket.rows[0])
        except Exception as error:
            ticket.is_over = True
            ticket.tell(error)
            return False
        ticket.waiting, ticket.left = list(ticket.rows), len(ticket.rows)
        return True

    def _start(self, ticket: Ticket, row: Request) -> None:
        self._waiting.take_turn(ticket)
        self._running[id(row)] = ticket
        if not ticket.waiting:
            self._waiting.remove(ticket)

    def _requests(self, ticket: Ticket) -> list[Request]:
        work, prompt = ticket.work, self._prompts.compiled(ticket.work.digest, ticket.prompt)
        rows: list[Request] = []
        for sample in range(work.settings.drawn):
            row = request(
                self.lm,
                prompt,
                work.given,
                work.settings,
                sample=sample,
                row=rows[0].row if rows and not work.begun else None,  # samples of one text share its reading
                top=work.top,
                steering=None if work.steer is None else work.steer(self.lm, prompt),
                begun=work.begun[sample] if work.begun else (),
            )
            row.on_text = _teller(ticket, row)
            rows.append(row)
        return rows

    def _join(self, joining: list[Request]) -> None:
        """Lets rows join. Where reading them fails, the ones at fault fail, and the others join without them."""
        try:
            done = self._lanes.join(joining)
        except SoftPromptError as error:  # of a text, before any of its keys and values were kept
            for row in joining:
                self._lanes.cancel(row)
            if len(joining) == 1:
                self._refuse(self._running[id(joining[0])], error)
                return
            for row in joining:
                if id(row) in self._running:
                    self._join([self._renewed(row)])
            return
        except Exception as error:
            self._restart(error)
            return
        self._end(done)

    def _renewed(self, row: Request) -> Request:
        """The same request as before it joined."""
        ticket = self._running.pop(id(row))
        fresh = replace(
            row,
            token_ids=list(row.begun),
            log_probabilities=[],
            likeliest=[],
            text="",
            finish_reason=None,
            failure=None,
        )
        fresh.on_text = _teller(ticket, fresh)
        ticket.rows[ticket.rows.index(row)] = fresh
        self._running[id(fresh)] = ticket
        return fresh

    def _advance(self, step: Callable[[], list[Request]]) -> None:
        try:
            done = step()
        except Exception as error:
            self._restart(error)
            return
        self._end(done)

    def _end(self, done: Sequence[Request]) -> None:
        for row in done:
            ticket = self._running.pop(id(row), None)
            if ticket is None:
                continue
            self._waiting.end_turn(ticket)
            if row.failure is not None:
                self._refuse(ticket, row.failure)
                continue
            ticket.tell(_finished(row))
            ticket.left -= 1
            if not ticket.left:
                ticket.is_over = True  # nothing is left to cancel
                ticket.tell(None)

    def _refuse(self, ticket: Ticket, error: BaseException) -> None:
        """Fails a whole work."""
        if not ticket.is_over:
            ticket.tell(error)
        self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        """Removes the rows of a request that nobody waits for, before the next step."""
        ticket.is_over = True
        self._waiting.remove(ticket)
        for row in ticket.rows:
            if self._running.pop(id(row), None) is not None:
                self._waiting.end_turn(ticket)
                self._lanes.cancel(row)
                if row in self._reading:
                    self._reading.remove(row)

    def _cancel(self, ticket: Ticket) -> None:
        """Ends a work in order: every row that has not finished gives what it has."""
        if ticket.is_over:
            return
        unfinished = [row for row in ticket.rows if row.finish_reason is None]
        self._drop(ticket)
        for row in unfinished:
            ticket.tell(replace(_finished(row), reason="cancelled"))
        if not ticket.rows:  # it was never laid out
            ticket.tell(Finished(0, "", "cancelled", (), (), 0, 0))
        ticket.tell(None)

    def _restart(self, error: BaseException) -> None:
        """The running batch broke, and what it holds may be wrong: its rows fail, and a new one takes its place."""
        log.error("The running batch failed and is made again.", exc_info=error)
        failure = EngineFailed("The server failed while it answered. Its log says why; try again.")
        self._lanes = Lanes(self.lm, max_rows=self.max_rows, memory_bytes=self.memory_bytes)
        for ticket in _each(*self._running.values()):
            self._refuse(ticket, failure)
        self._reading.clear()

    def _cut_everything(self) -> None:
        error = ShuttingDown(
            "The server is shutting down, and this answer was not finished. Ask another one."
        )
        self._refuse_all(error)

    def _refuse_all(self, error: BaseException) -> None:
        for ticket in _each(*self._running.values(), *self._waiting.all()):
            self._refuse(ticket, error)

    def _fail(self, error: BaseException) -> None:
        failure = EngineFailed(
            "The engine has failed, and its server must be started again. Its log says why."
        )
        with self._wake:
            self._failure = error
            tasks = list(self._tasks)
            self._tasks.clear()
            tickets = _each(*self._waiting.all(), *self._running.values())
        self._running.clear()
        for ticket in tickets:
            self._waiting.remove(ticket)
            ticket.is_over = True
            ticket.tell(failure)
        for task in tasks:
            task.fail(failure)

    def _compiled_by_digest(self, digest: str | None) -> CompiledPrompt:
        return self._prompts.compiled(digest, self._prompts.find(digest))


def _each(*tickets: Ticket) -> list[Ticket]:
    """Every ticket once, of those that have several rows."""
    return list({id(ticket): ticket for ticket in tickets}.values())


def _finished(row: Request) -> Finished:
    marks = row.given
    virtual = sum(mark < 0 for mark in marks)
    return Finished(
        row.sample,
        row.text,
        row.finish_reason or "stop",
        tuple(row.token_ids),
        tuple(row.log_probabilities),
        len(marks) - virtual,
        virtual,
        tuple(map(tuple, row.likeliest)),
    )


def _teller(ticket: Ticket, row: Request) -> Callable[[str], None]:
    sent = 0

    def tell(text: str) -> None:
        nonlocal sent
        ids = tuple(row.token_ids[sent:])
        sent += len(ids)
        ticket.tell(Piece(row.sample, text, ids))

    return tell
