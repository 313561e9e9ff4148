"""Requests in an engine, and whose turn is next: fair among owners, and among the prompts of one owner."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from softprompt.inference.request import Request
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import Answer, Work

REMEMBERED_TURNS = 10_000  # owners and prompts whose last turn is remembered


class Loop(Protocol):
    """The part of an event loop that a ticket needs."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object:
        """Calls back in the loop's own thread. Raises RuntimeError where the loop has ended."""


@dataclass(eq=False)
class Ticket:
    """One work, from its arrival to its last answer. `waiting` are rows that have not joined yet."""

    work: Work
    prompt: Prompt | None
    loop: Loop
    number: int = 0
    answers: asyncio.Queue[Answer | BaseException | None] = field(default_factory=asyncio.Queue)
    rows: list[Request] = field(default_factory=list)
    waiting: list[Request] | None = None
    left: int = 0
    is_over: bool = False
    passed: int = 0

    def tell(self, answer: Answer | BaseException | None) -> None:
        """Hands an answer over to whoever waits for it; None ends the stream."""
        try:
            self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)
        except RuntimeError:
            self.is_over = True  # the loop has ended, and nobody waits any more

    @property
    def _keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys that its rows are counted under: their owner, and their owner's prompt."""
        return (self.work.owner,), (self.work.owner, self.work.digest or "")


class Waiting:
    """The tickets that wait, in order of arrival. Any thread may add one; turns are taken by the engine's thread."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self._tickets: list[Ticket] = []
        self._load: Counter[tuple[str, ...]] = Counter()  # rows running, by owner and by owner and prompt
        self._served: dict[tuple[str, ...], int] = {}  # when the last turn of each was
        self._turns = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._tickets

    def add(self, ticket: Ticket) -> None:
        """Lets a ticket wait, behind those that have arrived before it."""
        with self._lock:
            self._turns += 1
            ticket.number = self._turns
            self._tickets.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Takes a ticket out, if it waits."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets.remove(ticket)

    def all(self) -> list[Ticket]:
        """Those that wait now."""
        with self._lock:
            return list(self._tickets)

    def next(self, skipped: Iterable[Ticket] = ()) -> Ticket | None:
        """Whose turn it is.

        Owners with the fewest running rows come first, then those whose turn was longest ago; of one owner the same
        holds for prompts, then the order of arrival."""
        passed = set(map(id, skipped))
        candidates = [ticket for ticket in self.all() if id(ticket) not in passed]
        return min(candidates, key=self._rank, default=None)

    def take_turn(self, ticket: Ticket) -> None:
        """Counts a row of the ticket as running, and its owner's and prompt's turn as taken."""
        self._turns += 1
        for key in ticket._keys:
            self._load[key] += 1
            self._served.pop(key, None)  # the latest turn is the last entry
            self._served[key] = self._turns
        while len(self._served) > REMEMBERED_TURNS:
            del self._served[next(iter(self._served))]

    def end_turn(self, ticket: Ticket) -> None:
        """Counts a row of the ticket as running no longer."""
        for key in ticket._keys:
            self._load[key] -= 1
            if not self._load[key]:
                del self._load[key]

    @property
    def is_idle(self) -> bool:
        """Whether no ticket waits and no row is counted as running."""
        return not self._tickets and not self._load

    def _rank(self, ticket: Ticket) -> tuple[int, ...]:
        counts = [count for key in ticket._keys for count in (self._load[key], self._served.get(key, 0))]
        return (*counts, ticket.number)
