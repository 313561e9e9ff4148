"""Answers that are errors, in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from softprompt.errors import MissingExtra, OutOfMemory, SoftPromptError
from softprompt.serving import wire
from softprompt.serving.engine import EngineFailed, Overloaded, PromptGone, ShuttingDown

# Of an absolute path, all but its last part.
FOLDERS = re.compile(r"(?<![\w:/.~-])/(?:[^\s/:\"']+/)+(?=[^\s/])")


class Refused(Exception):
    """An answer that is an error: status, OpenAI's type, and what to say."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        return wire.error_body(str(self), self.kind, self.code, self.param)

    @property
    def response(self) -> Response:
        """The HTTP answer; the openai client obeys its headers when it tries again by itself."""
        headers = {"retry-after": "1", "retry-after-ms": "500"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers=headers)


def too_many(message: str) -> Refused:
    """429: more than there is room for now."""
    return Refused(429, f"{message} Try again in a moment.", "rate_limit_error", "rate_limit_exceeded")


def no_such_model(name: str) -> Refused:
    """404: a model that there is not, or not for this caller."""
    return Refused(
        404,
        f"The model {name!r} does not exist. GET /v1/models lists those that do.",
        code="model_not_found",
        param="model",
    )


def failed() -> Refused:
    """500: a fault of ours, without details in the answer."""
    return Refused(500, "The server failed to answer. Its log says more.", "server_error", "internal_error")


def as_refusal(error: BaseException, base: str) -> Refused:
    """The response to a client for an error. `base` is the base's name; folders' paths are not shown."""
    if isinstance(error, Refused):
        return error
    if not isinstance(error, SoftPromptError):
        return failed()
    message = FOLDERS.sub("", str(error).replace(base, shown_name(base)))
    match error:
        case Overloaded():
            return too_many(message.removesuffix(" Try again in a moment."))
        case ShuttingDown():
            return Refused(503, message, "server_error", "shutting_down")
        case EngineFailed():
            return Refused(500, message, "server_error", "engine_failed")
        case PromptGone():
            return Refused(404, message, code="model_not_found", param="model")
        case OutOfMemory():
            return Refused(400, message, code="context_length_exceeded")
        case MissingExtra():
            return Refused(400, message, code="not_supported")
    return Refused(400, message)


def shown_name(base: str) -> str:
    """A base's name, or the last part of its folder's path."""
    return PurePath(base).name if PurePath(base).is_absolute() else base


def answer_errors(app: FastAPI, refused: Callable[[Refused], None], base: str) -> None:
    """Answers every error of an application in OpenAI's shape; each of them is told to `refused`."""

    def answered(error: Refused) -> Response:
        refused(error)
        return error.response

    @app.exception_handler(Refused)
    async def by_us(request: Request, error: Refused) -> Response:
        return answered(error)

    @app.exception_handler(SoftPromptError)
    async def unfit(request: Request, error: SoftPromptError) -> Response:
        return answered(as_refusal(error, base))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        what = str(first["msg"]).removeprefix("Value error, ")
        return answered(Refused(400, f"{where or 'body'}: {what}.", param=where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = answered(Refused(error.status_code, str(error.detail), code=str(error.status_code)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return failed().response
