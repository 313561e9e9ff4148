"""Answers on their way to a client: several works at once, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.serving.engine import Answer, Engine, Work

Closing = Callable[[], Coroutine[Any, Any, Any]]


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed when the answer ends, or the client has gone."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        closing: Sequence[Closing],
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


async def numbered(
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


async def side_by_side(
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
