"""Common parts of all routes: the caller, the meaning of a model's name for them, and how their works are answered."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from softprompt.serving import wire
from softprompt.serving.answers import Answers
from softprompt.serving.catalogue import BASE, Catalogue, Served
from softprompt.serving.connection import while_connected
from softprompt.serving.engine import Engine, Work
from softprompt.serving.inputs import Input, demand_in_vocabulary, steering
from softprompt.serving.keys import Caller, Keys
from softprompt.serving.limits import Lease, Rows
from softprompt.serving.metrics import Metrics
from softprompt.serving.refusals import Refused, no_such_model, too_many
from softprompt.serving.steering import Grammars
from softprompt.serving.streams import EventStream, numbered

AT_ONCE = 64  # rows of one request that wait or run at once; the others of it follow


class Service:
    """One server's engine, models, keys and counts."""

    def __init__(self, engine: Engine, catalogue: Catalogue, keys: Keys, *, strict: bool = False) -> None:
        self.engine, self.catalogue, self.keys, self.strict = engine, catalogue, keys, strict
        self.lm = engine.lm
        self.metrics = Metrics(engine.health)
        self.rows = Rows()
        self.grammars = Grammars()
        self.is_ready = True  # not while the server ends

    def caller_of(self, request: Request) -> Caller:
        """The caller. Raises Refused for a key that is missing or not known."""
        return self.keys.demand_caller(request.headers.get("authorization"))

    def demand_admin(self, request: Request) -> None:
        """Raises Refused for a key that may not administrate."""
        if not self.caller_of(request).admin:
            raise Refused(403, "This needs a key with admin: true.", code="not_allowed")

    def served_by(self, name: str, caller: Caller) -> Served:
        """The prompt or base that a model's name means for a caller. Raises Refused if it does not exist for them."""
        served = self.catalogue.find(name)
        if served is None or not caller.may_use(name):
            raise no_such_model(name)
        return served

    def asked_by(self, body: wire.Decoding, request: Request) -> tuple[Caller, Served]:
        """The caller and the model. Raises Refused, also for fields that are not known where the server is strict."""
        caller = self.caller_of(request)
        served = self.served_by(body.model, caller)
        self.demand_known(body)
        return caller, served

    def demand_known(self, body: wire.Body) -> None:
        """Raises Refused for unknown fields where the server is strict."""
        if self.strict and body.ignored:
            raise Refused(400, f"Unknown fields: {', '.join(body.ignored)}.", param=body.ignored[0])

    def works(
        self,
        body: wire.Decoding,
        served: Served,
        inputs: Sequence[Input],
        caller: Caller,
        longest: int | None,
        top: int | None,
    ) -> list[Work]:
        """The engine's work for a request, one entry for each input (and sample, where samples are all the same)."""
        demand_in_vocabulary(body, self.lm.vocab_size)
        rows_each = body.decode_settings(longest, False).n
        each = body.samples // rows_each
        begun = [tuple(ids) for ids in body.begun or []]
        if begun and (len(begun) != len(inputs) * body.samples or body.seed is None or top is not None):
            raise Refused(
                400,
                f"softprompt.begun: wanted {len(inputs) * body.samples} lists of token ids, one for each choice, with a seed "
                "and without log-probabilities.",
                param="softprompt.begun",
            )
        return [
            Work(
                served.digest,
                given,
                body.decode_settings(longest, top is not None),  # a fresh seed, unless one was given
                caller.name,
                top or 0,
                steering(body, given, self.grammars),
                tuple(begun[number * rows_each : (number + 1) * rows_each]),
            )
            for number, given in enumerate(given for given in inputs for _ in range(each))
        ]

    async def respond(
        self, answers: Answers, asked: Sequence[Work], body: wire.Decoding, caller: Caller, request: Request
    ) -> Response:
        """The answer to works of one body, whole or as a stream. A client that leaves cancels them."""
        samples = asked[0].settings.n
        if samples > caller.rows:
            raise Refused(
                400, f"n: found {samples}, and {caller.name} may run {caller.rows} rows.", param="n"
            )
        at_once = max(1, min(AT_ONCE, caller.rows) // samples)
        taken = min(len(asked), at_once) * samples
        if self.rows.of(caller.name) + taken > caller.rows:
            raise too_many(
                f"{caller.name} has {self.rows.of(caller.name)} rows running and asks for {taken}, of at most {caller.rows}."
            )
        lease: Lease | None = self.rows.take(caller.name, taken)
        events = numbered(self.engine, asked, samples, at_once, self.metrics.request(body.model))
        headers = headers_of(body, asked[0].digest)
        try:
            if not body.stream:
                whole = await while_connected(request, answers.gathered(events))
                return JSONResponse(whole, headers=headers)
            # The first answer is waited for, so that what is refused is an error and not a broken stream.
            first = await while_connected(request, anext(events))
            streaming = EventStream(answers.streamed(first, events), [events.aclose, ending(lease)], headers)
            lease = None  # the stream ends it
            return streaming
        finally:
            if lease is not None:
                await events.aclose()
                lease.end()


def ending(lease: Lease | None) -> Callable[[], Coroutine[Any, Any, Any]]:
    """A function that gives a lease back when an answer has ended."""

    async def end() -> None:
        if lease is not None:
            lease.end()

    return end


def headers_of(body: wire.Body, digest: str | None) -> dict[str, str]:
    """The headers of an answer: the prompt that gave it, and the fields that were ignored."""
    headers = {"x-softprompt-digest": digest or BASE}
    if body.ignored:  # a client's own words: quoted, so that they cannot be another header
        headers["x-softprompt-ignored"] = ", ".join(quote(name, errors="replace") for name in body.ignored)[
            :1000
        ]
    return headers
