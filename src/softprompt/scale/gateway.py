"""A stateless front for several engines: names are resolved here, and a request outlives the engine that it was put to.

Nothing of a request is kept but what its client has had of the answer. An engine that fails before anything was sent is
replaced by another one without a trace; a stream that has begun goes on at another engine of the same base, kind and
dtype from the tokens that there are. The gateway knows no tokens' meaning and loads no model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from softprompt.scale.followed import (
    Differs,
    Failed,
    Followed,
    FollowedChoices,
    FollowedColumns,
    FollowedResponse,
    sse,
)
from softprompt.scale.peer import BASE, Broken, Model, Peer, Whole
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.app import PAGE, POLICY
from softprompt.serving.connection import while_connected
from softprompt.serving.keys import Caller, Keys
from softprompt.serving.limits import BodyLimit, Rows
from softprompt.serving.refusals import Refused, answer_errors, no_such_model, too_many
from softprompt.serving.streams import EventStream

LOOK_EVERY_SECONDS = 1.0
AGAIN_SECONDS = 0.2  # between rounds over the engines while none answers
# A request may be what kills engines. So after this many engines have died over it, it is given up.
MAX_KILLED = 3
FAULTS = ("shutting_down", "engine_failed", "internal_error")  # codes of an engine's faults in a stream

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
COMPARE, SCORE = "/v1/softprompt/compare", "/v1/softprompt/score"
PASSED = (COMPLETIONS, CHAT, RESPONSES, COMPARE, SCORE, "/tokenize", "/detokenize")

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
            if not peer.is_ready:
                continue
            self.base = self.base or peer.base
            if peer.base != self.base:
                peer.failed("serves another base than the engines before it")
                log.error("%s %s; it gets no requests.", peer.url, peer.problem)

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
        deadline = time.monotonic() + self.settings.patience_seconds
        while True:
            tried: list[Peer] = []
            while (peer := self._next(asked, tried, tries.like)) is not None:
                yield peer
                if tries.killed >= MAX_KILLED:
                    return
                tried.append(peer)
            if (tries.refusal is not None and not tries.broken) or time.monotonic() > deadline:
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
                if first.status != 200 or not _is_stream(first):
                    if not self._is_final(first, peer, tries):
                        continue
                    if head is None:
                        yield first
                        return
                    problem = first.record.get("error") or _unavailable()["error"]
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
        log.warning("%s: %s. Its requests go to the other engines.", peer.url, error)
        peer.failed(str(error))
        tries.broken = True
        tries.killed += error.was_reached
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

    def last(self) -> Whole:
        """The response to a client if no engine gave an answer."""
        if self.refusal is not None and self.refusal.status not in (502, 503, 504):
            return self.refusal
        refused = Refused(503, str(_unavailable()["error"]["message"]), "server_error", "no_engine")
        response = refused.response
        return Whole(503, dict(response.headers), bytes(response.body))


def build_gateway(gateway: Gateway, keys: Keys | None = None) -> FastAPI:
    """The application of a gateway. It looks at its engines while it runs; `app.state.ready` ends it."""
    keys = keys or Keys()
    rows = Rows()
    state = {"ready": True}

    @asynccontextmanager
    async def looking(app: FastAPI) -> AsyncIterator[None]:
        await gateway.look()
        task = asyncio.create_task(_look_again(gateway, keys))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await asyncio.gather(*(peer.close() for peer in gateway.peers))

    app = FastAPI(
        title="softprompt gateway",
        version=version("softprompt"),
        docs_url=None,
        redoc_url=None,
        lifespan=looking,
    )
    app.state.ready = state
    app.add_middleware(BodyLimit)
    answer_errors(app, lambda error: gateway.rejected.labels(error.code or str(error.status)).inc(), BASE)

    def caller_of(request: Request) -> Caller:
        return keys.demand_caller(request.headers.get("authorization"))

    @app.get("/health")
    async def health() -> Response:
        """Whether requests can be answered, and by how many engines; which they are is nobody's business."""
        engines = [
            {"ready": peer.is_ready, "running": peer.running, "problem": peer.problem}
            for peer in gateway.peers
        ]
        alive = any(peer.is_ready for peer in gateway.peers)
        return JSONResponse(
            {"status": "ok" if alive else "failed", "engines": engines}, 200 if alive else 503
        )

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken: not without an engine, and not while the gateway ends."""
        is_ready = state["ready"] and any(peer.is_ready for peer in gateway.peers)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/version")
    async def versions() -> dict[str, str]:
        return {"softprompt": version("softprompt")}

    @app.get("/metrics")
    async def measured(request: Request) -> Response:
        """Prometheus' text format; with keys it needs one with admin: true."""
        if keys.are_wanted and not caller_of(request).admin:
            raise Refused(403, "This needs a key with admin: true.", code="not_allowed")
        text = prometheus_client.generate_latest(gateway.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        data = [model.record for model in gateway.models() if caller.may_use(model.name)]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return dict(named(name, caller_of(request)).record)

    def named(name: str, caller: Caller) -> Model:
        if not any(peer.is_ready for peer in gateway.peers):
            raise Refused(503, str(_unavailable()["error"]["message"]), "server_error", "no_engine")
        model = gateway.find(name)
        if model is None or not caller.may_use(name):
            raise no_such_model(name)
        return model

    async def passed(request: Request) -> Response:
        if not state["ready"]:
            raise Refused(
                503, "The gateway is shutting down. Ask another one.", "server_error", "shutting_down"
            )
        caller = caller_of(request)
        body = await _object(request)
        path = request.url.path
        digests = {name: named(name, caller).digest for name in _names(body, path)}
        if path in (COMPLETIONS, CHAT, RESPONSES, COMPARE) and body.get("seed") is None:
            # With a seed the answer is the same at every engine, so that another one can go on with it.
            body = {**body, "seed": secrets.randbits(62)}
        asked = Asked(path, body, digests)
        choices = _choices(body)
        taken = min(choices, caller.rows)
        if rows.of(caller.name) + taken > caller.rows:
            raise too_many(
                f"{caller.name} has {rows.of(caller.name)} rows running, of at most {caller.rows}."
            )
        lease = rows.take(caller.name, taken)
        try:
            followed = _followed(asked, choices)
            if followed is None:
                answer = await while_connected(request, gateway.whole(asked))
                return _response(gateway, asked, answer)
            events = gateway.streamed(asked, followed)
            first = await while_connected(request, anext(events))
            assert isinstance(first, Whole)
            if not _is_stream(first):
                await events.aclose()
                return _response(gateway, asked, first)
            gateway.answered.labels("200").inc()
            closing = lease

            async def end() -> None:
                closing.end()

            stream = EventStream(_bytes(events), [events.aclose, end], _told_headers(first))
            lease = None  # type: ignore[assignment]  # the stream ends it
            return stream
        finally:
            if lease is not None:
                lease.end()

    for path in PASSED:
        app.post(path)(passed)
    return app


async def _look_again(gateway: Gateway, keys: Keys) -> None:
    while True:
        await asyncio.sleep(LOOK_EVERY_SECONDS)
        try:
            await gateway.look()
            await asyncio.to_thread(keys.refresh)
        except Exception:
            log.exception("The engines could not be looked at.")


async def _bytes(events: AsyncIterator[Whole | bytes]) -> AsyncIterator[bytes]:
    async for event in events:
        assert isinstance(event, bytes)
        yield event


async def _object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "body: wanted JSON.") from None
    if not isinstance(body, dict):
        raise Refused(400, "body: wanted a JSON object.")
    return body


def _names(body: dict[str, Any], path: str) -> Iterator[str]:
    """The models that a body names. What is not a name is left to the engine, which says what is wrong."""
    if path == COMPARE:
        columns = body.get("columns")
        given = (
            [each.get("model") for each in columns if isinstance(each, dict)]
            if isinstance(columns, list)
            else []
        )
    elif path == SCORE:
        given = body["models"] if isinstance(body.get("models"), list) else []
    else:
        given = [body.get("model", BASE if path in ("/tokenize", "/detokenize") else None)]
    return (name for name in given if isinstance(name, str))


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


def _choices(body: dict[str, Any]) -> int:
    """The number of answers that a body asks for; 1 for a body that is not well formed, which the engine will refuse."""
    prompts, samples, columns = body.get("prompt"), body.get("n"), body.get("columns")
    if isinstance(columns, list):
        return max(1, len(columns))
    is_list = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return (len(prompts) if is_list and prompts is not None else 1) * (
        samples if isinstance(samples, int) and 0 < samples <= 16 else 1
    )


def _followed(asked: Asked, choices: int) -> Followed | None:
    """The way in which the requested stream is followed; None without a stream."""
    body, model = asked.body, str(asked.body.get("model"))
    if asked.path == COMPARE:
        return FollowedColumns(choices)
    if not body.get("stream"):
        return None
    if asked.path in (COMPLETIONS, CHAT):
        rated = body.get("logprobs") not in (None, False)
        return FollowedChoices(model, choices, tells_ids=bool(body.get("return_token_ids")), rated=rated)
    return FollowedResponse(model) if asked.path == RESPONSES else None


def _response(gateway: Gateway, asked: Asked, answer: Whole) -> Response:
    gateway.answered.labels(str(answer.status)).inc()
    headers = _told_headers(answer)
    if answer.status != 200:
        return Response(answer.content, answer.status, headers, media_type="application/json")
    return JSONResponse(asked.answered(answer.record), headers=headers)


def _told_headers(answer: Whole) -> dict[str, str]:
    """The engine's headers that a client gets."""
    passed_on = ("x-softprompt-digest", "x-softprompt-ignored", "retry-after", "retry-after-ms")
    return {name: answer.headers[name] for name in passed_on if name in answer.headers}


def _digest(answer: Whole) -> str | None:
    return answer.headers.get("x-softprompt-digest")


def _is_stream(answer: Whole) -> bool:
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


def _unavailable() -> dict[str, Any]:
    return {"error": _error("No engine answers now. Try again in a moment.", "no_engine")}
