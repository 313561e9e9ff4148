"""Every setting of a gateway, declared once. No torch here."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

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


class ReplicaSettings(Table):
    """Copies of a server on a cluster (--on)."""

    replicas: Annotated[int, Field(ge=1, le=10_000)] = setting(
        1, "With --on: engines at least, each with the base and every prompt.", flag="--replicas"
    )
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] | None = setting(
        None,
        "With --on: engines at most; further ones start while requests wait, and end when there is nothing to do.",
        flag="--max-replicas",
    )
    gateways: Annotated[int, Field(ge=1, le=1_000)] = setting(
        2,
        "With --on: gateways, which put requests to the engines, and to another one when an engine dies.",
        flag="--gateways",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas: found {self.max_replicas}, wanted at least replicas ({self.replicas})."
            )
        return self
