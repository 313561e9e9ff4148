"""What goes over the wire: the bodies of OpenAI's API, with the fields that are honoured. No model code here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from softprompt.inference.sampling import DecodeSettings

MAX_LOG_PROBABILITIES = 20


class Body(BaseModel):
    """A request's body. Fields that are not known are ignored, and named in the header x-softprompt-ignored."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> list[str]:
        """Fields that were given and are not known."""
        return sorted(self.model_extra or {})


class StreamOptions(BaseModel):
    include_usage: bool = False


class SoftPromptOptions(BaseModel):
    """Ours: the fields of a template that has several inputs."""

    model_config = ConfigDict(extra="forbid")
    fields: dict[str, str] | None = None


class Decoding(Body):
    """How to decode: shared by completions and chat."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    n: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    softprompt: SoftPromptOptions | None = None

    @field_validator("stop")
    @classmethod
    def _bounded(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or any(not text or len(text) > 500 for text in texts):
            raise ValueError("stop: wanted at most 16 texts of 1 to 500 characters.")
        return stop

    def refused(self) -> str | None:
        """The name of a field that changes the answer and is not supported, or None."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                return name
        return "logit_bias" if self.logit_bias else None

    def decode_settings(self, max_new_tokens: int | None, log_probabilities: bool) -> DecodeSettings:
        """The same as settings of inference; OpenAI's default temperature is 1."""
        temperature = 1.0 if self.temperature is None else self.temperature
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return DecodeSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(stop),
            n=self.n,
            ignore_end=self.ignore_eos,
            log_probabilities=log_probabilities,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionBody(Decoding):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(default=16, ge=0, le=1_000_000)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOG_PROBABILITIES)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each text, or list of ids, that is to be continued."""
        given: Any = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if single else list(given)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The words of a turn; ValueError for parts that are not text."""
        if isinstance(self.content, list):
            if any(part.get("type") not in ("text", "input_text") for part in self.content):
                raise ValueError("only text parts are supported in a message")
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class ChatBody(Decoding):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOG_PROBABILITIES)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class ScoreBody(Body):
    """How likely continuations are under several prompts: for the page, and for ranking labels."""

    input: str = Field(max_length=100_000)
    continuations: list[str] = Field(min_length=1, max_length=64)
    models: list[str] = Field(min_length=1, max_length=16)
    top: int = Field(default=0, ge=0, le=MAX_LOG_PROBABILITIES)


class TokenizeBody(Body):
    model: str = "base"
    prompt: str = Field(default="", max_length=1_000_000)


class DetokenizeBody(Body):
    model: str = "base"
    tokens: list[int] = Field(max_length=1_000_000)


class LoadBody(Body):
    name: str
    path: str


def usage(input_tokens: int, virtual_tokens: int, new_tokens: int) -> dict[str, Any]:
    """OpenAI's count of tokens; virtual ones are told apart."""
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": input_tokens + new_tokens,
        "softprompt_virtual_tokens": virtual_tokens,
    }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
