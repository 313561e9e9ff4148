"""The wire format: bodies of OpenAI's API, with the fields that are honoured. No model code here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from softprompt.inference.settings import DecodeSettings

MAX_LOG_PROBABILITIES = 20
MAX_INPUTS = 2_048  # texts in one request

Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str, Field(min_length=1, max_length=1_000)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


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
    """Our extension: the fields of a template that has several inputs, and, for each choice, the first tokens of an answer that
    was cut off at another server and goes on at this one."""

    model_config = ConfigDict(extra="forbid")
    fields: dict[str, str] | None = None
    begun: list[Annotated[list[int], Field(max_length=1_000_000)]] | None = Field(
        default=None, max_length=MAX_INPUTS * 16
    )


class Decoding(Body):
    """Options of decoding, shared by completions, chat and responses. `choice` and `regex` are ours, and vLLM's."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    n: int | None = Field(default=None, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=1_024)
    response_format: dict[str, Any] | None = None
    choice: list[Label] | None = Field(default=None, min_length=1, max_length=256)
    regex: str | None = Field(default=None, min_length=1, max_length=5_000)
    user: str | None = None
    softprompt: SoftPromptOptions | None = None
    return_token_ids: bool | None = None

    @field_validator("stop")
    @classmethod
    def _bounded(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or any(not text or len(text) > 500 for text in texts):
            raise ValueError("wanted at most 16 texts of 1 to 500 characters")
        return stop

    @property
    def fields(self) -> dict[str, str] | None:
        """The texts of a template's fields, by name."""
        return self.softprompt.fields if self.softprompt else None

    @property
    def begun(self) -> list[list[int]] | None:
        """First tokens of each choice, of an answer that was cut off elsewhere."""
        return self.softprompt.begun if self.softprompt else None

    @property
    def samples(self) -> int:
        """Answers to each input."""
        return self.n or 1

    def decode_settings(self, max_new_tokens: int | None, log_probabilities: bool) -> DecodeSettings:
        """The same as settings of inference. OpenAI's default temperature is 1, and without a seed every answer differs."""
        temperature = 1.0 if self.temperature is None else self.temperature
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,  # vLLM's word for all
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return DecodeSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(stop),
            n=self.samples if temperature > 0 else 1,  # greedy answers are all the same
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            ignore_end=self.ignore_eos,
            log_probabilities=log_probabilities,
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionBody(Decoding):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOG_PROBABILITIES)
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: Any) -> Any:
        if not isinstance(prompt, str) and not prompt:
            raise ValueError("wanted a text, a list of texts, or token ids; found an empty list")
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        if not single and len(prompt) > MAX_INPUTS:
            raise ValueError(f"wanted at most {MAX_INPUTS} texts")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each text, or list of ids, that is to be continued."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else list(given)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The words of a turn; ValueError for parts that are not text."""
        if isinstance(self.content, list):
            if any(part.get("type") not in ("text", "input_text", "output_text") for part in self.content):
                raise ValueError("only text parts are supported in a message")
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""

    @property
    def more(self) -> dict[str, Any]:
        """The keys of a turn beside its text: calls of functions, a name."""
        left_out = ("type", "id", "status", "refusal", "annotations", "phase")
        return {
            name: value
            for name, value in (self.model_extra or {}).items()
            if value is not None and name not in left_out
        }


class ChatBody(Decoding):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOG_PROBABILITIES)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class ResponsesBody(Decoding):
    """OpenAI's responses, of which nothing is stored."""

    input: str | list[ChatMessage] = Field(max_length=1_000_000)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    text: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def turns(self) -> list[ChatMessage]:
        """Instructions and input as one chat."""
        given = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [
            *([ChatMessage(role="system", content=self.instructions)] if self.instructions else []),
            *given,
        ]

    def model_post_init(self, context: Any) -> None:
        """`text.format` is what response_format is elsewhere."""
        form = (self.text or {}).get("format")
        if isinstance(form, dict):
            nested = (
                form if form.get("type") != "json_schema" else {"type": "json_schema", "json_schema": form}
            )
            self.response_format = nested


class Column(BaseModel):
    """One answer of a comparison: a model and what it is given, as text or by its template's fields."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: str = Field(default="", max_length=1_000_000)
    fields: dict[str, str] | None = None


class CompareBody(Decoding):
    """A request to compare several models side by side in one running batch, streamed: for the page."""

    model: str = "base"
    columns: list[Column] = Field(min_length=1, max_length=16)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)


class ScoreBody(Body):
    """A request for the log-probabilities of continuations under several prompts: for the page, and for ranking labels."""

    input: str = Field(max_length=100_000)
    continuations: list[str] = Field(min_length=1, max_length=64)
    models: list[str] = Field(min_length=1, max_length=16)
    top: int = Field(default=0, ge=0, le=MAX_LOG_PROBABILITIES)


class AnsweredRow(BaseModel):
    """An input, what is wanted of it, and an answer to it."""

    model_config = ConfigDict(extra="forbid")
    input: str = Field(max_length=100_000)
    wanted: str = Field(min_length=1, max_length=100_000)
    answer: str = Field(max_length=1_000_000)


class FiguresBody(Body):
    """A request for the figures that `evaluate` gives of rows that have been answered: for the page."""

    model: str = "base"
    rows: list[AnsweredRow] = Field(min_length=1, max_length=200)


class TokenizeBody(Body):
    model: str = "base"
    prompt: str = Field(default="", max_length=1_000_000)


class DetokenizeBody(Body):
    model: str = "base"
    tokens: list[int] = Field(max_length=1_000_000)


class LoadBody(Body):
    name: str
    path: str


def json_schema(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The schema that an answer has to follow, if any. Raises ValueError for a form that is not known."""
    form = dict(response_format or {"type": "text"})
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            schema = (
                (form.get("json_schema") or {}).get("schema")
                if isinstance(form.get("json_schema"), dict)
                else None
            )
            if isinstance(schema, dict):
                return schema
    raise ValueError("response_format: wanted the type text, json_object, or json_schema with a schema")


def usage(input_tokens: int, virtual_tokens: int, new_tokens: int) -> dict[str, Any]:
    """OpenAI's count of tokens; virtual ones are counted apart."""
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": input_tokens + new_tokens,
        "softprompt_virtual_tokens": virtual_tokens,
    }


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no answer."""

    error: ErrorFacts


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
