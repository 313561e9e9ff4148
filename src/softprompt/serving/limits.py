"""Limits of a server: the bytes of a body, and the rows that a caller has running."""

from __future__ import annotations

from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serving.refusals import Refused

MAX_BODY_BYTES = 4_000_000


class BodyLimit:
    """Refuses a body that is too large, by its declared length and by what really comes (a chunked body declares none)."""

    def __init__(self, app: ASGIApp, most: int = MAX_BODY_BYTES) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = Refused(413, f"The body is larger than {self.most:,} bytes. Send less.", code="too_large")
        if not declared.isdigit() or int(declared) > self.most:
            await refusal.response(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise refusal
            return message

        async def watched(message: Message) -> None:
            if read <= self.most:
                await send(message)

        try:
            await self.app(
                scope, counted, watched
            )  # what reads the body may take the error for one of its form
        except Refused as error:
            if error is not refusal:
                raise
        if read > self.most:
            await refusal.response(scope, receive, send)


class Rows:
    """Rows that each caller has running or waiting."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    def of(self, caller: str) -> int:
        """The number of rows that a caller has running."""
        return self._taken[caller]

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a row."""
        return not self._taken

    def take(self, caller: str, rows: int) -> Lease:
        """Counts rows until the lease is given back."""
        self._taken[caller] += rows
        return Lease(self, caller, rows)

    def give_back(self, caller: str, rows: int) -> None:
        """Counts them no longer."""
        self._taken[caller] -= rows
        if not self._taken[caller]:
            del self._taken[caller]


class Lease:
    """Rows that are counted; giving them back twice counts once."""

    def __init__(self, rows: Rows, caller: str, taken: int) -> None:
        self._rows, self._caller, self._taken = rows, caller, taken

    def end(self, *_: Any) -> None:
        """Gives the rows back."""
        taken, self._taken = self._taken, 0
        if taken:
            self._rows.give_back(self._caller, taken)
