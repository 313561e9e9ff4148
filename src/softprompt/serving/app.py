"""The server's routes: OpenAI's completions, chats and responses over an engine. Errors are OpenAI's too, always."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.errors import SoftPromptError
from softprompt.inference.score import RatedToken, rate_continuation, rate_text
from softprompt.serving import wire
from softprompt.serving.answers import Answers, Choices, ResponseShape, by_text, columns, offsets, token_text
from softprompt.serving.catalogue import BASE, LOOK_EVERY_SECONDS, Catalogue, Served
from softprompt.serving.connection import while_connected
from softprompt.serving.engine import Answer, Compiled, Engine, Work
from softprompt.serving.inputs import (
    Input,
    chat_input,
    completion_input,
    demand_in_vocabulary,
    messages,
    steering,
)
from softprompt.serving.keys import Caller, Keys
from softprompt.serving.limits import BodyLimit, Lease, Rows
from softprompt.serving.metrics import Metrics
from softprompt.serving.refusals import Refused, as_refusal, failed, shown_name, too_many
from softprompt.serving.steering import Grammars

PAGE = Path(__file__).parent / "playground.html"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
DEFAULT_NEW_TOKENS = 16  # OpenAI's, of completions
AT_ONCE = 64  # rows of one request that wait or run at once; the others of it follow

log = logging.getLogger(__name__)


def build_app(
    engine: Engine, catalogue: Catalogue, keys: Keys | None = None, *, strict: bool = False
) -> FastAPI:
    """The application over a started engine. `strict` refuses unknown fields instead of naming them in a header."""
    keys = keys or Keys()
    lm = engine.lm
    metrics = Metrics(engine.health)
    rows = Rows()
    grammars = Grammars()
    state = {"ready": True}

    @asynccontextmanager
    async def looking(app: FastAPI) -> AsyncIterator[None]:
        """Look at the library and the keys every so often, beside the answers."""
        task = asyncio.create_task(_every(LOOK_EVERY_SECONDS, catalogue.refresh, keys.refresh))
        try:
            yield
        finally:
            task.cancel()

    app = FastAPI(
        title="softprompt", version=version("softprompt"), docs_url=None, redoc_url=None, lifespan=looking
    )
    app.state.ready = state
    app.add_middleware(BodyLimit)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        metrics.rejected(error.code or str(error.status))
        return error.response

    @app.exception_handler(SoftPromptError)
    async def unfit(request: Request, error: SoftPromptError) -> Response:
        return await refused(request, as_refusal(error, lm.name))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        what = str(first["msg"]).removeprefix("Value error, ")
        return await refused(request, Refused(400, f"{where or 'body'}: {what}.", param=where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = await refused(
            request, Refused(error.status_code, str(error.detail), code=str(error.status_code))
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return failed().response

    def caller_of(request: Request) -> Caller:
        caller = keys.caller(request.headers.get("authorization"))
        if caller is None:
            raise Refused(
                401,
                "The key is missing or not known. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        return caller

    def served_by(name: str, caller: Caller) -> Served:
        served = catalogue.find(name)
        if served is None or not caller.may_use(name):
            raise Refused(
                404,
                f"The model {name!r} does not exist. GET /v1/models lists those that do.",
                code="model_not_found",
                param="model",
            )
        return served

    @app.get("/health")
    async def health() -> Response:
        """Whether answers can be given at all, and what runs and waits."""
        now = engine.health()
        return JSONResponse(
            {"status": "ok" if now["alive"] else "failed", **now}, 200 if now["alive"] else 503
        )

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken: not while the server ends."""
        is_ready = state["ready"] and engine.is_alive
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/version")
    async def versions() -> dict[str, str]:
        return {"softprompt": version("softprompt")}

    @app.get("/metrics")
    async def measured(request: Request) -> Response:
        """Prometheus' text format. It names every model, so that with keys it needs one with admin: true."""
        if keys.are_wanted:
            admin_of(request)
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

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
        return {
            "object": "list",
            "data": [_model(served, lm) for served in catalogue.models() if caller.may_use(served.name)],
        }

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return _model(served_by(name, caller_of(request)), lm)

    @app.post("/v1/completions")
    async def completions(body: wire.CompletionBody, request: Request) -> Response:
        caller = caller_of(request)
        served = served_by(body.model, caller)
        _demand_known(body, strict)
        if body.suffix or (body.best_of or body.samples) > body.samples:
            raise Refused(
                400, "suffix and best_of are not supported.", param="suffix" if body.suffix else "best_of"
            )
        inputs = [completion_input(lm, served, given, body) for given in body.prompts]
        if body.echo:
            return await echoed(body, served, inputs, caller)
        if body.max_tokens == 0:
            raise Refused(400, "max_tokens: wanted at least 1, or echo.", param="max_tokens")
        top = body.logprobs
        return await respond(
            Choices(lm, body, served, len(inputs)),
            works(
                body,
                served,
                inputs,
                caller,
                body.max_tokens or DEFAULT_NEW_TOKENS,
                top,
            ),
            body,
            caller,
            request,
        )

    @app.post("/v1/chat/completions")
    async def chat(body: wire.ChatBody, request: Request) -> Response:
        caller = caller_of(request)
        served = served_by(body.model, caller)
        _demand_known(body, strict)
        if body.tools:
            raise Refused(400, "tools is not supported by this server.", param="tools")
        given = chat_input(lm, served, messages(body.messages), body.fields, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        longest = body.max_completion_tokens or body.max_tokens
        asked = works(body, served, [given], caller, longest, top)
        return await respond(Choices(lm, body, served, 1), asked, body, caller, request)

    @app.post("/v1/responses")
    async def responses(body: wire.ResponsesBody, request: Request) -> Response:
        caller = caller_of(request)
        served = served_by(body.model, caller)
        _demand_known(body, strict)
        if body.previous_response_id or body.store:
            name = "previous_response_id" if body.previous_response_id else "store"
            raise Refused(
                400,
                f"{name}: this server stores no responses. Send the whole input, and store=false.",
                param=name,
            )
        if body.tools:
            raise Refused(400, "tools is not supported by this server.", param="tools")
        if body.samples > 1:
            raise Refused(400, "n: a response is one answer.", param="n")
        given: Input
        if isinstance(body.input, str) and served.digest is None and not lm.tokenizer.chat_template:
            given = f"{body.instructions}\n\n{body.input}" if body.instructions else body.input
        else:
            given = chat_input(lm, served, messages(body.turns, "input"), body.fields, "input")
        asked = works(body, served, [given], caller, body.max_output_tokens, None)
        return await respond(ResponseShape(lm, body, served), asked, body, caller, request)

    def works(
        body: wire.Decoding,
        served: Served,
        inputs: Sequence[Input],
        caller: Caller,
        longest: int | None,
        top: int | None,
    ) -> list[Work]:
        """The engine's work for a request, one entry for each input (and sample, where samples are all the same)."""
        demand_in_vocabulary(body, lm.vocab_size)
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
                steering(body, given, grammars),
                tuple(begun[number * rows_each : (number + 1) * rows_each]),
            )
            for number, given in enumerate(given for given in inputs for _ in range(each))
        ]

    async def respond(
        answers: Answers, asked: Sequence[Work], body: wire.Decoding, caller: Caller, request: Request
    ) -> Response:
        samples = asked[0].settings.n
        if samples > caller.rows:
            raise Refused(
                400, f"n: found {samples}, and {caller.name} may run {caller.rows} rows.", param="n"
            )
        at_once = max(1, min(AT_ONCE, caller.rows) // samples)
        taken = min(len(asked), at_once) * samples
        if rows.of(caller.name) + taken > caller.rows:
            raise too_many(
                f"{caller.name} has {rows.of(caller.name)} rows running and asks for {taken}, of at most {caller.rows}."
            )
        lease: Lease | None = rows.take(caller.name, taken)
        events = _numbered(engine, asked, samples, at_once, metrics.request(body.model))
        headers = _headers(body, asked[0].digest)
        try:
            if not body.stream:
                whole = await while_connected(request, answers.gathered(events))
                return JSONResponse(whole, headers=headers)
            # The first answer is waited for, so that what is refused is an error and not a broken stream.
            first = await while_connected(request, anext(events))
            streaming = _Stream(answers.streamed(first, events), [events.aclose, _ending(lease)], headers)
            lease = None  # the stream ends it
            return streaming
        finally:
            if lease is not None:
                await events.aclose()
                lease.end()

    async def echoed(
        body: wire.CompletionBody, served: Served, inputs: Sequence[Input], caller: Caller
    ) -> Response:
        """The input's own tokens with their log-probabilities, as evaluation harnesses ask for them; the one token that
        OpenAI's answer would end with is left out."""
        if body.stream or (body.max_tokens or 0) > 1 or body.samples > 1:
            raise Refused(400, "echo works with max_tokens of at most 1, without stream and n.", param="echo")
        answers = Choices(lm, body, served, len(inputs))
        choices, read = [], 0
        for index, given in enumerate(inputs):
            rated = await engine.call(_rater(engine, served, given, max(1, body.logprobs or 0)))
            tokens = [token_text(lm, token.token_id) for token in rated]
            read += len(tokens)
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [token.log_probability for token in rated],
                "top_logprobs": [
                    None if token.log_probability is None else by_text(lm, token.likeliest) for token in rated
                ],
                "text_offset": offsets(tokens),
            }
            choices.append(
                {
                    "index": index,
                    "text": "".join(tokens),
                    "logprobs": logprobs if body.logprobs is not None else None,
                    "finish_reason": "length",
                }
            )
        usage = wire.usage(read, served.virtual_tokens, 0)
        return JSONResponse(
            {**answers.head(answers.shape), "choices": choices, "usage": usage},
            headers=_headers(body, served.digest),
        )

    @app.post("/v1/softprompt/compare")
    async def compare(body: wire.CompareBody, request: Request) -> Response:
        """Several models over their inputs at once, as server-sent events with the number of their column. What is wrong
        with one column is an event of it, and the others continue."""
        caller = caller_of(request)
        chosen = [served_by(column.model, caller) for column in body.columns]
        _demand_known(body, strict)
        if body.samples > 1:
            raise Refused(400, "n: a column is one answer.", param="n")
        asked: list[Work | Exception] = []
        for served, column in zip(chosen, body.columns, strict=True):
            single = wire.CompletionBody(
                model=column.model,
                softprompt=wire.SoftPromptOptions(fields=column.fields) if column.fields else None,
            )
            try:
                given = completion_input(lm, served, column.prompt, single)
                asked += works(body, served, [given], caller, body.max_tokens or DEFAULT_NEW_TOKENS, None)
            except (Refused, SoftPromptError) as error:
                asked.append(error)
        if rows.of(caller.name) + len(asked) > caller.rows:
            raise too_many(
                f"{caller.name} asks for {len(asked)} rows beside those running, of {caller.rows}."
            )
        lease = rows.take(caller.name, len(asked))
        events = _side_by_side(engine, asked)
        return _Stream(columns(lm, events), [events.aclose, _ending(lease)], _headers(body, None))

    @app.post("/v1/softprompt/score")
    async def score(body: wire.ScoreBody, request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        chosen = [served_by(name, caller) for name in body.models]
        _demand_known(body, strict)
        data = []
        for served in chosen:
            continuations = []
            for text in body.continuations:  # one at a time, so that others' steps come between
                rated = await engine.call(_scorer(engine, served, body.input, text, body.top))
                continuations.append(_scored(engine, text, rated))
            data.append({"model": served.name, "continuations": continuations})
        return {"object": "softprompt.score", "data": data}

    @app.post("/tokenize")
    async def tokenize(body: wire.TokenizeBody, request: Request) -> dict[str, Any]:
        served = served_by(body.model, caller_of(request))
        ids = (await asyncio.to_thread(lm.tokenizer, body.prompt, verbose=False))["input_ids"]
        return {
            "tokens": ids,
            "count": len(ids),
            "virtual_tokens": served.virtual_tokens,
            "max_model_len": lm.max_positions,
        }

    @app.post("/detokenize")
    async def detokenize(body: wire.DetokenizeBody, request: Request) -> dict[str, Any]:
        served_by(body.model, caller_of(request))
        if any(not 0 <= token < lm.vocab_size for token in body.tokens):
            raise Refused(400, f"tokens: wanted ids from 0 to {lm.vocab_size - 1}.", param="tokens")
        return {"prompt": await asyncio.to_thread(lm.tokenizer.decode, body.tokens)}

    def admin_of(request: Request) -> None:
        if not caller_of(request).admin:
            raise Refused(403, "This needs a key with admin: true.", code="not_allowed")

    @app.post("/admin/prompts")
    async def load(body: wire.LoadBody, request: Request) -> dict[str, Any]:
        admin_of(request)
        return _model(await asyncio.to_thread(catalogue.add, body.path, body.name), lm)

    @app.delete("/admin/prompts/{name}")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        admin_of(request)
        if not catalogue.remove(name):
            raise Refused(404, f"No prompt {name!r} was loaded.", code="model_not_found")
        return {"id": name, "object": "model", "deleted": True}

    return app


class _Stream(StreamingResponse):
    """Server-sent events whose source is closed when the answer ends, or the client has gone."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        closing: Sequence[Callable[[], Coroutine[Any, Any, Any]]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={**headers, "cache-control": "no-store"}
        )
        self._events, self._closing = events, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            for close in self._closing:
                await close()


def _ending(lease: Lease | None) -> Callable[[], Coroutine[Any, Any, Any]]:
    async def end() -> None:
        if lease is not None:
            lease.end()

    return end


async def _numbered(
    engine: Engine,
    asked: Sequence[Work],
    samples: int,
    at_once: int,
    timed: Callable[[Answer], None],
) -> AsyncGenerator[tuple[int, Answer], None]:
    """Answers of several works as they come, with the number of their choice; at most `at_once` works wait or run.

    Closing it, and an error of any work, cancels all of them."""
    waiting = list(enumerate(asked))[::-1]
    streams: dict[int, AsyncIterator[Answer]] = {}
    pending: dict[asyncio.Future[Answer | None], int] = {}

    def follow(number: int) -> None:
        pending[asyncio.ensure_future(_next(streams[number]))] = number

    try:
        while waiting or pending:
            while waiting and len(pending) < at_once:
                number, work = waiting.pop()
                streams[number] = engine.submit(work)
                follow(number)
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = pending.pop(future)
                answer = future.result()
                if answer is None:
                    del streams[number]
                    continue
                follow(number)
                timed(answer)
                yield number * samples + answer.sample, answer
    finally:
        for future in pending:
            future.cancel()
        # A generator cannot be closed while it still runs.
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams.values():
            await stream.aclose()  # type: ignore[attr-defined]


async def _side_by_side(
    engine: Engine, asked: Sequence[Work | Exception]
) -> AsyncGenerator[tuple[int, Answer | Exception], None]:
    """Answers as they come, each with its number; an error ends only its own. Closing it cancels all."""
    coming: asyncio.Queue[tuple[int, Answer | Exception | None]] = asyncio.Queue()

    async def follow(number: int, work: Work | Exception) -> None:
        try:
            if isinstance(work, Exception):
                raise work
            async for answer in engine.submit(work):
                coming.put_nowait((number, answer))
        except Exception as error:
            coming.put_nowait((number, error))
        coming.put_nowait((number, None))

    tasks = [asyncio.create_task(follow(number, work)) for number, work in enumerate(asked)]
    left = len(tasks)
    try:
        while left:
            number, answer = await coming.get()
            if answer is None:
                left -= 1
            else:
                yield number, answer
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next(stream: AsyncIterator[Answer]) -> Answer | None:
    return await anext(stream, None)


async def _every(seconds: float, *looks: Callable[[], object]) -> None:
    """Look again and again, in a thread: a slow disk must not keep answers waiting."""
    while True:
        await asyncio.sleep(seconds)
        for look in looks:
            try:
                await asyncio.to_thread(look)
            except Exception:
                log.exception("The library or the keys could not be looked at.")


def _headers(body: wire.Body, digest: str | None) -> dict[str, str]:
    headers = {"x-softprompt-digest": digest or BASE}
    if body.ignored:  # a client's own words: quoted, so that they cannot be another header
        headers["x-softprompt-ignored"] = ", ".join(quote(name, errors="replace") for name in body.ignored)[
            :1000
        ]
    return headers


def _model(served: Served, lm: FrozenLM) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "softprompt",
        "root": shown_name(served.root),
        "parent": None if served.digest is None else BASE,
        "softprompt": {
            "digest": served.digest,
            "base_sha256": lm.fingerprint.sha256,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "kind": served.kind,
            "virtual_tokens": served.virtual_tokens,
            "template": str(served.template),
            "fields": list(served.template.inputs),
        },
    }


def _demand_known(body: wire.Body, strict: bool) -> None:
    if strict and body.ignored:
        raise Refused(400, f"Unknown fields: {', '.join(body.ignored)}.", param=body.ignored[0])


def _rater(engine: Engine, served: Served, given: Input, top: int) -> Callable[[Compiled], list[RatedToken]]:
    return lambda compiled: rate_text(engine.lm, compiled(served.digest), given, top)


def _scorer(
    engine: Engine, served: Served, given: str | Example, text: str, top: int
) -> Callable[[Compiled], list[RatedToken]]:
    return lambda compiled: rate_continuation(engine.lm, compiled(served.digest), given, text, top)


def _scored(engine: Engine, text: str, rated: Sequence[RatedToken]) -> dict[str, Any]:
    return {
        "text": text,
        "logprob": sum(token.log_probability or 0.0 for token in rated),
        "tokens": [
            {
                "token": token_text(engine.lm, token.token_id),
                "logprob": token.log_probability,
                "top": [
                    {"token": token_text(engine.lm, other), "logprob": value}
                    for other, value in token.likeliest
                ],
            }
            for token in rated
        ],
    }
