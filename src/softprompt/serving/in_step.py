"""The engine on a base that several processes hold in parts: all take the same turns, and the first one has the clients.

A turn begins with what has come to the first process since the last one: it sends that to the others, and then every
process does the same with it, by the code of LocalEngine. So each reads the same texts and takes the same steps with its
part of the weights, and each chooses the same tokens, since all have the same logits. Nothing that a turn does may
depend on anything else: a client that goes away, too, is a message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import Processes
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.score import RatedToken, rate_continuation, rate_text
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import Work
from softprompt.serving.local_engine import Compiled, LocalEngine, Task, failed
from softprompt.serving.waiting import Loop, Ticket

Result = TypeVar("Result")

BEAT_SECONDS = 60.0  # an empty turn is taken so often, since torch takes a longer silence for a failure


@dataclass(frozen=True)
class Held:
    """A prompt that requests may name from now on."""

    prompt: Prompt
    digest: str


@dataclass(frozen=True)
class Dropped:
    """A prompt that no request names any more."""

    digest: str


@dataclass(frozen=True)
class Arrived:
    """A request, by its number."""

    number: int
    work: Work


@dataclass(frozen=True)
class Left:
    """A request that nobody listens to any more, answered or not."""

    number: int


@dataclass(frozen=True)
class EndedEarly:
    """A request that ends with what it has."""

    number: int


@dataclass(frozen=True)
class Rated:
    """A text whose tokens are to be rated."""

    number: int
    digest: str | None
    given: str | Example | Sequence[int]
    continuation: str | None
    top: int
    end: End


@dataclass(frozen=True)
class CutShort:
    """The grace is over: all that is left is refused."""


Message = Held | Dropped | Arrived | Left | EndedEarly | Rated | CutShort


class EngineInStep(LocalEngine):
    """An engine on a base in parts. The first process uses it as any other; the others `follow`."""

    def __init__(self, lm: FrozenLM, processes: Processes, **limits: Any) -> None:
        super().__init__(lm, **limits)
        self.processes = processes
        self._numbers = itertools.count()
        self._posted: list[Message] = []
        self._by_number: dict[int, Ticket] = {}
        self._ratings: dict[int, tuple[Prompt | None, Future[list[RatedToken]]]] = {}  # of the first process

    def follow(self) -> None:
        """Takes the turns of the first process until it ends in order. Raises BaseError where it does not."""
        while self._turn():
            pass

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt ready. Raises WrongBase where it belongs to another base."""
        super().load(prompt, digest)
        self._post(Held(prompt, digest))

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""
        self._prompts.unload(digest)
        self._post(Dropped(digest))

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Takes nothing more, gives what runs or waits so long to end, then cuts it with an error."""
        self.close()
        if not self._thread.is_alive():
            return
        self._thread.join(grace_seconds)
        if self._thread.is_alive():
            self._post(CutShort())
            self._thread.join(10)

    async def score(
        self,
        digest: str | None,
        given: str | Example | Sequence[int],
        continuation: str | None = None,
        top: int = 0,
        end: End = "never",
    ) -> list[RatedToken]:
        """Rates the tokens of a continuation, or of the input itself; see Engine."""
        future: Future[list[RatedToken]] = Future()
        with self._wake:
            self._demand_open()
            number = next(self._numbers)
            self._ratings[number] = (self._prompts.find(digest), future)
            self._post(Rated(number, digest, given, continuation, top, end))
        return await asyncio.wrap_future(future)

    async def call(self, task: Callable[[Compiled], Result]) -> Result:
        """Not to be had: a function cannot be sent to other processes."""
        raise NotImplementedError("a base in parts rates texts (score) and answers requests (submit) alone")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any request."""
        return super().is_idle and not (self._posted or self._by_number or self._ratings)

    @property
    def _queued(self) -> int:
        return len(self._waiting) + sum(isinstance(message, Arrived) for message in list(self._posted))

    def _arrive(self, ticket: Ticket) -> None:
        number = next(self._numbers)
        ticket.loop = _Mailbox(ticket.loop)
        self._by_number[number] = ticket
        self._post(Arrived(number, ticket.work))

    def _leave(self, ticket: Ticket) -> None:
        self._post(Left(self._number_of(ticket)))

    def _end_early(self, ticket: Ticket) -> None:
        self._post(EndedEarly(self._number_of(ticket)))

    def _number_of(self, ticket: Ticket) -> int:
        return next(number for number, each in list(self._by_number.items()) if each is ticket)

    def _post(self, message: Message) -> None:
        with self._wake:
            self._posted.append(message)
            self._wake.notify()

    # What follows runs on the engine's own thread: in every process, on the same messages.

    def _taken(self) -> list[Task] | None:
        messages: list[Message] = []
        is_ending = False
        if self.processes.first:
            with self._wake:
                if not (self._posted or self._waiting or self._scheduler.running or self._stopping):
                    self._wake.wait(BEAT_SECONDS)
                messages, self._posted = self._posted, []
                is_ending = self._stopping and not (messages or self._waiting or self._scheduler.running)
        messages, is_ending = self.processes.same((messages, is_ending))
        return None if is_ending else [self._task(message) for message in messages]

    def _task(self, message: Message) -> Task:
        return Task(lambda: self._do(message))

    def _do(self, message: Message) -> None:
        match message:
            case Held(prompt, digest):
                if not self.processes.first:  # which holds it already
                    super().load(prompt, digest)
            case Dropped(digest):
                if not self.processes.first:
                    self._prompts.unload(digest)
                self._prompts.forget(digest)
            case Arrived(number, work):
                if not self.processes.first:
                    self._by_number[number] = Ticket(work, self._prompts.find(work.digest), _Mailbox())
                self._waiting.add(self._by_number[number])
            case Left(number):
                ticket = self._by_number.pop(number)
                if not ticket.is_over:
                    self._scheduler.drop(ticket)
            case EndedEarly(number):
                if number in self._by_number:
                    self._scheduler.cancel(self._by_number[number])
            case Rated():
                self._rate(message)
            case CutShort():
                self._cut_everything()

    def _rate(self, asked: Rated) -> None:
        prompt, future = self._ratings.pop(asked.number, (None, Future()))
        if not self.processes.first:
            prompt = self._prompts.find(asked.digest)
        # All processes read the text, also where the client has gone meanwhile.
        is_wanted = future.set_running_or_notify_cancel()
        try:
            rated = self._rated(self._prompts.compiled(asked.digest, prompt), asked)
        except Exception as error:
            if is_wanted:
                future.set_exception(error)
            return
        if is_wanted:
            future.set_result(rated)

    def _rated(self, prompt: CompiledPrompt, asked: Rated) -> list[RatedToken]:
        if asked.continuation is None:
            return rate_text(self.lm, prompt, asked.given, asked.top)
        assert isinstance(asked.given, str | Example), "a continuation follows a text or an example"
        return rate_continuation(self.lm, prompt, asked.given, asked.continuation, asked.top, asked.end)

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        with self._wake:
            ratings, self._ratings = self._ratings, {}
        for ticket in list(self._by_number.values()):  # also of messages that were on their way
            if not ticket.is_over:
                ticket.is_over = True
                ticket.tell(failed())
        for _, future in ratings.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(failed())


class _Mailbox:
    """The loop of a client, whose end changes nothing in a ticket: the other processes would not know of it."""

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object:
        if self._loop is None:
            return None
        try:
            return self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # nobody waits any more
            return None
