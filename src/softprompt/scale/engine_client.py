"""The HTTP client of an engine: what every connection to one has in common."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import anyio
import httpx2 as httpx

CONNECT_SECONDS = 5.0
# Servers close a connection that was idle: uvicorn and llama-server after 5 s. A request sent at that moment looks as if the engine
# had died with it, so idle connections are given up well before.
KEPT_SECONDS = 2.0


class EngineClient(httpx.AsyncClient):
    """httpx's client, which leaves no connection open when the task that asks is cancelled.

    Before it sends a request, httpx closes connections that were idle too long, one after the other. It guards that against
    anyio's cancellation alone: where asyncio cancels the task meanwhile, the rest of them stay open. So a request has a task of its
    own here, which ends by anyio."""

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """As httpx's."""
        scope = anyio.CancelScope()

        async def sent() -> httpx.Response | None:
            with scope:
                return await super(EngineClient, self).send(request, **options)
            return None

        sending = asyncio.ensure_future(sent())
        try:
            response = await asyncio.shield(sending)
        except asyncio.CancelledError:
            scope.cancel()
            with suppress(httpx.HTTPError):
                if (late := await sending) is not None:
                    await late.aclose()
            raise
        assert response is not None, "only this task ends the scope"
        return response


def engine_client(url: str, **options: Any) -> EngineClient:
    """A client for the engine at `url`; `options` are httpx's."""
    return EngineClient(
        base_url=url,
        # Waiting for the next token is unbounded: probes tell whether an engine is gone.
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_SECONDS
        ),
        **options,
    )
