"""OpenAI's routes: models, completions, chats and responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from softprompt.base.frozen_lm import FrozenLM
from softprompt.serving import wire
from softprompt.serving.answers import Choices, ResponseShape, by_text, offsets, token_text
from softprompt.serving.catalogue import BASE, Served
from softprompt.serving.inputs import Input, chat_input, completion_input, messages
from softprompt.serving.keys import Caller
from softprompt.serving.refusals import Refused, shown_name
from softprompt.serving.service import Service, headers_of

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
                shown(lm, served) for served in service.catalogue.models() if caller.may_use(served.name)
            ],
        }

    @router.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return shown(lm, service.served_by(name, service.caller_of(request)))

    @router.post("/v1/completions")
    async def completions(body: wire.CompletionBody, request: Request) -> Response:
        caller, served = service.asked_by(body, request)
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
        return await service.respond(
            Choices(lm, body, served, len(inputs)),
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

    @router.post("/v1/chat/completions")
    async def chat(body: wire.ChatBody, request: Request) -> Response:
        caller, served = service.asked_by(body, request)
        if body.tools:
            raise Refused(400, "tools is not supported by this server.", param="tools")
        given = chat_input(lm, served, messages(body.messages), body.fields, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        longest = body.max_completion_tokens or body.max_tokens
        asked = service.works(body, served, [given], caller, longest, top)
        return await service.respond(Choices(lm, body, served, 1), asked, body, caller, request)

    @router.post("/v1/responses")
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
            rated = await engine.score(served.digest, given, top=max(1, body.logprobs or 0))
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
            headers=headers_of(body, served.digest),
        )

    return router


def shown(lm: FrozenLM, served: Served) -> dict[str, Any]:
    """A model as OpenAI lists it, with what is ours beside it."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "softprompt",
        "root": shown_name(served.root),
        "parent": None if served.digest is None else BASE,
        "max_model_len": lm.max_positions,
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
