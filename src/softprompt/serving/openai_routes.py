"""OpenAI's routes: models, completions, chats and responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from softprompt.inference.score import RatedToken
from softprompt.serving import wire
from softprompt.serving.answers import Choices, ResponseShape
from softprompt.serving.catalogue import BASE, Served
from softprompt.serving.connection import while_connected
from softprompt.serving.engine import Engine
from softprompt.serving.inputs import Input, chat_input, completion_input, messages
from softprompt.serving.refusals import Refused, shown_name
from softprompt.serving.service import Service, headers_of

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # with stream=true
DEFAULT_NEW_TOKENS = 16  # OpenAI's, of completions


def openai_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    router = APIRouter()
    engine, lm = service.engine, service.lm

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        caller = service.caller_of(request)
        return {
            "object": "list",
            "data": [
                shown(engine, served) for served in service.catalogue.models() if caller.may_use(served.name)
            ],
        }

    @router.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return shown(engine, service.served_by(name, service.caller_of(request)))

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: wire.CompletionBody, request: Request) -> Response:
        caller, served = service.asked_by(body, request)
        if body.suffix or (body.best_of or body.samples) > body.samples:
            raise Refused(
                400, "suffix and best_of are not supported.", param="suffix" if body.suffix else "best_of"
            )
        inputs = [completion_input(lm, served, given, body) for given in body.prompts]
        echoed = await while_connected(request, echoes(body, served, inputs)) if body.echo else []
        answers = Choices(lm, body, served, echoed)
        if body.max_tokens == 0:
            if not body.echo:
                raise Refused(400, "max_tokens: wanted at least 1, or echo.", param="max_tokens")
            return JSONResponse(answers.of_echoes(), headers=headers_of(body, served.digest))
        top = body.logprobs
        return await service.respond(
            answers,
            service.works(
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

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: wire.ChatBody, request: Request) -> Response:
        caller, served = service.asked_by(body, request)
        if body.tools:
            raise Refused(400, "tools is not supported by this server.", param="tools")
        given = chat_input(lm, served, messages(body.messages), body.fields, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        longest = body.max_completion_tokens or body.max_tokens
        asked = service.works(body, served, [given], caller, longest, top)
        return await service.respond(Choices(lm, body, served), asked, body, caller, request)

    @router.post("/v1/responses", responses=STREAMED)
    async def responses(body: wire.ResponsesBody, request: Request) -> Response:
        caller, served = service.asked_by(body, request)
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
        asked = service.works(body, served, [given], caller, body.max_output_tokens, None)
        return await service.respond(ResponseShape(lm, body, served), asked, body, caller, request)

    async def echoes(
        body: wire.CompletionBody, served: Served, inputs: Sequence[Input]
    ) -> list[Sequence[RatedToken]]:
        """The tokens of every input, rated: what an echo begins with."""
        if body.stream:
            raise Refused(400, "echo: a stream has none. Send stream=false.", param="echo")
        return [await engine.score(served.digest, given, top=max(1, body.logprobs or 0)) for given in inputs]

    return router


def shown(engine: Engine, served: Served) -> dict[str, Any]:
    """A model as OpenAI lists it, with what is ours beside it."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "softprompt",
        "root": shown_name(served.root),
        "parent": None if served.digest is None else BASE,
        "max_model_len": engine.lm.max_positions,
        "softprompt": {
            "digest": served.digest,
            "engine": engine.kind,
            "base_sha256": engine.lm.fingerprint.sha256,
            "dtype": str(engine.lm.dtype).removeprefix("torch."),
            "kind": served.kind,
            "virtual_tokens": served.virtual_tokens,
            "template": str(served.template),
            "fields": list(served.template.inputs),
        },
    }
