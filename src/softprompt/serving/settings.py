"""Every setting of a server, declared once. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from softprompt.settings.base_settings import BaseSettings
from softprompt.settings.section import setting


class ServeSettings(BaseSettings):
    """One server."""

    library: str | None = setting(
        None, "A library of prompts (`softprompt publish`); it is watched for changes.", flag="--library"
    )
    host: str = setting("127.0.0.1", "The address to listen on; loopback unless asked.", flag="--host")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8000, "The port to listen on.", flag="--port")
    keys: str | None = setting(
        None,
        "A YAML file of keys: name, sha256, and what each may use. Without it anyone may ask.",
        flag="--keys",
    )
    max_rows: Annotated[int, Field(ge=1, le=4096)] = setting(
        32, "Rows that run side by side at most.", flag="--max-rows"
    )
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = setting(
        256, "Requests that wait at most; more are answered with 429.", flag="--max-waiting"
    )
    memory_gigabytes: Annotated[float, Field(gt=0, le=1_000_000)] | None = setting(
        None,
        "Most memory for keys and values of running rows; half of what is free at the start if none is given.",
        flag="--memory-gigabytes",
    )
    grace_seconds: Annotated[float, Field(ge=0, le=1_000_000)] = setting(
        30.0, "How long running answers may take to end when the server is stopped.", flag="--grace-seconds"
    )
    strict: bool = setting(
        False, "Refuse unknown fields of a request instead of naming them in a header.", flag="--strict"
    )
