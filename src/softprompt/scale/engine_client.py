"""The HTTP client of an engine: what every connection to one has in common."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx

CONNECT_SECONDS = 5.0
# Servers close a connection that was idle: uvicorn and llama-server after 5 s. A request sent at that moment looks as if the engine
# had died with it, so idle connections are given up well before.
KEPT_SECONDS = 2.0


def engine_client(url: str, **options: Any) -> httpx.AsyncClient:
    """A client for the engine at `url`; `options` are httpx's."""
    return httpx.AsyncClient(
        base_url=url,
        # Waiting for the next token is unbounded: probes tell whether an engine is gone.
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_SECONDS
        ),
        **options,
    )
