"""The engine behind a server: requests under any prompt, continued side by side by one thread that owns the model.

An Engine is a protocol, so that other engines can take its place; LocalEngine runs inference.lanes. Every answer is the
one that its request gets alone, whatever joins, leaves or is cancelled beside it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.errors import SoftPromptError
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.lanes import Lanes
from softprompt.inference.prefill import read_on
from softprompt.inference.running_batch import Request, Steering, request
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt

Result = TypeVar("Result")
Compiled: TypeAlias = Callable[[str | None], CompiledPrompt]

MAX_ROWS = 32
COMPILED_BYTES = 2 * 10**9  # of compiled prompts that are kept
# Text positions read between two steps: what running rows wait for. On a CPU about as long as two or three of their steps.
READ_BESIDE_CPU, READ_BESIDE_GPU = 192, 2048
READ_ALONE = 4096  # where no row runs, so that nobody waits
MAX_SKIPPED = 8  # requests that are looked past in one turn for one that fits
MAX_PASSED = 64  # rows that may join before one that waits for memory; then it is the next

log = logging.getLogger(__name__)


class Overloaded(SoftPromptError):
    """The queue is full; try again later."""


class ShuttingDown(SoftPromptError):
    """The engine takes no more requests."""


class EngineFailed(SoftPromptError):
    """A fault of the server's own, not of the request."""


class PromptGone(SoftPromptError):
    """The prompt is not held any more."""


@dataclass(frozen=True)
class Work:
    """A request to the engine: a prompt by its digest (None: the base alone), an input, how to decode, and for whom.

    `given` is a text, an example, or the marks of a whole sequence (token ids, and -1 - i for vector i). `top` is how
    many likeliest tokens are recorded beside each new one; `steer` makes what steers a row, if anything does. `begun` are,
    for each sample, the first tokens of an answer that was cut off elsewhere and goes on here."""

    digest: str | None
    given: str | Example | Sequence[int]
    settings: DecodeSettings
    owner: str = ""
    top: int = 0
    steer: Callable[[FrozenLM, CompiledPrompt], Steering] | None = None
    begun: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of one sample, as soon as it is certain, and the tokens chosen since the last piece."""

    sample: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of one sample. `input_tokens` are those of the text, `virtual_tokens` those of the prompt."""

    sample: int
    text: str
    reason: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    input_tokens: int
    virtual_tokens: int
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()


Answer: TypeAlias = Piece | Finished


class Engine(Protocol):
    """The interface of an engine, as a server uses it. `lm` is the base; of one that runs elsewhere its tokenizer and facts are enough."""

    lm: FrozenLM

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt ready; requests name it by its digest. Raises PromptError where this engine cannot serve it."""

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""

    def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes. Leaving the iterator early cancels the work."""

    async def call(self, task: Callable[[Compiled], Result]) -> Result:
        """Run a task that needs the model between two steps; it is given a way to the compiled prompts."""

    def health(self) -> dict[str, int]:
        """Whether it works (`alive`), rows running and waiting, and bytes of their keys and values."""


@dataclass(eq=False)
class _Ticket:
    """One work, from its arrival to its last answer. `waiting` are rows that have not joined yet."""

    work: Work
    prompt: Prompt | None
    number: int
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[Answer | BaseException | None] = field(default_factory=asyncio.Queue)
    rows: list[Request] = field(default_factory=list)
    waiting: list[Request] | None = None
    left: int = 0
    is_over: bool = False
    passed: int = 0

    def tell(self, answer: Answer | BaseException | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)
        except RuntimeError:
            self.is_over = True  # the loop has ended, and nobody waits any more


@dataclass
class _Task:
    """A function to run on the model's thread between two steps."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None] = lambda error: None


class LocalEngine:
    """An engine in this process. Use `start` and `stop`, or as a context."""

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
        self.max_rows, self.max_waiting, self.memory_bytes = max_rows, max_waiting, memory_bytes
        on_cpu = torch.device(lm.device).type == "cpu"
        self.read_beside = read_beside or (READ_BESIDE_CPU if on_cpu else READ_BESIDE_GPU)
        self._lanes = Lanes(lm, max_rows=max_rows, memory_bytes=memory_bytes)
        self._prompts: dict[str, Prompt] = {}
        self._compiled: OrderedDict[str | None, CompiledPrompt] = OrderedDict()
        self._running: dict[int, _Ticket] = {}  # by id of the row, rows that are being read included
        self._reading: list[Request] = []  # long texts that are read in parts
        self._load: Counter[tuple[str, ...]] = Counter()  # rows running, by owner and by owner and prompt
        self._served: dict[str, int] = {}  # when an owner's turn last was
        self._turns = 0
        self._waiting: list[_Ticket] = []
        self._tasks: deque[_Task] = deque()
        self._wake = threading.Condition()
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

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt ready. Raises WrongBase where it belongs to another base."""
        prompt.base.demand(self.lm.fingerprint, prompt.name)
        self._prompts[digest] = prompt

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""
        self._prompts.pop(digest, None)
        self._later(lambda: self._discard(digest))

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered: its thread runs and has not failed."""
        return self._failure is None and self._thread.is_alive()

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
            self._turns += 1
            ticket = _Ticket(work, self._held(work.digest), self._turns, asyncio.get_running_loop())
            self._waiting.append(ticket)
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
            if not ticket.is_over:  # the client has gone
                ticket.is_over = True
                self._forget(ticket)
                self._later(lambda: self._drop(ticket))

    async def call(self, task: Callable[[Compiled], Result]) -> Result:
        """Run `task` on the model's thread between two steps; see Engine."""
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

    def _held(self, digest: str | None) -> Prompt | None:
        if digest is None:
            return None
        if digest not in self._prompts:
            raise PromptGone("The model was removed a moment ago.")
        return self._prompts[digest]

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
        """Does what has been asked for, read and admits some texts, takes a step. False when there is nothing more to do."""
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

        Owners with the fewest running rows come first, then those whose turn was longest ago; of one owner the same
        holds for prompts, then the order of arrival. A row that waits for memory is passed by at most MAX_PASSED others.
        """
        taken = [*joining, *self._reading]
        skipped: list[_Ticket] = []
        while len(self._lanes) + len(taken) < self.max_rows:
            with self._wake:
                candidates = [ticket for ticket in self._waiting if ticket not in skipped]
            if not candidates:
                return None
            ticket = min(candidates, key=self._rank)
            if ticket.is_over or not self._prepare(ticket):
                self._forget(ticket)
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

    def _rank(self, ticket: _Ticket) -> tuple[int, int, int, int]:
        owner, digest = ticket.work.owner, ticket.work.digest or ""
        return (
            self._load[(owner,)],
            self._served.get(owner, 0),
            self._load[(owner, digest)],
            ticket.number,
        )

    def _prepare(self, ticket: _Ticket) -> bool:
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

    def _start(self, ticket: _Ticket, row: Request) -> None:
        self._turns += 1
        owner = ticket.work.owner
        self._served[owner] = self._turns
        self._count(ticket, 1)
        self._running[id(row)] = ticket
        if not ticket.waiting:
            self._forget(ticket)

    def _count(self, ticket: _Ticket, rows: int) -> None:
        owner, digest = ticket.work.owner, ticket.work.digest or ""
        for key in ((owner,), (owner, digest)):
            self._load[key] += rows
            if not self._load[key]:
                del self._load[key]

    def _forget(self, ticket: _Ticket) -> None:
        with self._wake:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _requests(self, ticket: _Ticket) -> list[Request]:
        work, prompt = ticket.work, self._compiled_prompt(ticket.work.digest, ticket.prompt)
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
            self._count(ticket, -1)
            if row.failure is not None:
                self._refuse(ticket, row.failure)
                continue
            ticket.tell(_finished(row))
            ticket.left -= 1
            if not ticket.left:
                ticket.is_over = True  # nothing is left to cancel
                ticket.tell(None)

    def _refuse(self, ticket: _Ticket, error: BaseException) -> None:
        """Fails a whole work."""
        if not ticket.is_over:
            ticket.tell(error)
        self._drop(ticket)

    def _drop(self, ticket: _Ticket) -> None:
        """Removes the rows of a request that nobody waits for, before the next step."""
        ticket.is_over = True
        self._forget(ticket)
        for row in ticket.rows:
            if self._running.pop(id(row), None) is not None:
                self._count(ticket, -1)
                self._lanes.cancel(row)
                if row in self._reading:
                    self._reading.remove(row)

    def _restart(self, error: BaseException) -> None:
        """The running batch broke, and what it holds may be wrong: its rows fail, and a new one takes its place."""
        log.error("The running batch failed and is made again.", exc_info=error)
        failure = EngineFailed("The server failed while it answered. Its log says why; try again.")
        self._lanes = Lanes(self.lm, max_rows=self.max_rows, memory_bytes=self.memory_bytes)
        for ticket in {id(ticket): ticket for ticket in self._running.values()}.values():
            self._refuse(ticket, failure)
        self._reading.clear()

    def _cut_everything(self) -> None:
        error = ShuttingDown(
            "The server is shutting down, and this answer was not finished. Ask another one."
        )
        self._refuse_all(error)

    def _refuse_all(self, error: BaseException) -> None:
        with self._wake:
            waiting = list(self._waiting)
        for ticket in {id(ticket): ticket for ticket in (*self._running.values(), *waiting)}.values():
            self._refuse(ticket, error)

    def _fail(self, error: BaseException) -> None:
        failure = EngineFailed(
            "The engine has failed, and its server must be started again. Its log says why."
        )
        with self._wake:
            self._failure = error
            tasks = list(self._tasks)
            self._tasks.clear()
            tickets = [*self._waiting, *self._running.values()]
            self._waiting.clear()
        self._running.clear()
        for ticket in {id(ticket): ticket for ticket in tickets}.values():
            ticket.is_over = True
            ticket.tell(failure)
        for task in tasks:
            task.fail(failure)

    def _discard(self, digest: str) -> None:
        if digest not in self._prompts:  # it may have been loaded again
            self._compiled.pop(digest, None)

    def _compiled_by_digest(self, digest: str | None) -> CompiledPrompt:
        return self._compiled_prompt(digest, self._held(digest))

    def _compiled_prompt(self, digest: str | None, prompt: Prompt | None) -> CompiledPrompt:
        """A compiled prompt, the most recently used ones kept within a budget of bytes."""
        if digest not in self._compiled:
            self._compiled[digest] = compile_prompt(self.lm, prompt)
        self._compiled.move_to_end(digest)
        while (
            len(self._compiled) > 1 and sum(kept.bytes for kept in self._compiled.values()) > COMPILED_BYTES
        ):
            self._compiled.popitem(last=False)
        return self._compiled[digest]


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


def _teller(ticket: _Ticket, row: Request) -> Callable[[str], None]:
    told = 0

    def tell(text: str) -> None:
        nonlocal told
        ids = tuple(row.token_ids[told:])
        told += len(ids)
        ticket.tell(Piece(row.sample, text, ids))

    return tell
