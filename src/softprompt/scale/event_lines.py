"""The lines of a stream of server-sent events, as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx2 as httpx


async def lines_of(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The lines of a response, without their ends.

    Not httpx's own, which also cuts at U+2028, U+0085 and other separators: other engines write those into their JSON as
    they are, and half an event is no JSON."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
