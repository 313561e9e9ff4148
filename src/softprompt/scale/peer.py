"""One engine as a gateway sees it: a server that speaks our API, what it serves now, and how a request is put to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2 as httpx

from softprompt.scale.engine_client import engine_client
from softprompt.scale.event_lines import lines_of

Result = TypeVar("Result")

PROBE_SECONDS = 5.0  # that an engine may take to answer a probe
BASE = "base"


class Broken(Exception):
    """An engine does not answer, or stopped in the middle of an answer. `was_reached`: whether it had the request."""

    def __init__(self, problem: str, *, was_reached: bool = True) -> None:
        super().__init__(problem)
        self.was_reached = was_reached


@dataclass(frozen=True)
class Model:
    """A model of an engine: its name there, the digest of its prompt (`base` for none), and what /v1/models tells of it."""

    name: str
    digest: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Whole:
    """An answer that has come as a whole."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def record(self) -> dict[str, Any]:
        """Its JSON object; an empty one where it is something else."""
        try:
            record = json.loads(self.content)
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}


class Peer:
    """An engine behind `url`. `look` asks what it serves; `ask` and `stream` put requests to it."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        lost_after_seconds: float = 10.0,
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.models: dict[str, Model] = {}
        self.base: str | None = None  # digest of the base's weights
        self.is_ready = False
        self.problem: str | None = "has not been asked yet"
        self.running = 0  # requests that are with it now
        self._lost_after, self._closing = lost_after_seconds, closing
        self._seen = time.monotonic()
        self._is_lost = False
        self._waits: set[asyncio.Timeout] = set()  # of what is with it; they end when it is lost
        self._listed = b""
        self._client = engine_client(
            self.url, transport=transport, headers={"authorization": f"Bearer {key}"} if key else {}
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()
        if self._closing is not None:
            await self._closing()

    async def look(self) -> None:
        """Ask whether it takes requests and what it serves. One that was silent for too long is lost: what is with it fails."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                ready = await self._client.get("/ready")
                listed = await self._client.get("/v1/models")
            if listed.status_code == 200 and listed.content != self._listed:
                records = listed.json()["data"]
                self.models = {model.name: model for model in map(_model, records)}
                about = self.models[BASE].record.get("softprompt") or {}
                self.base = str(about.get("base_sha256") or self.models[BASE].record.get("root"))
                self._listed = listed.content
            self.is_ready = ready.status_code == 200 and listed.status_code == 200
            self.problem = None if self.is_ready else f"answers {ready.status_code} and {listed.status_code}"
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError) as error:
            self.is_ready = False
            self.problem = f"does not answer ({type(error).__name__})"
            if time.monotonic() - self._seen > self._lost_after:
                self._lose()
            return
        self._seen = time.monotonic()
        self._is_lost = False

    def failed(self, problem: str) -> None:
        """Send it nothing more until a probe finds it well."""
        self.is_ready, self.problem = False, problem

    def named(self, digest: str) -> str | None:
        """A name of the prompt here, best one that never means another."""
        names = [model.name for model in self.models.values() if model.digest == digest]
        return min(names, key=lambda name: ("@" not in name, name), default=None)

    async def ask(self, method: str, path: str, body: Any = None) -> Whole:
        """The whole answer. Raises Broken where none comes."""
        self.running += 1
        try:
            response = await self._unless_lost(self._client.request(method, path, json=body))
            return Whole(response.status_code, response.headers, response.content)
        except httpx.HTTPError as error:
            raise _broken(error) from error
        finally:
            self.running -= 1

    async def stream(self, path: str, body: Any) -> AsyncGenerator[Whole | str, None]:
        """First a Whole: of an answer that is no stream, or of a stream without its content. Then each event's data.

        Raises Broken where it stops before its end, which is [DONE] or that of responses. Closing it hangs up."""
        self.running += 1
        try:
            request = self._client.build_request("POST", path, json=body)
            response = await self._unless_lost(self._client.send(request, stream=True))
            try:
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    content = await self._unless_lost(response.aread())
                    yield Whole(response.status_code, response.headers, content)
                    return
                yield Whole(response.status_code, response.headers, b"")
                lines = lines_of(response)
                while (line := await self._unless_lost(_next(lines))) is not None:
                    if line.startswith("data: "):
                        yield line.removeprefix("data: ")
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise _broken(error) from error
        finally:
            self.running -= 1

    def _lose(self) -> None:
        """Ends all waits for the engine."""
        self._is_lost = True
        for wait in [each for each in self._waits if not each.expired()]:
            wait.reschedule(asyncio.get_running_loop().time())

    async def _unless_lost(self, coming: Coroutine[Any, Any, Result]) -> Result:
        """What is coming. Raises Broken where the engine is lost before."""
        if self._is_lost:
            coming.close()
            raise Broken("answers no probe any more")
        # A timeout without a time: a task for each event of a stream would cost more than the rest of the way.
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                return await coming
        except TimeoutError:
            raise Broken("answers no probe any more") from None
        finally:
            self._waits.discard(wait)


def _model(record: Mapping[str, Any]) -> Model:
    digest = (record.get("softprompt") or {}).get("digest")
    return Model(str(record["id"]), str(digest or BASE), record)


def _broken(error: Exception) -> Broken:
    never_reached = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    return Broken(str(error) or type(error).__name__, was_reached=not never_reached)


async def _next(lines: Any) -> str | None:
    line: str | None = await anext(lines, None)
    return line
