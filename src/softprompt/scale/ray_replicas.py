"""Engines and gateways that are replicas of Ray Serve. To a gateway all engines are one, which outlives its parts.

Serve chooses the replica for a request, counts what is under way and replaces what dies. That a request outlives the
replica is the gateway's part (gateway.py), as before engines anywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
from fastapi import FastAPI

from softprompt.errors import ClusterError, first_line
from softprompt.scale.app_transport import AppTransport
from softprompt.scale.gateway import Gateway
from softprompt.scale.gateway_app import build_gateway
from softprompt.scale.peer import Peer
from softprompt.scale.ray_site import Site
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.keys import Keys
from softprompt.serving.settings import ServeSettings

if TYPE_CHECKING:
    import torch

NOWHERE = "http://engines"  # the address in requests that no network carries


@dataclass(frozen=True)
class Given:
    """A prompt that is served from a folder: what the server's starter found there, and every engine has to find."""

    folder: str
    digest: str


class EngineReplica:
    """One engine: the base, every prompt, and our own server's application over them."""

    def __init__(self, settings: ServeSettings, prompts: Sequence[Given], site: Site, most: int) -> None:
        site.enter()
        from softprompt.base.from_settings import base_of
        from softprompt.serving.server import make_server

        # Keys are the gateways' to check: what comes here has passed one.
        settings = settings.model_copy(update={"keys": None})
        lm = base_of(settings)
        if settings.memory_gigabytes is None and lm.device.type == "cpu":
            settings = settings.model_copy(update={"memory_gigabytes": _share_of_memory(lm.device, most)})
        self.server = make_server(lm, settings)
        for given in prompts:
            found = self.server.catalogue.add(given.folder).digest
            if found != given.digest:
                raise ClusterError(
                    f"{given.folder}: holds another prompt than when the server was started (found {str(found)[:12]}, wanted "
                    f"{given.digest[:12]}). Publish prompts that change into a library, and serve that."
                )
        self.base = lm.fingerprint.digest
        self.server.engine.start()
        self.transport = AppTransport(self.server.app, _look_at_nothing)

    async def check_health(self) -> None:
        """Looks at the library. Raises RuntimeError where the engine works no longer, and is to be replaced."""
        if not self.server.engine.is_alive:
            raise RuntimeError("the engine has ended")
        await asyncio.to_thread(self.server.catalogue.refresh)

    async def answer(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncGenerator[Any, None]:
        """First the base's digest, which says that the request is here, then status and headers, then the parts of the body.

        The gateway may have learned of a new version from another engine, so the library is looked at before a 404."""
        yield self.base
        request = httpx.Request(method, f"{NOWHERE}{path}", headers=headers, content=body)
        response = await self.transport.handle_async_request(request)
        if response.status_code == 404:
            await response.aclose()
            await asyncio.to_thread(self.server.catalogue.refresh)
            response = await self.transport.handle_async_request(request)
        try:
            yield response.status_code, list(response.headers.items())
            async for part in response.aiter_raw():
                yield part
        finally:
            await response.aclose()


def _share_of_memory(device: torch.device, most: int) -> float:
    """Gigabytes for the running rows of an engine beside the other ones that its machine may get: of half of what is free."""
    import ray

    from softprompt.base.hardware import free_memory_bytes

    context = ray.get_runtime_context()
    cpus = context.get_assigned_resources().get("CPU", 1) or 1
    own = (node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    neighbours = max(1, min(int(next(own, 1) // cpus), most))
    return max(free_memory_bytes(device) / 2 / neighbours / 10**9, 0.01)


class GatewayReplica:
    """One gateway before the engines."""

    def __init__(self, engines: Any, front: GatewaySettings, keys: str | None, site: Site) -> None:
        site.enter()
        peer = Engines(engines, lost_after_seconds=front.lost_after_seconds)
        self.gateway, self.keys = Gateway([peer], front), Keys.load(keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve puts requests to."""
        return build_gateway(self.gateway, self.keys)


class Engines(Peer):
    """All engines of the cluster as one. Serve knows which of them work, so a failure of one stops nothing."""

    def __init__(self, handle: Any, *, lost_after_seconds: float) -> None:
        super().__init__(NOWHERE, transport=EnginesTransport(handle), lost_after_seconds=lost_after_seconds)

    async def look(self) -> None:
        """Asks some engine what it serves. A probe that failed was perhaps with an engine that died or hangs: requests are
        taken until none has been answered for too long."""
        await super().look()
        if not self.is_ready and self.models and time.monotonic() - self._seen <= self._lost_after:
            self.is_ready = True

    def failed(self, problem: str) -> None:
        """Notes the problem; the other engines take requests."""
        self.problem = problem


class EnginesTransport(httpx.AsyncBaseTransport):
    """Puts a client's requests to some engine through a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle.options(method_name="answer", stream=True)
        self.base: str | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer, as soon as its headers are there.

        Raises ReadError where the engine died, ConnectError where the request has reached none, or one of another base."""
        body = await request.aread()
        path = request.url.raw_path.decode()
        parts = self.handle.remote(request.method, path, list(request.headers.items()), body)
        try:
            base = await anext(_parts(parts, is_first=True))
        except BaseException:
            parts.cancel()
            raise
        self.base = self.base or base
        if base != self.base:
            parts.cancel()
            raise httpx.ConnectError(
                f"an engine holds another base (found {base[:12]}, wanted {self.base[:12]}): the machines have other files"
            )
        try:
            status, headers = await anext(_parts(parts))
        except BaseException:
            parts.cancel()
            raise
        return httpx.Response(status, headers=headers, stream=_Rest(parts))


class _Rest(httpx.AsyncByteStream):
    """The parts of an answer behind its headers; closing it tells the engine that nobody waits."""

    def __init__(self, parts: Any) -> None:
        self._given, self._parts = parts, _parts(parts)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts:
            yield part

    async def aclose(self) -> None:
        """The client has gone, or has everything."""
        self._given.cancel()


async def _parts(parts: Any, *, is_first: bool = False) -> AsyncGenerator[Any, None]:
    """What an engine sends. Raises ReadError where it died, and ConnectError where nothing was put to one, in Ray's words."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    try:
        async for part in parts:
            yield part
    except (BackPressureError, DeploymentUnavailableError) as error:
        raise httpx.ConnectError(_words(error)) from error
    except (RayError, RayServeException) as error:
        # Serve may send requests to a dead engine for a moment: those did not end it, and are no reason to give up.
        kind = httpx.ConnectError if is_first else httpx.ReadError
        raise kind(_words(error)) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


async def _look_at_nothing() -> None:
    """Called before every probe; the library is looked at by `check_health`."""
