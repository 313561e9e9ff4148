"""Clients that hang up: whatever is being done for them is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from softprompt.serving.refusals import Refused

Result = TypeVar("Result")


async def while_connected(request: Request, answer: Awaitable[Result]) -> Result:
    """The answer, unless the client hangs up before: then it is cancelled. Raises Refused for that."""
    answering, leaving = asyncio.ensure_future(_awaited(answer)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise Refused(499, "The client has gone.", code="client_gone")
    finally:
        for task in (answering, leaving):
            task.cancel()
            with suppress(BaseException):
                await task


async def _awaited(answer: Awaitable[Result]) -> Result:
    return await answer


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
