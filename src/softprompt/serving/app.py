"""The server's routes: OpenAI's completions and chat over an engine, thin. Errors are OpenAI's too, whatever happens."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from softprompt.data.example import Example, Message
from softprompt.errors import DataError, OutOfMemory, SoftPromptError
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.prefill import prefill
from softprompt.serving import wire
from softprompt.serving.catalogue import BASE, Catalogue, Served
from softprompt.serving.engine import (
    Answer,
    Finished,
    LocalEngine,
    Overloaded,
    Piece,
    ShuttingDown,
    Work,
    now,
)
from softprompt.serving.keys import Caller, Keys
from softprompt.serving.metrics import Metrics

PAGE = Path(__file__).parent / "playground.html"
MAX_BODY_BYTES = 4_000_000
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Refused(Exception):
    """An answer that is an error: status, OpenAI's type, and what to say."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param


def build_app(
    engine: LocalEngine, catalogue: Catalogue, keys: Keys | None = None, *, strict: bool = False
) -> FastAPI:
    """The application over a started engine. `strict` refuses unknown fields instead of naming them in a header."""
    app = FastAPI(title="softprompt", version=version("softprompt"), docs_url=None, redoc_url=None)
    keys = keys or Keys()
    metrics = Metrics(engine.health)
    rows_of: dict[str, int] = {}
    state = {"ready": True}
    app.state.ready = state

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Any]) -> Response:
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _error(
                Refused(
                    413, f"The body is larger than {MAX_BODY_BYTES:,} bytes. Send less.", code="too_large"
                )
            )
        response: Response = await call_next(request)
        return response

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        metrics.rejected(error.code or str(error.status))
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(Refused(400, f"{where or 'body'}: {first['msg']}", param=where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _error(Refused(error.status_code, str(error.detail), code=str(error.status_code)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(
            Refused(500, "The server failed to answer. Its log says more.", "server_error", "internal_error")
        )

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
    async def health() -> dict[str, Any]:
        return {"status": "ok", **engine.health()}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": state["ready"]}, 200 if state["ready"] else 503)

    @app.get("/version")
    async def versions() -> dict[str, str]:
        return {"softprompt": version("softprompt")}

    @app.get("/metrics")
    async def measured() -> Response:
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
            "data": [_model(served) for served in catalogue.models() if caller.may_use(served.name)],
        }

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return _model(served_by(name, caller_of(request)))

    @app.post("/v1/completions")
    async def completions(body: wire.CompletionBody, request: Request) -> Response:
        caller = caller_of(request)
        served = served_by(body.model, caller)
        _demand_supported(body, strict)
        if body.suffix or (body.best_of or body.n) > body.n:
            raise Refused(
                400, "suffix and best_of are not supported.", param="suffix" if body.suffix else "best_of"
            )
        inputs = [_completion_input(engine, served, given, body) for given in body.prompts]
        if body.echo:
            return await _echoed(engine, served, body, inputs)
        settings = body.decode_settings(body.max_tokens or 1, body.logprobs is not None)
        answers = _Answers("text_completion", "cmpl", body, served)
        works = [Work(served.digest, given, settings, caller.name) for given in inputs]
        return await respond(answers, works, caller, request)

    @app.post("/v1/chat/completions")
    async def chat(body: wire.ChatBody, request: Request) -> Response:
        caller = caller_of(request)
        served = served_by(body.model, caller)
        _demand_supported(body, strict)
        if body.tools or (body.response_format or {}).get("type", "text") != "text":
            name = "tools" if body.tools else "response_format"
            raise Refused(400, f"{name} is not supported by this server.", param=name)
        given = _chat_input(engine, served, body)
        settings = body.decode_settings(body.max_completion_tokens or body.max_tokens, body.logprobs)
        answers = _Answers("chat.completion", "chatcmpl", body, served)
        return await respond(answers, [Work(served.digest, given, settings, caller.name)], caller, request)

    async def respond(answers: _Answers, works: Sequence[Work], caller: Caller, request: Request) -> Response:
        rows = sum(work.settings.n for work in works)
        running = rows_of.get(caller.name, 0)
        if running + rows > caller.rows:
            raise _too_many(
                f"{caller.name} has {running} rows running and asks for {rows}, of at most {caller.rows}."
            )
        headers = {"x-softprompt-digest": answers.served.digest or BASE}
        if answers.body.ignored:
            headers["x-softprompt-ignored"] = ", ".join(answers.body.ignored)
        rows_of[caller.name] = running + rows
        timed = metrics.request(answers.served.name)

        async def events() -> AsyncIterator[tuple[int, Answer]]:
            try:
                async for place, answer in _merged([engine.submit(work) for work in works]):
                    timed(answer)
                    yield place * works[0].settings.n + answer.sample, answer
            finally:
                rows_of[caller.name] -= rows

        if answers.body.stream:
            # The first answer is waited for, so that what is refused is an error and not a broken stream.
            stream = events()
            try:
                first = await anext(stream)
            except (SoftPromptError, KeyError) as error:
                raise _as_refusal(error) from error
            return StreamingResponse(
                answers.streamed(first, stream, engine), media_type="text/event-stream", headers=headers
            )
        gathering = asyncio.ensure_future(answers.gathered(events(), engine))
        leaving = asyncio.ensure_future(_gone(request))
        done, _ = await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if gathering not in done:
            gathering.cancel()
            raise Refused(499, "The client has gone.", code="client_gone")
        try:
            return JSONResponse(gathering.result(), headers=headers)
        except (SoftPromptError, KeyError) as error:
            raise _as_refusal(error) from error

    @app.post("/v1/softprompt/score")
    async def score(body: wire.ScoreBody, request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        scored = []
        for name in body.models:
            served = served_by(name, caller)
            try:
                found = await engine.call(_scorer(engine, served, body))
            except SoftPromptError as error:
                raise _as_refusal(error) from error
            scored.append({"model": name, "continuations": found})
        return {"object": "softprompt.score", "data": scored}

    @app.post("/tokenize")
    async def tokenize(body: wire.TokenizeBody, request: Request) -> dict[str, Any]:
        served = served_by(body.model, caller_of(request))
        ids = engine.lm.tokenizer(body.prompt, verbose=False)["input_ids"]
        return {
            "tokens": ids,
            "count": len(ids),
            "virtual_tokens": served.virtual_tokens,
            "max_model_len": engine.lm.max_positions,
        }

    @app.post("/detokenize")
    async def detokenize(body: wire.DetokenizeBody, request: Request) -> dict[str, Any]:
        served_by(body.model, caller_of(request))
        if any(not 0 <= token < engine.lm.vocab_size for token in body.tokens):
            raise Refused(400, f"tokens: wanted ids from 0 to {engine.lm.vocab_size - 1}.", param="tokens")
        return {"prompt": engine.lm.tokenizer.decode(body.tokens)}

    def admin_of(request: Request) -> None:
        if not caller_of(request).admin:
            raise Refused(403, "This needs a key with admin: true.", code="not_allowed")

    @app.post("/admin/prompts")
    async def load(body: wire.LoadBody, request: Request) -> dict[str, Any]:
        admin_of(request)
        try:
            return _model(catalogue.add(body.path, body.name))
        except SoftPromptError as error:
            raise _as_refusal(error) from error

    @app.delete("/admin/prompts/{name}")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        admin_of(request)
        if not catalogue.remove(name):
            raise Refused(404, f"No prompt {name!r} was loaded.", code="model_not_found")
        return {"id": name, "object": "model", "deleted": True}

    return app


class _Answers:
    """Answers of the engine in OpenAI's shapes, whole or as a stream."""

    def __init__(
        self, shape: str, prefix: str, body: wire.CompletionBody | wire.ChatBody, served: Served
    ) -> None:
        self.shape, self.body, self.served = shape, body, served
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", now()
        self.chat = shape == "chat.completion"

    async def gathered(
        self, events: AsyncIterator[tuple[int, Answer]], engine: LocalEngine
    ) -> dict[str, Any]:
        """One object when everything has come."""
        done: dict[int, Finished] = {}
        async for index, answer in events:
            if isinstance(answer, Finished):
                done[index] = answer
        choices = []
        for index, answer in sorted(done.items()):
            logprobs = await self._logprobs(answer, engine)
            words = (
                {"message": {"role": "assistant", "content": answer.text}}
                if self.chat
                else {"text": answer.text}
            )
            choices.append({"index": index, **words, "logprobs": logprobs, "finish_reason": _reason(answer)})
        return {**self._head(self.shape), "choices": choices, "usage": self._usage(list(done.values()))}

    async def streamed(
        self, first: tuple[int, Answer], events: AsyncIterator[tuple[int, Answer]], engine: LocalEngine
    ) -> AsyncIterator[bytes]:
        """Server-sent events, a piece of text each; then the usage where it was asked for, and [DONE]."""
        shape = "chat.completion.chunk" if self.chat else self.shape
        done: list[Finished] = []
        started: set[int] = set()

        async def all_events() -> AsyncIterator[tuple[int, Answer]]:
            yield first
            async for event in events:
                yield event

        try:
            async for index, answer in all_events():
                if self.chat and index not in started:
                    yield self._event(shape, index, {"delta": {"role": "assistant", "content": ""}})
                started.add(index)
                if isinstance(answer, Piece):
                    words: dict[str, Any] = (
                        {"delta": {"content": answer.text}} if self.chat else {"text": answer.text}
                    )
                    yield self._event(shape, index, words)
                else:
                    done.append(answer)
                    words = {"delta": {}} if self.chat else {"text": ""}
                    logprobs = await self._logprobs(answer, engine)
                    yield self._event(shape, index, words, _reason(answer), logprobs)
        except SoftPromptError as error:
            refusal = _as_refusal(error)
            yield _sse(wire.error_body(str(refusal), refusal.kind, refusal.code))
            return
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield _sse({**self._head(shape), "choices": [], "usage": self._usage(done)})
        yield b"data: [DONE]\n\n"

    def _head(self, shape: str) -> dict[str, Any]:
        return {"id": self.id, "object": shape, "created": self.created, "model": self.served.name}

    def _event(
        self, shape: str, index: int, words: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> bytes:
        choice = {"index": index, **words, "logprobs": logprobs, "finish_reason": reason}
        return _sse({**self._head(shape), "choices": [choice]})

    def _usage(self, done: Sequence[Finished]) -> dict[str, Any]:
        inputs = (
            {answer.sample: answer for answer in done} if len(done) <= self.body.n else dict(enumerate(done))
        )
        read = [answer for answer in done if answer.sample == 0] or list(inputs.values())
        return wire.usage(
            sum(answer.input_tokens for answer in read),
            sum(answer.virtual_tokens for answer in read),
            sum(len(answer.token_ids) for answer in done),
        )

    async def _logprobs(self, answer: Finished, engine: LocalEngine) -> dict[str, Any] | None:
        if not answer.log_probabilities:
            return None
        tokens = [engine.lm.tokenizer.decode([token]) for token in answer.token_ids]
        values = list(answer.log_probabilities)
        if self.chat:
            content = [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in zip(tokens, values, strict=True)
            ]
            return {"content": content, "refusal": None}
        top = [{token: value} for token, value in zip(tokens, values, strict=True)]
        offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "softprompt",
        "root": served.root,
        "parent": None if served.digest is None else BASE,
        "softprompt": {
            "digest": served.digest,
            "kind": served.kind,
            "virtual_tokens": served.virtual_tokens,
            "template": str(served.template),
            "fields": list(served.template.inputs),
        },
    }


def _demand_supported(body: wire.Decoding, strict: bool) -> None:
    name = body.refused()
    if name is not None:
        raise Refused(400, f"{name} is not supported by this server.", param=name)
    if strict and body.ignored:
        raise Refused(400, f"Unknown fields: {', '.join(body.ignored)}.", param=body.ignored[0])


def _completion_input(
    engine: LocalEngine, served: Served, given: str | list[int], body: wire.CompletionBody
) -> str | Example | list[int]:
    fields = body.softprompt.fields if body.softprompt else None
    if fields is not None:
        return _of_fields(served, fields)
    if isinstance(given, str):
        if len(served.template.inputs) > 1:
            raise _needs_fields(served)
        return given
    if any(not 0 <= token < engine.lm.vocab_size for token in given):
        raise Refused(400, f"prompt: wanted ids from 0 to {engine.lm.vocab_size - 1}.", param="prompt")
    if served.digest is not None:
        raise Refused(
            400,
            f"{served.name} lays its input out as text, so token ids cannot be put in. Send text, or ask `base`.",
            param="prompt",
        )
    if not given:
        raise Refused(400, "prompt: an empty list of ids gives nothing to continue.", param="prompt")
    return given


def _chat_input(engine: LocalEngine, served: Served, body: wire.ChatBody) -> str | Example | list[int]:
    """A chat as the prompt's layout wants it: its own chat, or the last thing the user said."""
    fields = body.softprompt.fields if body.softprompt else None
    if fields is not None:
        return _of_fields(served, fields)
    try:
        turns = tuple(
            Message("system" if message.role == "developer" else message.role, message.text)
            for message in body.messages
        )
    except ValueError as error:
        raise Refused(400, f"messages: {error}.", param="messages") from None
    if served.template.chat:
        return Example({}, turns)
    if served.digest is None:
        if not engine.lm.tokenizer.chat_template:
            raise Refused(400, f"{served.name} has no chat template. Use /v1/completions.", param="messages")
        ids = engine.lm.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        return [int(token) for token in ids]
    if len(served.template.inputs) != 1:
        raise _needs_fields(served)
    said = [turn.content for turn in turns if turn.role == "user"]
    if not said:
        raise Refused(
            400, "messages: there is no user turn, which this prompt's input is taken from.", param="messages"
        )
    return said[-1]


def _of_fields(served: Served, fields: dict[str, str]) -> Example:
    missing = [name for name in served.template.inputs if name not in fields]
    if missing:
        raise Refused(400, f"softprompt.fields: {', '.join(missing)} is missing.", param="softprompt.fields")
    return Example(fields)


def _needs_fields(served: Served) -> Refused:
    names = ", ".join(served.template.inputs)
    return Refused(
        400,
        f"{served.name} has several inputs ({names}). Send them as softprompt: {{fields: {{...}}}}.",
        param="softprompt.fields",
    )


async def _echoed(
    engine: LocalEngine,
    served: Served,
    body: wire.CompletionBody,
    inputs: Sequence[str | Example | list[int]],
) -> Response:
    """The input's own tokens with their log-probabilities, as evaluation harnesses ask for them; nothing is generated
    but the one token that OpenAI's answer would end with."""
    if body.stream or (body.max_tokens or 0) > 1 or body.n > 1:
        raise Refused(400, "echo works with max_tokens of at most 1, without stream and n.", param="echo")
    top = body.logprobs or 0
    choices, read = [], 0
    for index, given in enumerate(inputs):
        try:
            rated = await engine.call(_rater(engine, served, given, top))
        except SoftPromptError as error:
            raise _as_refusal(error) from error
        tokens = [engine.lm.tokenizer.decode([token]) for token in rated["ids"]]
        read += len(tokens)
        offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": rated["values"],
            "top_logprobs": [None if best is None else {**best} for best in rated["top"]],
            "text_offset": offsets,
        }
        text = "".join(tokens)
        choices.append(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs if body.logprobs is not None else None,
                "finish_reason": "length",
            }
        )
    answers = _Answers("text_completion", "cmpl", body, served)
    return JSONResponse(
        {
            **answers._head("text_completion"),
            "choices": choices,
            "usage": wire.usage(read, served.virtual_tokens, 0),
        },
        headers={"x-softprompt-digest": served.digest or BASE},
    )


Compiled = Callable[[str | None], CompiledPrompt]


def _scorer(
    engine: LocalEngine, served: Served, body: wire.ScoreBody
) -> Callable[[Compiled], list[dict[str, Any]]]:
    return lambda compiled: _scored(engine, compiled(served.digest), body)


def _rater(
    engine: LocalEngine, served: Served, given: str | Example | list[int], top: int
) -> Callable[[Compiled], dict[str, Any]]:
    return lambda compiled: _rated(engine, compiled(served.digest), given, top)


@torch.inference_mode()
def _rated(
    engine: LocalEngine, prompt: CompiledPrompt, given: str | Example | list[int], top: int
) -> dict[str, Any]:
    """Ids of the input's tokens, the log-probability of each (None where nothing predicts it), and the likeliest ones."""
    lm = engine.lm
    marks = list(given) if isinstance(given, list) else prompt.marks(lm, given)
    places = [place for place, mark in enumerate(marks) if mark >= 0]
    first = next((place for place in places if place > 0), len(marks) - 1)
    row = prompt.row(marks, need=first - 1)
    done = prefill(lm, [row])
    hidden_TD = done.hidden_BTD[0, : row.rest]
    values: list[float | None] = []
    likeliest: list[dict[str, float] | None] = []
    for place in places:
        if place == 0:
            values.append(None)
            likeliest.append(None)
            continue
        log_probabilities_V = lm.logits(hidden_TD[place - 1 - row.state.length]).float().log_softmax(-1)
        values.append(float(log_probabilities_V[marks[place]]))
        best = log_probabilities_V.topk(max(1, top))
        likeliest.append(
            {
                lm.tokenizer.decode([int(token)]): float(value)
                for value, token in zip(best.values, best.indices, strict=True)
            }
        )
    return {"ids": [marks[place] for place in places], "values": values, "top": likeliest}


@torch.inference_mode()
def _scored(engine: LocalEngine, prompt: CompiledPrompt, body: wire.ScoreBody) -> list[dict[str, Any]]:
    """Log-probability of every token of each continuation behind the input."""
    lm = engine.lm
    marks = prompt.marks(lm, body.input)
    found = []
    for text in body.continuations:
        ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise DataError("continuations: one of them has no token. Give some text.")
        row = prompt.row([*marks, *ids], need=len(marks) - 1)
        done = prefill(lm, [row])
        tokens = []
        for n, token in enumerate(ids):
            place = len(marks) + n - 1 - row.state.length
            log_probabilities_V = lm.logits(done.hidden_BTD[0, place]).float().log_softmax(-1)
            best = log_probabilities_V.topk(max(1, body.top))
            tokens.append(
                {
                    "token": lm.tokenizer.decode([token]),
                    "logprob": float(log_probabilities_V[token]),
                    "top": [
                        {"token": lm.tokenizer.decode([int(i)]), "logprob": float(v)}
                        for v, i in zip(best.values, best.indices, strict=True)
                    ][: body.top],
                }
            )
        found.append({"text": text, "logprob": sum(one["logprob"] for one in tokens), "tokens": tokens})
    return found


async def _merged(streams: Sequence[AsyncIterator[Answer]]) -> AsyncIterator[tuple[int, Answer]]:
    """Answers of several works as they come, with the work's number. Leaving early cancels all of them."""
    pending = {asyncio.ensure_future(_next(stream)): place for place, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                place = pending.pop(future)
                answer = future.result()
                if answer is None:
                    continue
                pending[asyncio.ensure_future(_next(streams[place]))] = place
                yield place, answer
    finally:
        for future in pending:
            future.cancel()
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]


async def _next(stream: AsyncIterator[Answer]) -> Answer | None:
    return await anext(stream, None)


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _reason(answer: Finished) -> str:
    return "length" if answer.reason == "length" else "stop"


def _sse(record: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n".encode()


def _too_many(message: str) -> Refused:
    return Refused(429, f"{message} Try again in a moment.", "rate_limit_error", "rate_limit_exceeded")


def _as_refusal(error: BaseException) -> Refused:
    if isinstance(error, Overloaded):
        return _too_many(str(error))
    if isinstance(error, ShuttingDown):
        return Refused(503, str(error), "server_error", "shutting_down")
    if isinstance(error, KeyError):  # the prompt was removed between its name and its turn
        return Refused(404, "The model was removed a moment ago.", code="model_not_found", param="model")
    if isinstance(error, OutOfMemory):
        return Refused(400, str(error), code="context_length_exceeded")
    return Refused(400, str(error))


def _error(error: Refused) -> Response:
    headers = {"retry-after": "1", "retry-after-ms": "500"} if error.status in (429, 503) else {}
    return JSONResponse(
        wire.error_body(str(error), error.kind, error.code, error.param), error.status, headers=headers
    )
