"""Routes of our own: columns side by side, scores, tokens, and loading prompts while running."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import MissingExtra, SoftPromptError
from softprompt.inference.score import RatedToken
from softprompt.serving import wire
from softprompt.serving.answers import columns, token_text
from softprompt.serving.engine import Work
from softprompt.serving.figures import figures_of, row_of
from softprompt.serving.inputs import completion_input
from softprompt.serving.openai_routes import DEFAULT_NEW_TOKENS, STREAMED, shown
from softprompt.serving.refusals import Refused, too_many
from softprompt.serving.service import Service, ending, headers_of
from softprompt.serving.streams import EventStream, side_by_side


def own_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    router = APIRouter()
    engine, lm, catalogue = service.engine, service.lm, service.catalogue

    @router.post("/v1/softprompt/compare", responses=STREAMED)
    async def compare(body: wire.CompareBody, request: Request) -> Response:
        """Several models over their inputs at once, as server-sent events with the number of their column. What is wrong
        with one column is an event of it, and the others continue."""
        caller = service.caller_of(request)
        chosen = [service.served_by(column.model, caller) for column in body.columns]
        service.demand_known(body)
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
                asked += service.works(
                    body, served, [given], caller, body.max_tokens or DEFAULT_NEW_TOKENS, None
                )
            except (Refused, SoftPromptError) as error:
                asked.append(error)
        if service.rows.of(caller.name) + len(asked) > caller.rows:
            raise too_many(
                f"{caller.name} asks for {len(asked)} rows beside those running, of {caller.rows}."
            )
        lease = service.rows.take(caller.name, len(asked))
        events = side_by_side(engine, asked)
        return EventStream(columns(lm, events), [events.aclose, ending(lease)], headers_of(body, None))

    @router.post("/v1/softprompt/score")
    async def score(body: wire.ScoreBody, request: Request) -> dict[str, Any]:
        caller = service.caller_of(request)
        chosen = [service.served_by(name, caller) for name in body.models]
        service.demand_known(body)
        data = []
        for served in chosen:
            continuations = []
            for text in body.continuations:  # one at a time, so that others' steps come between
                rated = await engine.score(served.digest, body.input, text, body.top)
                continuations.append(_scored(lm, text, rated))
            data.append({"model": served.name, "continuations": continuations})
        return {"object": "softprompt.score", "data": data}

    @router.post("/v1/softprompt/figures")
    async def figures(body: wire.FiguresBody, request: Request) -> dict[str, Any]:
        """What `evaluate` says of such answers; without the loss where the engine rates no text."""
        served = service.served_by(body.model, service.caller_of(request))
        service.demand_known(body)
        rows = []
        for index, row in enumerate(body.rows):
            rated: list[RatedToken] = []
            with suppress(MissingExtra):
                rated = await engine.score(served.digest, row.input, row.wanted, end="auto")
            rows.append(row_of(lm, index, row, rated))
        figures = await asyncio.to_thread(figures_of, rows)
        return {"object": "softprompt.figures", "model": served.name, "figures": figures}

    @router.post("/tokenize")
    async def tokenize(body: wire.TokenizeBody, request: Request) -> dict[str, Any]:
        served = service.served_by(body.model, service.caller_of(request))
        ids = (await asyncio.to_thread(lm.tokenizer, body.prompt, verbose=False))["input_ids"]
        return {
            "tokens": ids,
            "count": len(ids),
            "virtual_tokens": served.virtual_tokens,
            "max_model_len": lm.max_positions,
        }

    @router.post("/detokenize")
    async def detokenize(body: wire.DetokenizeBody, request: Request) -> dict[str, Any]:
        service.served_by(body.model, service.caller_of(request))
        if any(not 0 <= token < lm.vocab_size for token in body.tokens):
            raise Refused(400, f"tokens: wanted ids from 0 to {lm.vocab_size - 1}.", param="tokens")
        return {"prompt": await asyncio.to_thread(lm.tokenizer.decode, body.tokens)}

    @router.post("/admin/prompts")
    async def load(body: wire.LoadBody, request: Request) -> dict[str, Any]:
        service.demand_admin(request)
        return shown(engine, await asyncio.to_thread(catalogue.add, body.path, body.name))

    @router.delete("/admin/prompts/{name}")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        service.demand_admin(request)
        if not catalogue.remove(name):
            raise Refused(404, f"No prompt {name!r} was loaded.", code="model_not_found")
        return {"id": name, "object": "model", "deleted": True}

    return router


def _scored(lm: FrozenLM, text: str, rated: Sequence[RatedToken]) -> dict[str, Any]:
    return {
        "text": text,
        "logprob": sum(token.log_probability or 0.0 for token in rated),
        "tokens": [
            {
                "token": token_text(lm, token.token_id),
                "logprob": token.log_probability,
                "top": [
                    {"token": token_text(lm, other), "logprob": value} for other, value in token.likeliest
                ],
            }
            for token in rated
        ],
    }
