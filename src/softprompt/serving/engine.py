"""The engine behind a server: requests under any prompt, continued side by side by one thread that owns the model.

An Engine is a protocol, so that other engines can stand in its place; LocalEngine runs inference.running_batch. Every
answer is the one that its request gets alone, whatever joins, leaves or is cancelled beside it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.errors import NotFinite, SoftPromptError
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.running_batch import Request, Running, request
from softprompt.inference.sampling import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt

Result = TypeVar("Result")

MAX_ROWS = 32
COMPILED_BYTES = 2 * 10**9  # of compiled prompts that are kept


class Overloaded(SoftPromptError):
    """The queue is full; try again later."""


class ShuttingDown(SoftPromptError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Work:
    """What is asked for: a prompt by its digest (None: the base alone), an input, how to decode, and for whom.

    `given` is a text, an example, or the marks of a whole sequence (token ids, and -1 - i for vector i)."""

    digest: str | None
    given: str | Example | Sequence[int]
    settings: DecodeSettings
    owner: str = ""


@dataclass(frozen=True)
class Piece:
    """New text of one sample, as soon as it is certain."""

    sample: int
    text: str


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


Answer = Piece | Finished


class Engine(Protocol):
    """What a server needs of an engine."""

    def load(self, prompt: Prompt, digest: str) -> None:
        """Hold a prompt ready; requests name it by its digest."""

    def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes. Leaving the iterator early cancels the work."""

    async def call(self, task: Callable[[Callable[[str | None], CompiledPrompt]], Result]) -> Result:
        """Run a task that needs the model between two steps; it is given a way to the compiled prompts."""

    def health(self) -> dict[str, int]:
        """Rows running and waiting, and bytes of their keys and values."""


@dataclass(eq=False)
class _Ticket:
    work: Work
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[Answer | BaseException | None]
    rows: list[Request] = field(default_factory=list)
    left: int = 0
    cancelled: bool = False

    def tell(self, answer: Answer | BaseException | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)
        except RuntimeError:
            self.cancelled = True  # the loop has ended, and nobody waits any more


class LocalEngine:
    """An engine in this process. Use `start` and `stop`, or as a context."""

    def __init__(
        self,
        lm: FrozenLM,
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int = 256,
        memory_bytes: int | None = None,
    ) -> None:
        self.lm = lm
        self.max_waiting = max_waiting
        self._running = Running(lm, max_rows=max_rows, memory_bytes=memory_bytes)
        self._prompts: dict[str, Prompt] = {}
        self._compiled: OrderedDict[str | None, CompiledPrompt] = OrderedDict()
        self._tickets: dict[int, _Ticket] = {}
        self._waiting: deque[_Ticket] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Take nothing more, let what runs come to its end for so long, then cut it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(grace_seconds)
        if self._thread.is_alive():
            with self._wake:
                self._tasks.append(self._cut_everything)
                self._wake.notify()
            self._thread.join(10)

    def __enter__(self) -> LocalEngine:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop(0.0 if error[0] else 30.0)

    def load(self, prompt: Prompt, digest: str) -> None:
        """Hold a prompt ready. Raises WrongBase where it belongs to another base."""
        prompt.base.demand(self.lm.fingerprint, prompt.name)
        self._prompts[digest] = prompt

    def unload(self, digest: str) -> None:
        """Let go of a prompt; rows that run under it go on."""
        self._prompts.pop(digest, None)
        with self._wake:
            self._tasks.append(lambda: self._discard(digest))
            self._wake.notify()

    def health(self) -> dict[str, int]:
        """Rows running and waiting, and bytes of their keys and values."""
        return {"running": len(self._running), "waiting": len(self._waiting), "kv_bytes": self._running.bytes}

    async def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes; see Engine. Raises Overloaded where too much is waiting."""
        ticket = _Ticket(work, asyncio.get_running_loop(), asyncio.Queue())
        with self._wake:
            if self._stopping:
                raise ShuttingDown("The server is shutting down. Ask another one.")
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already. Try again in a moment.")
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
            if not ticket.cancelled:
                ticket.cancelled = True
                with self._wake:
                    self._tasks.append(lambda: self._drop(ticket))
                    self._wake.notify()

    async def call(self, task: Callable[[Callable[[str | None], CompiledPrompt]], Result]) -> Result:
        """Run `task` on the model's thread between two steps; see Engine."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(task(self._prompt))
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping:
                raise ShuttingDown("The server is shutting down. Ask another one.")
            self._tasks.append(run)
            self._wake.notify()
        return await asyncio.wrap_future(future)

    # What follows runs on the engine's own thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._tasks or self._waiting or len(self._running) or self._stopping):
                    self._wake.wait()
                tasks = list(self._tasks)
                self._tasks.clear()
                if self._stopping and not (tasks or self._waiting or len(self._running)):
                    return
            for task in tasks:
                task()
            self._admit()
            if len(self._running):
                self._settle(self._running.step)

    def _admit(self) -> None:
        """Let waiting requests join: owners in turn, each one's in their order, as many as there is room for."""
        joining: list[Request] = []
        tickets: list[_Ticket] = []
        with self._wake:
            waiting = _in_turn(list(self._waiting))
        for ticket in waiting:
            if ticket.cancelled:
                self._forget(ticket)
                continue
            try:
                rows = ticket.rows or self._requests(ticket)
                if not self._running.fits([*joining, *rows]):
                    break
            except SoftPromptError as error:
                self._forget(ticket)
                ticket.tell(error)
                continue
            except Exception as error:
                self._forget(ticket)
                ticket.tell(error)
                continue
            self._forget(ticket)
            joining += rows
            tickets.append(ticket)
        for ticket in tickets:
            ticket.left = len(ticket.rows)
            for row in ticket.rows:
                self._tickets[id(row)] = ticket
        if joining:
            self._settle(lambda: self._running.admit(joining))

    def _discard(self, digest: str) -> None:
        self._compiled.pop(digest, None)

    def _forget(self, ticket: _Ticket) -> None:
        with self._wake:
            self._waiting.remove(ticket)

    def _requests(self, ticket: _Ticket) -> list[Request]:
        work, prompt = ticket.work, self._prompt(ticket.work.digest)
        first = request(self.lm, prompt, work.given, work.settings, on_text=_teller(ticket, 0))
        ticket.rows = [first]
        for sample in range(1, work.settings.drawn):
            ticket.rows.append(
                request(
                    self.lm,
                    prompt,
                    work.given,
                    work.settings,
                    sample=sample,
                    row=first.row,
                    on_text=_teller(ticket, sample),
                )
            )
        return ticket.rows

    def _settle(self, advance: Callable[[], list[Request]]) -> None:
        """Take a step, and tell whoever is done. A row whose numbers broke fails alone."""
        before = self._running.requests
        try:
            done = advance()
        except NotFinite as error:
            running = {id(row) for row in self._running.requests}
            done = [row for row in before if id(row) not in running and row.finish_reason != "cancelled"]
            for row in before:
                if id(row) not in running and row.finish_reason == "cancelled":
                    self._end(row, error)
        for row in done:
            self._end(row, None)

    def _end(self, row: Request, error: BaseException | None) -> None:
        ticket = self._tickets.pop(id(row), None)
        if ticket is None:
            return
        if error is not None:
            ticket.tell(error)
            return
        marks = row.row.marks
        virtual = sum(mark < 0 for mark in marks)
        ticket.tell(
            Finished(
                row.sample,
                row.text,
                row.finish_reason or "stop",
                tuple(row.token_ids),
                tuple(row.log_probabilities),
                len(marks) - virtual,
                virtual,
            )
        )
        ticket.left -= 1
        if not ticket.left:
            ticket.cancelled = True  # nothing is left to cancel
            ticket.tell(None)

    def _drop(self, ticket: _Ticket) -> None:
        """A client has gone: its rows leave before the next step."""
        for row in ticket.rows:
            if self._tickets.pop(id(row), None) is not None:
                self._running.cancel(row)

    def _cut_everything(self) -> None:
        error = ShuttingDown(
            "The server is shutting down, and this answer was not finished. Ask another one."
        )
        for ticket in {id(ticket): ticket for ticket in (*self._tickets.values(), *self._waiting)}.values():
            ticket.tell(error)
            self._drop(ticket)
        with self._wake:
            self._waiting.clear()

    def _prompt(self, digest: str | None) -> CompiledPrompt:
        """A compiled prompt, the most recently used ones kept within a budget of bytes."""
        if digest not in self._compiled:
            prompt = None if digest is None else self._prompts[digest]
            self._compiled[digest] = compile_prompt(self.lm, prompt)
        self._compiled.move_to_end(digest)
        while len(self._compiled) > 1 and sum(one.bytes for one in self._compiled.values()) > COMPILED_BYTES:
            self._compiled.popitem(last=False)
        return self._compiled[digest]


def _in_turn(tickets: Sequence[_Ticket]) -> list[_Ticket]:
    """Tickets such that owners take turns, each one's in their order."""
    by_owner: dict[str, list[_Ticket]] = {}
    for ticket in tickets:
        by_owner.setdefault(ticket.work.owner, []).append(ticket)
    ordered: list[_Ticket] = []
    for place in range(max(map(len, by_owner.values()), default=0)):
        ordered += [own[place] for own in by_owner.values() if place < len(own)]
    return ordered


def _teller(ticket: _Ticket, sample: int) -> Callable[[str], None]:
    return lambda text: ticket.tell(Piece(sample, text))


def now() -> int:
    """Seconds since 1970, as the API counts them."""
    return int(time.time())
