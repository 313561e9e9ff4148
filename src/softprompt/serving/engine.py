"""The interface of an engine: prompts by digest, requests as streams of answers, scores, room and health.

An Engine is a protocol, so that other engines can take the place of `local_engine.LocalEngine`. Whatever the engine, an
answer is the one that its request gets alone, whatever joins, leaves or is cancelled beside it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.errors import SoftPromptError
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.request import Steering
from softprompt.inference.score import RatedToken
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt


class Overloaded(SoftPromptError):
    """The queue is full; try again later."""


class ShuttingDown(SoftPromptError):
    """The engine takes no more requests."""


class EngineFailed(SoftPromptError):
    """A fault of the server, not of the request."""


class PromptGone(SoftPromptError):
    """The prompt is not held any more."""


@dataclass(frozen=True, eq=False)
class Work:
    """A request to the engine: a prompt by its digest (None: the base alone), an input, how to decode, and for whom.

    `given` is a text, an example, or the marks of a whole sequence (token ids, and -1 - i for vector i). `top` is how
    many likeliest tokens are recorded beside each new one; `steer` makes what steers a row, if anything does. `begun` are,
    for each sample, the first tokens of an answer that was cut off elsewhere and goes on here. Two works are never equal,
    so that one can be cancelled."""

    digest: str | None
    given: str | Example | Sequence[int]
    settings: DecodeSettings
    owner: str = ""
    top: int = 0
    steer: Callable[[FrozenLM, CompiledPrompt], Steering] | None = None
    begun: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of one sample, as soon as it is certain, and the tokens chosen since the last piece."""

    sample: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of one sample. `input_tokens` are those of the text, `virtual_tokens` those of the prompt."""

    sample: int
    text: str
    reason: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    input_tokens: int
    virtual_tokens: int
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()


Answer: TypeAlias = Piece | Finished


@dataclass(frozen=True)
class Room:
    """The room of an engine now: `rows` that could run at once, `requests` before its queue is full, and `bytes` of
    keys and values (None: no limit)."""

    rows: int
    requests: int
    bytes: int | None = None


class Engine(Protocol):
    """The interface of an engine, as a server uses it. Prompts are known by the digest of their content."""

    lm: FrozenLM
    """The base. Of an engine that runs elsewhere its tokenizer, which lays inputs out, and its facts are enough."""

    kind: str
    """Engines of one kind and dtype give the same answer to the same request, drawn ones too."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""

    @property
    def prompts(self) -> frozenset[str]:
        """Digests of the prompts that requests may name."""

    def load(self, prompt: Prompt, digest: str) -> None:
        """Holds a prompt ready. Raises PromptError where this engine cannot serve it, such as WrongBase."""

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""

    def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes. Leaving the iterator early cancels the work.

        Raises Overloaded where too much is waiting, PromptGone, ShuttingDown, EngineFailed, and what is wrong with the
        request itself as softprompt.errors."""

    def cancel(self, work: Work) -> None:
        """Ends a work that was submitted: its rows leave before the next step, and its stream ends with what they have
        so far, each with the reason `cancelled`. A work that is over, or unknown, is left alone."""

    async def score(
        self,
        digest: str | None,
        given: str | Example | Sequence[int],
        continuation: str | None = None,
        top: int = 0,
        end: End = "never",
    ) -> list[RatedToken]:
        """Rates every token of a continuation under a prompt, with the `top` likeliest in its place, and the end token
        behind it as `end` says; without a continuation, every token of the input itself. Raises as `submit` does."""

    def room(self) -> Room:
        """The room for requests now."""

    def health(self) -> dict[str, int]:
        """Whether it works (`alive`), rows running and waiting, and bytes of their keys and values (`kv_bytes`)."""
