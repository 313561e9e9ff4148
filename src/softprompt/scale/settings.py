"""Every setting of a gateway, declared once. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from softprompt.settings.section import setting
from softprompt.settings.table import Table


class GatewaySettings(Table):
    """One front for several engines."""

    engine: tuple[str, ...] = setting(
        (),
        "An engine to pass requests on to, instead of loading the base here: http://HOST:PORT of another `softprompt serve`, "
        "vllm=http://HOST:PORT of vLLM, or llama=http://HOST:PORT of llama-server; several with commas between them.",
        flag="--engine",
    )
    states: str | None = setting(
        None,
        "The folder of prompts exported for vLLM or llama-server (`softprompt export --to vllm-kv | llama-slot`).",
        flag="--states",
    )
    resume_streams: bool = setting(
        True,
        "Let a stream go on at another engine when its own one dies; without it the stream ends with an error. In bfloat16 two engines "
        "may part where two tokens are equally likely.",
        flag="--resume-streams",
    )
    patience_seconds: Annotated[float, Field(ge=0, le=3600)] = setting(
        15.0,
        "How long a request waits for an engine to come back when none answers.",
        flag="--patience-seconds",
    )
    lost_after_seconds: Annotated[float, Field(gt=0, le=3600)] = setting(
        10.0,
        "An engine that answers no probe for so long is given up, and its requests go to the others.",
        flag="--lost-after-seconds",
    )
