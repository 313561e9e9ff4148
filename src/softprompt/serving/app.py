"""The server's application: its routes put together, the page and the probes, and errors in OpenAI's shape, always."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from softprompt.serving import wire
from softprompt.serving.catalogue import LOOK_EVERY_SECONDS, Catalogue
from softprompt.serving.engine import Engine
from softprompt.serving.keys import Keys
from softprompt.serving.limits import BodyLimit
from softprompt.serving.openai_routes import openai_routes
from softprompt.serving.own_routes import own_routes
from softprompt.serving.refusals import answer_errors
from softprompt.serving.service import Service

PAGE = Path(__file__).parent / "playground.html"
PAGE_TEXT = PAGE.read_text(encoding="utf-8")

ERRORS = {
    400: "The request cannot be answered as it is",
    401: "The key is missing or not known",
    403: "The key may not do this",
    404: "There is no such model, for this key",
    413: "The body is too large",
    429: "There is no room now; Retry-After says when to try again",
    500: "A fault of the server",
    503: "The server is ending",
}


def page_policy(text: str) -> str:
    """What the page may do: its own script and style, known by their digests, and requests to its own server."""
    sources = {}
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inside]
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


POLICY = page_policy(PAGE_TEXT)

log = logging.getLogger(__name__)


def build_app(
    engine: Engine, catalogue: Catalogue, keys: Keys | None = None, *, strict: bool = False
) -> FastAPI:
    """The application over a started engine. `strict` refuses unknown fields instead of naming them in a header."""
    service = Service(engine, catalogue, keys or Keys(), strict=strict)

    @asynccontextmanager
    async def looking(app: FastAPI) -> AsyncIterator[None]:
        """Looks at the library and the keys every so often, beside the answers."""
        looks = _every(LOOK_EVERY_SECONDS, catalogue.refresh, service.keys.refresh)
        task = asyncio.create_task(looks)
        try:
            yield
        finally:
            task.cancel()

    app = _App(
        title="softprompt",
        version=version("softprompt"),
        docs_url=None,
        redoc_url=None,
        lifespan=looking,
        responses={status: {"model": wire.ErrorBody, "description": what} for status, what in ERRORS.items()},
    )
    app.state.service = service
    app.add_middleware(BodyLimit)
    answer_errors(
        app, lambda error: service.metrics.rejected(error.code or str(error.status)), service.lm.name
    )
    _add_probes(app, service)
    app.include_router(openai_routes(service))
    app.include_router(own_routes(service))
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """What /openapi.json says, made when it is first asked for. FastAPI documents 422 for a body that does not fit; here that
        is 400, as everywhere in OpenAI's API."""
        if self.openapi_schema is None:
            for path in super().openapi()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return super().openapi()


def _add_probes(app: FastAPI, service: Service) -> None:
    """Whether the server works, what it counts, and the page."""

    @app.get("/health")
    async def health() -> Response:
        """Whether answers can be given at all, and what runs and waits."""
        now = service.engine.health()
        return JSONResponse(
            {"status": "ok" if now["alive"] else "failed", **now}, 200 if now["alive"] else 503
        )

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken: not while the server ends."""
        is_ready = service.is_ready and service.engine.is_alive
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/version")
    async def versions() -> dict[str, str]:
        return {"softprompt": version("softprompt")}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def measured(request: Request) -> Response:
        """Prometheus' text format. It names every model, so that with keys it needs one with admin: true."""
        if service.keys.are_wanted:
            service.demand_admin(request)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return HTMLResponse(PAGE_TEXT, headers=headers)


async def _every(seconds: float, *looks: Callable[[], object]) -> None:
    """Looks again and again, in a thread: a slow disk must not keep answers waiting."""
    while True:
        await asyncio.sleep(seconds)
        for look in looks:
            try:
                await asyncio.to_thread(look)
            except Exception:
                log.exception("The library or the keys could not be looked at.")
