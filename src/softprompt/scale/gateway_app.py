"""The gateway's HTTP side: keys, names and limits are settled here, before a request goes to an engine."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.requests import ClientDisconnect

from softprompt.scale.followed import Followed, FollowedChoices, FollowedColumns, FollowedResponse
from softprompt.scale.gateway import (
    CHAT,
    COMPARE,
    COMPLETIONS,
    RESPONSES,
    SCORE,
    Asked,
    Gateway,
    is_stream,
)
from softprompt.scale.peer import BASE, Model, Whole
from softprompt.serving.app import PAGE, POLICY
from softprompt.serving.connection import while_connected
from softprompt.serving.keys import Caller, Keys
from softprompt.serving.limits import BodyLimit, Rows
from softprompt.serving.refusals import Refused, answer_errors, no_such_model, too_many
from softprompt.serving.streams import EventStream

KEYS_EVERY_SECONDS = 1.0
PASSED = (COMPLETIONS, CHAT, RESPONSES, COMPARE, SCORE, "/v1/softprompt/figures", "/tokenize", "/detokenize")

log = logging.getLogger(__name__)


def build_gateway(gateway: Gateway, keys: Keys | None = None) -> FastAPI:
    """The application of a gateway. It looks at its engines while it runs; `app.state.ready` ends it."""
    keys = keys or Keys()
    rows = Rows()
    state = {"ready": True}

    @asynccontextmanager
    async def looking(app: FastAPI) -> AsyncIterator[None]:
        await gateway.look()
        tasks = [asyncio.create_task(gateway.keep_looking()), asyncio.create_task(_refresh(keys))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(peer.close() for peer in gateway.peers))

    app = FastAPI(
        title="softprompt gateway",
        version=version("softprompt"),
        docs_url=None,
        redoc_url=None,
        lifespan=looking,
    )
    app.state.ready, app.state.rows = state, rows
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
        alive = gateway.is_ready
        return JSONResponse(
            {"status": "ok" if alive else "failed", "engines": engines}, 200 if alive else 503
        )

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken: not without an engine, and not while the gateway ends."""
        is_ready = state["ready"] and gateway.is_ready
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
        await demand_engine(request)
        data = [model.record for model in gateway.models() if caller.may_use(model.name)]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        await demand_engine(request)
        return dict(named(name, caller).record)

    async def demand_engine(request: Request) -> None:
        """Waits for an engine where none is there. Raises Refused where none comes, or the client leaves."""
        if not gateway.is_ready:
            await while_connected(request, gateway.wait_ready())

    def named(name: str, caller: Caller) -> Model:
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
        if path in (COMPLETIONS, CHAT, RESPONSES, COMPARE) and body.get("seed") is None:
            # With a seed the answer is the same at every engine, so that another one can go on with it.
            body = {**body, "seed": secrets.randbits(62)}
        choices = _choices(body)
        taken = min(choices, caller.rows)
        if rows.of(caller.name) + taken > caller.rows:
            raise too_many(
                f"{caller.name} has {rows.of(caller.name)} rows running, of at most {caller.rows}."
            )
        lease = rows.take(caller.name, taken)
        try:
            await demand_engine(request)
            asked = Asked(path, body, {name: named(name, caller).digest for name in _names(body, path)})
            followed = _followed(asked, choices)
            if followed is None:
                answer = await while_connected(request, gateway.whole(asked))
                return _response(gateway, asked, answer)
            events = gateway.streamed(asked, followed)
            first = await while_connected(request, anext(events))
            assert isinstance(first, Whole)
            if not is_stream(first):
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


async def _refresh(keys: Keys) -> None:
    while True:
        await asyncio.sleep(KEYS_EVERY_SECONDS)
        try:
            await asyncio.to_thread(keys.refresh)
        except Exception:
            log.exception("The keys could not be looked at.")


async def _bytes(events: AsyncIterator[Whole | bytes]) -> AsyncIterator[bytes]:
    async for event in events:
        assert isinstance(event, bytes)
        yield event


async def _object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ClientDisconnect:
        raise Refused(499, "The client has gone.", code="client_gone") from None
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
