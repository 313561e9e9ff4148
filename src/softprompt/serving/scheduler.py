"""The scheduler of the engine in this process: which rows are read and join between two steps, and what ends them.

Everything here runs on the engine's thread. Rows join one by one as they fit, keys and prompts take turns (waiting.py), long
texts are read in parts, and a fault ends the rows that it belongs to alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import SoftPromptError
from softprompt.inference.lanes import Lanes
from softprompt.inference.prefill import read_on
from softprompt.inference.request import Request, request
from softprompt.serving.engine import EngineFailed, Finished, Piece
from softprompt.serving.held_prompts import HeldPrompts
from softprompt.serving.waiting import Ticket, Waiting

# Text positions read between two steps: what running rows wait for. On a CPU about as long as two or three of their steps.
READ_BESIDE_CPU, READ_BESIDE_GPU = 96, 2048
# Where more requests wait than rows run, as many times that of short texts, up to this: a step of few rows costs nearly
# as much as one of many.
MOST_BESIDE = 8
# Known positions that cost one that is read as much time as its products do (SmolLM2 on a CPU, parts of 128).
KNOWN_AS_ONE = 1700
READ_ALONE = 4096  # where no row runs, so that nobody waits
MAX_SKIPPED = 8  # requests that are looked past in one turn for one that fits
MAX_PASSED = 64  # rows that may join before one that waits for memory; then it is the next

log = logging.getLogger(__name__)


class Scheduler:
    """The rows of an engine: those that wait (in `waiting`), are read, or run."""

    def __init__(
        self,
        lm: FrozenLM,
        prompts: HeldPrompts,
        waiting: Waiting,
        *,
        max_rows: int,
        memory_bytes: int | None = None,
        read_beside: int | None = None,
    ) -> None:
        self.lm, self.max_rows, self.memory_bytes = lm, max_rows, memory_bytes
        on_cpu = torch.device(lm.device).type == "cpu"
        self.read_beside = read_beside or (READ_BESIDE_CPU if on_cpu else READ_BESIDE_GPU)
        self.lanes = Lanes(lm, max_rows=max_rows, memory_bytes=memory_bytes)
        self.running: dict[int, Ticket] = {}  # by id of the row, rows that are being read included
        self.reading: list[Request] = []  # long texts that are read in parts
        self._prompts, self._waiting = prompts, waiting

    @property
    def tickets(self) -> list[Ticket]:
        """Everyone who is still to get something: what waits, is read or runs."""
        return _each(*self._waiting.all(), *self.running.values())

    def admit(self) -> None:
        """Reads some of what waits, between two steps, and lets the rows whose texts have been read join."""
        running = len(self.lanes)
        part = self.read_beside if running else READ_ALONE  # of a long text
        left = part if not running else part * max(1, min(MOST_BESIDE, len(self._waiting) // running))
        joining: list[Request] = []
        for row in self.reading[:1]:
            joining += self._read(row, part)
            left = min(left, part)
        while left > 0 and (coming := self._next(joining)) is not None:
            before, left = left, left - coming.row.rest
            if left >= 0 and coming.row.rest <= part:
                joining.append(coming)
                continue
            self.reading.append(coming)
            if len(self.reading) == 1:  # one long text at a time, a part in every turn
                joining += self._read(coming, min(before, part))
            left = min(left, 0)
        if joining:
            self._join(joining)

    def _read(self, row: Request, positions: int) -> list[Request]:
        """Reads the next part of a long text. Gives back the rows that may join: its last part is read as they do."""
        # Attending to what is known already costs time too, so that later parts are shorter.
        positions = max(1, positions * KNOWN_AS_ONE // (KNOWN_AS_ONE + row.row.known))
        if row.row.rest <= positions:
            self.reading.remove(row)
            return [row]
        ticket = self.running[id(row)]
        try:
            ready = read_on(self.lm, row.row, positions)
        except Exception as error:
            self._refuse(ticket, error)
            return []
        for sample in ticket.rows:  # samples of one text share what has been read of it
            if sample.row is row.row and sample is not row:
                sample.row = ready
        row.row = ready
        return []

    def _next(self, joining: Sequence[Request]) -> Request | None:
        """The row whose turn it is, if it fits beside what runs, is read and is `joining`.

        A row that waits for memory is passed by at most MAX_PASSED others."""
        taken = [*joining, *self.reading]
        skipped: list[Ticket] = []
        while len(self.lanes) + len(taken) < self.max_rows:
            ticket = self._waiting.next(skipped)
            if ticket is None:
                return None
            if ticket.is_over or not self._prepare(ticket):
                self._waiting.remove(ticket)
                continue
            assert ticket.waiting
            if self.lanes.fits([*taken, ticket.waiting[0]]):
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
            self.lanes.demand_possible(ticket.rows[0])
        except Exception as error:
            ticket.is_over = True
            ticket.tell(error)
            return False
        ticket.waiting, ticket.left = list(ticket.rows), len(ticket.rows)
        return True

    def _start(self, ticket: Ticket, row: Request) -> None:
        self._waiting.take_turn(ticket)
        self.running[id(row)] = ticket
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
            done = self.lanes.join(joining)
        except SoftPromptError as error:  # of a text, before any of its keys and values were kept
            for row in joining:
                self.lanes.cancel(row)
            if len(joining) == 1:
                self._refuse(self.running[id(joining[0])], error)
                return
            for row in joining:
                if id(row) in self.running:
                    self._join([self._renewed(row)])
            return
        except Exception as error:
            self._restart(error)
            return
        self._end(done)

    def _renewed(self, row: Request) -> Request:
        """The same request as before it joined."""
        ticket = self.running.pop(id(row))
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
        self.running[id(fresh)] = ticket
        return fresh

    def advance(self) -> None:
        """A step of everything that runs."""
        if not len(self.lanes):
            return
        try:
            done = self.lanes.advance()
        except Exception as error:
            self._restart(error)
            return
        self._end(done)

    def _end(self, done: Sequence[Request]) -> None:
        for row in done:
            ticket = self.running.pop(id(row), None)
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
        self.drop(ticket)

    def drop(self, ticket: Ticket) -> None:
        """Removes the rows of a request that nobody waits for, before the next step."""
        ticket.is_over = True
        self._waiting.remove(ticket)
        for row in ticket.rows:
            if self.running.pop(id(row), None) is not None:
                self._waiting.end_turn(ticket)
                self.lanes.cancel(row)
                if row in self.reading:
                    self.reading.remove(row)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a work in order: every row that has not finished gives what it has."""
        if ticket.is_over:
            return
        unfinished = [row for row in ticket.rows if row.finish_reason is None]
        self.drop(ticket)
        for row in unfinished:
            ticket.tell(replace(_finished(row), reason="cancelled"))
        if not ticket.rows:  # it was never laid out
            ticket.tell(Finished(0, "", "cancelled", (), (), 0, 0))
        ticket.tell(None)

    def _restart(self, error: BaseException) -> None:
        """The running batch broke, and what it holds may be wrong: its rows fail, and a new one takes its place."""
        log.error("The running batch failed and is made again.", exc_info=error)
        failure = EngineFailed("The server failed while it answered. Its log says why; try again.")
        self.lanes = Lanes(self.lm, max_rows=self.max_rows, memory_bytes=self.memory_bytes)
        for ticket in _each(*self.running.values()):
            self._refuse(ticket, failure)
        self.reading.clear()

    def refuse_all(self, error: BaseException) -> None:
        """Fails everything that runs or waits."""
        for ticket in _each(*self.running.values(), *self._waiting.all()):
            self._refuse(ticket, error)


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
