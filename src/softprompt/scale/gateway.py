"""A stateless front for several engines: names are resolved here, and a request outlives the engine that it was put to.

Nothing of a request is kept but what its client has had of the answer. An engine that fails before anything was sent is
replaced by another one without a trace; a stream that has begun goes on at another engine of the same base, kind and
dtype from the tokens that there are. The gateway knows no tokens' meaning and loads no model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import prometheus_client

from softprompt.scale.followed import (
    Differs,
    Failed,
    Followed,
)
from softprompt.scale.peer import BASE, Broken, Model, Peer, Whole
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.answers import sse
from softprompt.serving.refusals import Refused

AGAIN_SECONDS = 0.2  # between rounds over the engines while none answers
LOOK_EVERY_SECONDS = 1.0  # at an engine that takes requests; at the others every AGAIN_SECONDS
# A request may be what kills engines. So after this many engines have died over it, it is given up.
MAX_KILLED = 3
OTHER_BASE = "serves another base than the engines before it"
FAULTS = ("shutting_down", "engine_failed", "internal_error")  # codes of an engine's faults in a stream

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
COMPARE, SCORE = "/v1/softprompt/compare", "/v1/softprompt/score"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request as its client sent it, and the prompt that each of its names means: the same one until its end."""

    path: str
    body: dict[str, Any]
    digests: dict[str, str]

    def at(self, peer: Peer) -> dict[str, Any]:
        """The body with the names that the prompts have at an engine."""

        def there(name: Any) -> Any:
            return (peer.named(self.digests[name]) or name) if name in self.digests else name

        return _renamed(self.body, there)

    def answered(self, record: dict[str, Any]) -> dict[str, Any]:
        """An answer with the client's own names."""
        if "model" in record and isinstance(self.body.get("model"), str):
            record = {**record, "model": self.body["model"]}
        if self.path == SCORE:
            data = zip(record["data"], self.body["models"], strict=True)
            record = {**record, "data": [{**each, "model": name} for each, name in data]}
        return record


class Gateway:
    """The engines, what they serve together, and how requests are put to them."""

    def __init__(self, peers: Sequence[Peer], settings: GatewaySettings) -> None:
        self.peers, self.settings = list(peers), settings
        self.base: str | None = None
        self.registry = prometheus_client.CollectorRegistry()
        named: Any = {"registry": self.registry, "namespace": "softprompt_gateway"}
        counter = prometheus_client.Counter
        self.answered = counter("requests", "Requests answered, by status.", ["status"], **named)
        self.retried = counter("retries", "Requests put to another engine, by reason.", ["reason"], **named)
        self.resumed = counter("resumed_streams", "Streams that went on at another engine.", **named)
        self.cut = counter("cut_streams", "Streams that ended with an error.", **named)
        self.rejected = counter("request_rejected", "Requests refused here, by reason.", ["reason"], **named)
        gauge = prometheus_client.Gauge
        gauge("engines_ready", "Engines that take requests.", **named).set_function(
            lambda: sum(peer.is_ready for peer in self.peers)
        )
        gauge("requests_running", "Requests that are with engines.", **named).set_function(
            lambda: sum(peer.running for peer in self.peers)
        )

    async def look(self) -> None:
        """Ask every engine what it serves now. Only engines of one base are used: that of the first one that answered."""
        await asyncio.gather(*(peer.look() for peer in self.peers))
        for peer in self.peers:
            self._demand_base(peer, is_known=False)

    async def keep_looking(self) -> None:
        """Look at the engines until this is cancelled. One that answers slowly does not delay the looks at the others."""
        looking: dict[Peer, asyncio.Task[None]] = {}
        due: dict[Peer, float] = {}
        try:
            while True:
                for peer in self.peers:
                    is_due = time.monotonic() >= due.get(peer, 0.0) or not peer.is_ready
                    if is_due and (peer not in looking or looking[peer].done()):
                        due[peer] = time.monotonic() + LOOK_EVERY_SECONDS
                        looking[peer] = asyncio.create_task(self._look_at(peer))
                await asyncio.sleep(AGAIN_SECONDS)
        finally:
            for task in looking.values():
                task.cancel()
            await asyncio.gather(*looking.values(), return_exceptions=True)

    async def _look_at(self, peer: Peer) -> None:
        is_known = peer.problem == OTHER_BASE
        try:
            await peer.look()
        except Exception:
            log.exception("%s could not be looked at.", peer.url)
        self._demand_base(peer, is_known=is_known)

    def _demand_base(self, peer: Peer, *, is_known: bool) -> None:
        """Sends nothing to an engine of another base than that of the first one that answered."""
        if not peer.is_ready:
            return
        self.base = self.base or peer.base
        if peer.base != self.base:
            peer.failed(OTHER_BASE)
            if not is_known:
                log.error("%s %s; it gets no requests.", peer.url, OTHER_BASE)

    @property
    def is_ready(self) -> bool:
        """Whether any engine takes requests."""
        return any(peer.is_ready for peer in self.peers)

    async def wait_ready(self) -> None:
        """Return when an engine takes requests. Raises Refused (503) where none does until patience ends.

        Names mean nothing without an engine, so this comes before a request is looked at."""
        deadline = time.monotonic() + self.settings.patience_seconds
        while not self.is_ready:
            if time.monotonic() > deadline:
                raise no_engine()
            await asyncio.sleep(AGAIN_SECONDS)

    def models(self) -> list[Model]:
        """All models of the engines that take requests, the base first; each name as most engines mean it."""
        names = dict.fromkeys(name for peer in self._ready() for name in peer.models)
        return [model for name in names if (model := self.find(name)) is not None]

    def find(self, name: str) -> Model | None:
        """The prompt that a name means now: engines that watch one library may differ for a moment after a switch."""
        digests = [peer.models[name] for peer in self._ready() if name in peer.models]
        if not digests:
            return None
        most = Tally(model.digest for model in digests).most_common(1)[0][0]
        return next(model for model in digests if model.digest == most)

    def _ready(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.is_ready]

    def _next(self, asked: Asked, tried: Sequence[Peer], like: str | None) -> Peer | None:
        """The engine with the least to do of those that hold the prompts and were not tried, and that are `like`, if given."""
        able = [
            peer
            for peer in self._ready()
            if peer not in tried
            and all(peer.named(digest) is not None for digest in asked.digests.values())
            and (like is None or _sort(peer) == like)
        ]
        return min(able, key=lambda peer: peer.running, default=None)

    async def engines(self, asked: Asked, tries: _Tries) -> AsyncIterator[Peer]:
        """Engines to try, one after the other, until patience ends. An engine that failed is tried again when it is well."""
        while True:
            tried: list[Peer] = []
            while (peer := self._next(asked, tried, tries.like)) is not None:
                yield peer
                if tries.killed >= MAX_KILLED:
                    return
                tried.append(peer)
            has_waited = time.monotonic() - tries.since > self.settings.patience_seconds
            if (tries.refusal is not None and not tries.broken) or has_waited:
                return
            tries.broken = False
            await asyncio.sleep(AGAIN_SECONDS)

    async def whole(self, asked: Asked) -> Whole:
        """A whole answer, of the first engine that gives one."""
        tries = _Tries()
        async for peer in self.engines(asked, tries):
            try:
                answer = await peer.ask("POST", asked.path, asked.at(peer))
            except Broken as error:
                self._broke(peer, error, tries)
                continue
            if self._is_final(answer, peer, tries):
                return answer
        return tries.last()

    async def streamed(self, asked: Asked, followed: Followed) -> AsyncGenerator[Whole | bytes, None]:
        """First what the answer's headers are, or a whole answer that is no stream; then the events that the client gets."""
        tries = _Tries()
        head: Whole | None = None
        has_sent = False
        problem: dict[str, Any] | None = None
        async for peer in self.engines(asked, tries):
            followed.begin()
            events = peer.stream(asked.path, followed.body(asked.at(peer)))
            try:
                first = await anext(events)
                assert isinstance(first, Whole)
                if first.status != 200 or not is_stream(first):
                    if not self._is_final(first, peer, tries):
                        # A client that has a part of its answer cannot ask again: a full queue is waited out.
                        tries.broken |= head is not None and first.status == 429
                        continue
                    if head is None:
                        yield first
                        return
                    problem = first.record.get("error") or no_engine().body["error"]
                    break
                if head is None:
                    head = first
                    yield first
                elif _digest(first) != _digest(
                    head
                ):  # a name was switched meanwhile: another prompt's answer
                    tries.broken = True
                    continue
                elif has_sent:
                    self.resumed.inc()
                tries.like = _sort(peer)
                async for data in events:
                    assert isinstance(data, str)
                    for event in followed.take(data):
                        has_sent = True
                        tries.since = time.monotonic()
                        yield event
                if followed.is_done:
                    return
                raise Broken("ended a stream before its end")
            except Broken as error:
                self._broke(peer, error, tries)
            except Failed as error:
                if not _is_fault(error.record):  # of the request itself: any engine would say so
                    problem = error.record
                    break
                tries.broken = True
                self.retried.labels("failed").inc()
            except Differs:
                log.error("%s gave another answer than the engine before it.", peer.url)
                problem = _error(
                    "The engine failed, and another one answers differently. Send the request again.",
                    "engines_differ",
                )
                break
            finally:
                await events.aclose()
            if has_sent and not self.settings.resume_streams:
                break
        if head is None:
            yield tries.last()
            return
        self.cut.inc()
        problem = problem or _error(
            "The engine failed in the middle of the answer. Send the request again.", "engine_failed"
        )
        if asked.path == RESPONSES:
            detail = {name: problem.get(name) for name in ("code", "message", "param")}
            yield sse({"type": "error", "sequence_number": 1_000_000, **detail}, "error")
        else:
            yield sse({"error": problem})

    def _broke(self, peer: Peer, error: Broken, tries: _Tries) -> None:
        log.warning("%s: %s. Its requests go to the other engines.", peer.url, str(error).rstrip("."))
        peer.failed(str(error))
        tries.broken = True
        if error.was_reached:  # at most MAX_KILLED times
            tries.killed += 1
            tries.since = time.monotonic()
        self.retried.labels("broken").inc()

    def _is_final(self, answer: Whole, peer: Peer, tries: _Tries) -> bool:
        """Whether the client gets this answer; if not, it is kept in case that no other engine gives a better one."""
        is_other = answer.status == 400 and _code(answer) == "not_supported"  # by this kind of engine
        if answer.status not in (404, 429, 500, 502, 503, 504) and not is_other:
            return True
        tries.refusal = answer
        if answer.status in (502, 503, 504):  # it ends, or is not there yet
            peer.failed(f"answers {answer.status}")
            tries.broken = True
        tries.killed += answer.status == 500
        self.retried.labels(str(answer.status)).inc()
        return False


@dataclass
class _Tries:
    """The attempts at a request so far."""

    refusal: Whole | None = None  # the last answer that another engine may better
    broken: bool = False  # whether an engine of this round may come back
    killed: int = 0
    like: str | None = None  # the sort of engine that has to go on
    # When an engine last had the request or answered: patience is for the time without one, however long an answer takes.
    since: float = field(default_factory=time.monotonic)

    def last(self) -> Whole:
        """The response to a client if no engine gave an answer."""
        if self.refusal is not None and self.refusal.status not in (502, 503, 504):
            return self.refusal
        response = (killed_engines() if self.killed >= MAX_KILLED else no_engine()).response
        return Whole(503, dict(response.headers), bytes(response.body))


def _renamed(body: dict[str, Any], there: Any) -> dict[str, Any]:
    body = dict(body)
    if "model" in body:
        body["model"] = there(body["model"])
    if isinstance(body.get("models"), list):
        body["models"] = [there(name) for name in body["models"]]
    if isinstance(body.get("columns"), list):
        body["columns"] = [
            {**each, "model": there(each["model"])} if isinstance(each, dict) and "model" in each else each
            for each in body["columns"]
        ]
    return body


def _digest(answer: Whole) -> str | None:
    return answer.headers.get("x-softprompt-digest")


def is_stream(answer: Whole) -> bool:
    return str(answer.headers.get("content-type", "")).startswith("text/event-stream")


def _sort(peer: Peer) -> str:
    """Engines of one sort give one answer: the same kind of engine with the same dtype."""
    about = peer.models[BASE].record.get("softprompt") or {} if BASE in peer.models else {}
    return f"{about.get('engine')} {about.get('dtype')}"


def _is_fault(record: dict[str, Any]) -> bool:
    return record.get("code") in FAULTS or record.get("type") == "server_error"


def _code(answer: Whole) -> str | None:
    error = answer.record.get("error")
    return error.get("code") if isinstance(error, dict) else None


def _error(message: str, code: str) -> dict[str, Any]:
    return {"message": message, "type": "server_error", "param": None, "code": code}


def no_engine() -> Refused:
    """503: no engine answers."""
    return Refused(503, "No engine answers now. Try again in a moment.", "server_error", "no_engine")


def killed_engines() -> Refused:
    """503: the engines stopped answering while they had this request."""
    return Refused(
        503,
        f"{MAX_KILLED} engines stopped answering while they had this request, so it is not sent to another one.",
        "server_error",
        "engines_killed",
    )
