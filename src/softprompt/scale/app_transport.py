"""An application of this process as a server that a client talks to: answers come event by event, and nothing listens.

httpx has such a transport too, but it gathers a whole answer before it hands it over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2 as httpx
from starlette.types import ASGIApp

Look = Callable[[], Awaitable[None]]


class AppTransport(httpx.AsyncBaseTransport):
    """Puts a client's requests to an application. `look` runs before every probe of /ready."""

    def __init__(self, app: ASGIApp, look: Look) -> None:
        self.app, self.look = app, look

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer, as soon as its headers are there."""
        if request.url.path == "/ready":
            await self.look()
        body = await request.aread()
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.put_nowait(message)

        async def run() -> None:
            try:
                await self.app(_scope(request), receive, send)
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            start = await sent.get()
        except asyncio.CancelledError:
            gone.set()
            task.cancel()
            raise
        if start is None:
            raise httpx.ReadError("the application ended without an answer")
        return httpx.Response(start["status"], headers=start["headers"], stream=_Body(sent, gone, task))


class _Body(httpx.AsyncByteStream):
    """The parts of an answer; closing it tells the application that the client has gone."""

    def __init__(
        self, sent: asyncio.Queue[dict[str, Any] | None], gone: asyncio.Event, task: asyncio.Task[None]
    ) -> None:
        self._sent, self._gone, self._task = sent, gone, task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._sent.get()) is not None:
            if message["type"] == "http.response.body":
                if message.get("body"):
                    yield message["body"]
                if not message.get("more_body"):
                    return
        raise httpx.ReadError("the application's answer stopped before its end")

    async def aclose(self) -> None:
        """The client has gone, or has everything."""
        self._gone.set()
        await asyncio.gather(self._task, return_exceptions=True)


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.url.path,
        "raw_path": request.url.raw_path,
        "root_path": "",
        "query_string": request.url.query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 0),
    }
