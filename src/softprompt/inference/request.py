"""One text to continue under a prompt: how it is laid out, how long it may get, and what has come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from softprompt.base.context_length import demand_room, longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State
from softprompt.base.shared_prefix import with_shared_prefix
from softprompt.data.ending import NO_ENDING, Ending
from softprompt.data.example import Example
from softprompt.errors import DataError
from softprompt.inference.bad_words import bad_sequences
from softprompt.inference.compiled import CompiledPrompt, end_ids
from softprompt.inference.prefill import PrefillRow
from softprompt.inference.sampling import completing
from softprompt.inference.settings import DecodeSettings

FinishReason = Literal["stop", "length", "cancelled"]
DEFAULT_NEW_TOKENS = 100
GREEDY = DecodeSettings()


class Steering(Protocol):
    """Changes what one row may say next: a bias, penalties, or a constraint such as a choice of labels."""

    def steered(self, logits_V: Tensor, new_ids: Sequence[int]) -> Tensor:
        """Logits for the token after `new_ids`, at least one of them finite; -inf forbids a token."""

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        """Whether the row ends here, whatever the model would say next."""


@dataclass(eq=False)
class Request:
    """One text to continue. `request` makes one; a running batch fills in what comes of it.

    `token_ids` are the new tokens, an end token included; `text` is what they say, without special tokens, a stop
    text, and the ending that the prompt learned. `on_text` is called with every piece of text as soon as it is certain.
    `likeliest` holds, for each new token, the `top` likeliest ids with their log-probabilities under the base, before
    temperature, penalties and steering. `failure` is set where the row's numbers were not finite, or its steering
    failed. `begun` are tokens of the answer that are given, since an answer that was cut off elsewhere goes on here: they
    are the last marks of `row`, and the first of `token_ids`.
    """

    row: PrefillRow
    settings: DecodeSettings
    limit: int
    sample: int = 0
    on_text: Callable[[str], None] | None = None
    keep_state: bool = False
    ending: Ending = NO_ENDING
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    top: int = 0
    steering: Steering | None = None
    begun: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    state: State | None = None
    failure: Exception | None = None

    @property
    def total(self) -> int:
        """Positions that the row takes at most."""
        return len(self.given) + self.limit

    @property
    def columns(self) -> int:
        """Columns of keys and values that the row takes at most: positions of a shared prefix take none."""
        return self.total - self.row.shared.length

    @property
    def own_marks(self) -> int:
        """Columns of keys and values once its text is read."""
        return len(self.row.marks) - self.row.shared.length

    @property
    def given(self) -> tuple[int, ...]:
        """Marks of the text, before the answer."""
        return self.row.marks[: len(self.row.marks) - len(self.begun)]

    @property
    def known_ids(self) -> list[int]:
        """Token ids of the text before the continuation."""
        return [mark for mark in self.given if mark >= 0]

    @property
    def banned_next(self) -> list[int]:
        """Tokens that would complete a bad word now. One that was begun in the text before the continuation counts."""
        read = max((len(sequence) - 1 for sequence in self.bad_sequences), default=0)
        marks = [*self.given[-read:], *self.token_ids[-read:]] if read else []
        return completing(self.bad_sequences, marks)


def request(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    given: str | Example | Sequence[int],
    settings: DecodeSettings = GREEDY,
    *,
    sample: int = 0,
    on_text: Callable[[str], None] | None = None,
    keep_state: bool = False,
    row: PrefillRow | None = None,
    top: int = 0,
    steering: Steering | None = None,
    begun: Sequence[int] = (),
) -> Request:
    """Lays out one input under a prompt. `given` may be the marks of a whole sequence instead of text.

    `begun` are the first tokens of the answer, which is cut off elsewhere and goes on here: the row gives what it would
    have given from the start, draws included. A `row` that is handed over holds them already.

    Raises DataError where the text leaves no room for a new token, or where an answer cannot go on.
    """
    if begun and (settings.rated or top):
        raise DataError(
            "An answer with log-probabilities cannot go on from tokens. Ask for it from the start."
        )
    if any(not 0 <= token < lm.vocab_size for token in begun):
        raise DataError(f"Begun tokens: wanted ids from 0 to {lm.vocab_size - 1}.")
    if row is None:
        marks = prompt.marks(lm, given) if isinstance(given, str | Example) else list(given)
        row = prompt.row([*marks, *begun])
    if not keep_state and not row.shared.length:  # a state that is kept is whole
        shared, state = with_shared_prefix(lm, row.state)
        row = row if state is row.state else replace(row, shared=shared, state=state)
    given_marks = row.marks[: len(row.marks) - len(begun)]
    beyond = [token for token in settings.logit_bias if token >= lm.vocab_size]
    if beyond:
        raise DataError(
            f"logit_bias: found token {beyond[0]}; {lm.name} has {lm.vocab_size:,} tokens. Give ids below that."
        )
    text_tokens = sum(mark >= 0 for mark in given_marks)
    limit = settings.max_new_tokens
    if settings.max_text_tokens is not None:
        left = settings.max_text_tokens - text_tokens
        if left < 1:
            raise DataError(
                f"The text has {text_tokens} tokens and max_text_tokens is {settings.max_text_tokens} in all: no room "
                "for a new one. Raise max_text_tokens, or set max_new_tokens instead."
            )
        limit = left if limit is None else min(limit, left)
    limit = DEFAULT_NEW_TOKENS if limit is None else limit
    most = longest_text(lm)
    if most is not None:
        demand_room(lm, len(row.marks) + 1, "The text with one new token")
        limit = min(limit, most - len(given_marks))
    if len(begun) >= limit:
        raise DataError(
            f"{len(begun)} tokens of the answer are given, and it has at most {limit}: nothing is left to go on with."
        )
    ending = NO_ENDING if settings.ignore_end else prompt.ending
    bad = bad_sequences(settings.bad_words, lm.tokenizer, prompt.special, end_ids(lm))
    return Request(
        row,
        settings,
        limit,
        sample,
        on_text,
        keep_state,
        ending,
        bad_sequences=bad,
        top=top,
        steering=steering,
        begun=tuple(begun),
        token_ids=list(begun),
    )
