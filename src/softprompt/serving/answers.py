"""Answers of the engine in OpenAI's shapes, whole or as server-sent events: completions, chats and responses."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, TypeAlias

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import SoftPromptError
from softprompt.inference.score import RatedToken
from softprompt.serving import wire
from softprompt.serving.catalogue import Served
from softprompt.serving.engine import Answer, Finished, Piece
from softprompt.serving.refusals import Refused, as_refusal

Events: TypeAlias = AsyncIterator[tuple[int, Answer]]

LINE_SEPARATORS = "\x85\u2028\u2029"

log = logging.getLogger(__name__)


class Answers(Protocol):
    """One shape of answers. Events carry the number of the choice that they belong to."""

    async def gathered(self, events: Events) -> dict[str, Any]:
        """One object when everything has come."""

    def streamed(self, first: tuple[int, Answer], events: Events) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first one is an event too."""


class Choices:
    """Completions and chats: a choice for each text and sample. With `echoed`, every choice begins with its text's own
    tokens."""

    def __init__(
        self,
        lm: FrozenLM,
        body: wire.CompletionBody | wire.ChatBody,
        served: Served,
        echoed: Sequence[Sequence[RatedToken]] = (),
    ) -> None:
        self.lm, self.body, self.served, self.echoed = lm, body, served, echoed
        self.is_chat = isinstance(body, wire.ChatBody)
        self.shape = "chat.completion" if self.is_chat else "text_completion"
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    async def gathered(self, events: Events) -> dict[str, Any]:
        """One object when everything has come."""
        done: dict[int, Finished] = {}
        async for index, answer in events:
            if isinstance(answer, Finished):
                done[index] = answer
        choices = []
        for index, answer in sorted(done.items()):
            words: dict[str, Any] = (
                {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
                if self.is_chat
                else {"text": self._echo(index) + answer.text}
            )
            if self.body.return_token_ids:
                words["token_ids"] = list(answer.token_ids)
            choices.append(
                {
                    "index": index,
                    **words,
                    "logprobs": self._logprobs(answer, index),
                    "finish_reason": reason(answer),
                }
            )
        return {**self.head(self.shape), "choices": choices, "usage": self._usage(done)}

    def of_echoes(self) -> dict[str, Any]:
        """One object of the texts alone, where no new token is wanted."""
        choices = [
            {
                "index": index,
                "text": self._echo(index),
                "logprobs": None if self._top is None else self._table(self._rated_echo(index)),
                "finish_reason": "length",
            }
            for index in range(len(self.echoed) * self.body.samples)
        ]
        read = sum(len(tokens) for tokens in self.echoed)
        virtual = self.served.virtual_tokens * len(self.echoed)
        return {**self.head(self.shape), "choices": choices, "usage": wire.usage(read, virtual, 0)}

    async def streamed(self, first: tuple[int, Answer], events: Events) -> AsyncIterator[bytes]:
        """A piece of text each; then the usage where it was asked for, and [DONE]."""
        shape = "chat.completion.chunk" if self.is_chat else self.shape
        done: dict[int, Finished] = {}
        started: set[int] = set()
        shown: Counter[int] = Counter()  # token ids of each choice that a client has had
        try:
            async for index, answer in _after(first, events):
                if self.is_chat and index not in started:
                    yield self._event(shape, index, {"delta": {"role": "assistant", "content": ""}})
                started.add(index)
                if isinstance(answer, Piece):
                    words: dict[str, Any] = (
                        {"delta": {"content": answer.text}} if self.is_chat else {"text": answer.text}
                    )
                    if self.body.return_token_ids:
                        words["token_ids"] = list(answer.token_ids)
                        shown[index] += len(answer.token_ids)
                    yield self._event(shape, index, words)
                else:
                    done[index] = answer
                    words = {"delta": {}} if self.is_chat else {"text": ""}
                    if self.body.return_token_ids:
                        words["token_ids"] = list(answer.token_ids[shown[index] :])
                    yield self._event(shape, index, words, reason(answer), self._logprobs(answer, index))
        except Exception as error:  # the status has been sent; an error can only be an event
            yield sse(_refusal_body(error, self.lm))
            return
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield sse({**self.head(shape), "choices": [], "usage": self._usage(done)})
        yield b"data: [DONE]\n\n"

    def head(self, shape: str) -> dict[str, Any]:
        """The fields that begin every object of this answer."""
        return {"id": self.id, "object": shape, "created": self.created, "model": self.served.name}

    def _event(
        self, shape: str, index: int, words: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> bytes:
        choice = {"index": index, **words, "logprobs": logprobs, "finish_reason": reason}
        return sse({**self.head(shape), "choices": [choice]})

    def _usage(self, done: dict[int, Finished]) -> dict[str, Any]:
        # Samples of one text have consecutive numbers, and their text was read once.
        read = [done[index] for index in sorted(done) if index % self.body.samples == 0]
        return wire.usage(
            sum(answer.input_tokens for answer in read),
            sum(answer.virtual_tokens for answer in read),
            sum(len(answer.token_ids) for answer in done.values()),
        )

    def _logprobs(self, answer: Finished, index: int) -> dict[str, Any] | None:
        if self._top is None:
            return None
        if self.is_chat:
            return {"content": chat_logprobs(self.lm, answer), "refusal": None}
        likeliest = answer.likeliest or [()] * len(answer.token_ids)
        rated = [
            RatedToken(token, value, (*best, (token, value)))
            for token, value, best in zip(answer.token_ids, answer.log_probabilities, likeliest, strict=True)
        ]
        return self._table([*self._rated_echo(index), *rated])

    @property
    def _top(self) -> int | None:
        """The number of likeliest tokens that are wanted beside each; None without log-probabilities."""
        if isinstance(self.body, wire.ChatBody):
            return (self.body.top_logprobs or 0) if self.body.logprobs else None
        return self.body.logprobs

    def _table(self, rated: Sequence[RatedToken]) -> dict[str, Any]:
        """Completions' columns: a token's text, its log-probability, the likeliest in its place and itself, and where it
        begins."""
        tokens = [token_text(self.lm, token.token_id) for token in rated]
        return {
            "tokens": tokens,
            "token_logprobs": [token.log_probability for token in rated],
            "top_logprobs": [
                None
                if token.log_probability is None
                else {text: token.log_probability, **by_text(self.lm, token.likeliest)}
                for text, token in zip(tokens, rated, strict=True)
            ],
            "text_offset": offsets(tokens),
        }

    def _rated_echo(self, index: int) -> Sequence[RatedToken]:
        return self.echoed[index // self.body.samples] if self.echoed else ()

    def _echo(self, index: int) -> str:
        return str(self.lm.tokenizer.decode([token.token_id for token in self._rated_echo(index)]))


class ResponseShape:
    """OpenAI's responses: one message, and events of many kinds while it comes."""

    def __init__(self, lm: FrozenLM, body: wire.ResponsesBody, served: Served) -> None:
        self.lm, self.body, self.served = lm, body, served
        self.id, self.message_id = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        self.created = int(time.time())

    async def gathered(self, events: Events) -> dict[str, Any]:
        """One object when everything has come."""
        async for _, answer in events:
            if isinstance(answer, Finished):
                return self._response(answer)
        raise AssertionError("an answer has an end")

    async def streamed(self, first: tuple[int, Answer], events: Events) -> AsyncIterator[bytes]:
        """The events that the openai client builds its response from, in their order."""
        number = -1

        def event(kind: str, **record: Any) -> bytes:
            nonlocal number
            number += 1
            return sse({"type": kind, "sequence_number": number, **record}, kind)

        where = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        yield event("response.created", response=self._response(None))
        yield event("response.in_progress", response=self._response(None))
        yield event(
            "response.output_item.added", output_index=0, item={**self._message("in_progress"), "content": []}
        )
        yield event("response.content_part.added", **where, part=_part("", []))
        try:
            async for _, answer in _after(first, events):
                if isinstance(answer, Piece):
                    yield event("response.output_text.delta", **where, delta=answer.text, logprobs=[])
                    continue
                response = self._response(answer)
                (message,) = response["output"]
                (part,) = message["content"]
                yield event("response.output_text.done", **where, text=answer.text, logprobs=part["logprobs"])
                yield event("response.content_part.done", **where, part=part)
                yield event("response.output_item.done", output_index=0, item=message)
                yield event(f"response.{response['status']}", response=response)
        except Exception as error:  # the status has been sent; an error can only be an event
            refusal = _refusal_body(error, self.lm)["error"]
            yield event("error", code=refusal["code"], message=refusal["message"], param=refusal["param"])

    def _message(self, status: str) -> dict[str, Any]:
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status}

    def _response(self, answer: Finished | None) -> dict[str, Any]:
        body = self.body
        is_cut = answer is not None and answer.reason == "length"
        status = "in_progress" if answer is None else "incomplete" if is_cut else "completed"
        output, counted = [], None
        if answer is not None:
            part = _part(answer.text, chat_logprobs(self.lm, answer))
            output = [{**self._message("incomplete" if is_cut else "completed"), "content": [part]}]
            counted = {
                "input_tokens": answer.input_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": len(answer.token_ids),
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.input_tokens + len(answer.token_ids),
                "softprompt_virtual_tokens": answer.virtual_tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.served.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": counted,
        }


async def columns(
    lm: FrozenLM, events: AsyncIterator[tuple[int, Answer | Exception]]
) -> AsyncIterator[bytes]:
    """A comparison as server-sent events: pieces, ends and errors, each with the number of its column."""
    async for column, answer in events:
        match answer:
            case Piece():
                yield sse({"column": column, "text": answer.text})
            case Finished():
                counted = wire.usage(answer.input_tokens, answer.virtual_tokens, len(answer.token_ids))
                yield sse({"column": column, "finish_reason": reason(answer), "usage": counted})
            case error:
                yield sse({"column": column, **_refusal_body(error, lm)})
    yield b"data: [DONE]\n\n"


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _refusal_body(error: Exception, lm: FrozenLM) -> dict[str, Any]:
    if not isinstance(error, SoftPromptError | Refused):
        log.error("An answer failed while it was streamed.", exc_info=error)
    return as_refusal(error, lm.name).body


async def _after(first: tuple[int, Answer], events: Events) -> Events:
    yield first
    async for event in events:
        yield event


def chat_logprobs(lm: FrozenLM, answer: Finished) -> list[dict[str, Any]]:
    """Each token with its log-probability and the likeliest ones in its place, as chats and responses show them."""
    if not answer.log_probabilities:
        return []
    likeliest: Sequence[Sequence[tuple[int, float]]] = answer.likeliest or [()] * len(answer.token_ids)
    return [
        {**_rated(lm, token, value), "top_logprobs": [_rated(lm, other, rate) for other, rate in best]}
        for token, value, best in zip(answer.token_ids, answer.log_probabilities, likeliest, strict=True)
    ]


def _rated(lm: FrozenLM, token: int, value: float) -> dict[str, Any]:
    text = token_text(lm, token)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def token_text(lm: FrozenLM, token: int) -> str:
    """A token by itself."""
    return str(lm.tokenizer.decode([token]))


def by_text(lm: FrozenLM, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Log-probabilities by the tokens' texts; of two tokens with one text the likelier."""
    table: dict[str, float] = {}
    for token, value in sorted(likeliest, key=lambda pair: -pair[1]):
        table.setdefault(token_text(lm, token), value)
    return table


def offsets(tokens: Sequence[str]) -> list[int]:
    """The character at which each token begins in the whole text."""
    starts, at = [], 0
    for token in tokens:
        starts.append(at)
        at += len(token)
    return starts


def reason(answer: Finished) -> str:
    """OpenAI's word for how an answer ended."""
    return "length" if answer.reason == "length" else "stop"


def sse(record: dict[str, Any] | str, event: str | None = None) -> bytes:
    """One server-sent event: its data are one line, also to clients that break lines wherever Unicode does."""
    named = f"event: {event}\n" if event else ""
    data = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
    for separator in LINE_SEPARATORS:  # JSON itself escapes those of ASCII
        data = data.replace(separator, f"\\u{ord(separator):04x}")
    return f"{named}data: {data}\n\n".encode(errors="replace")
