"""Settings of decoding, declared once: Python, the command line and a server use these names. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from softprompt.settings.section import setting
from softprompt.settings.table import Table

LARGEST = 2**31 - 1  # of a count: anything above means "all"

Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST)]
Drawn: TypeAlias = Annotated[int, Field(ge=1, le=100_000)]  # texts of one input, all of them in memory


def _texts(given: Any) -> Any:
    """A bare text as the only one, and any other sequence as a tuple, so that settings can be compared and hashed."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, list) else given


def _token_ids(given: Any) -> Any:
    """Token ids that are written as text, as JSON, YAML files and flags have to, as numbers."""
    if not isinstance(given, dict):
        return given
    return {
        int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in given.items()
    }


TokenAmounts: TypeAlias = Annotated[
    dict[Annotated[int, Field(ge=0, le=LARGEST)], float], BeforeValidator(_token_ids)
]

if TYPE_CHECKING:  # checkers accept a single text, as `_texts` does
    Texts: TypeAlias = Sequence[str]
else:
    Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class DecodeSettings(Table):
    """Settings of continuing a text. The defaults are greedy decoding, up to 100 new tokens.

    `max_new_tokens` bounds what is generated, `max_text_tokens` the input's tokens and the new ones together, virtual
    tokens not counted (transformers' `max_length`, under which name it is taken too). With both, the smaller one ends
    a row. The same row gives the same text for a seed, alone or in any batch, but where two tokens are as likely to the last
    digits: sums of another batch may round otherwise.
    """

    max_new_tokens: Count | None = setting(
        None, "Longest continuation in tokens; 100 without any bound.", flag="--max-new-tokens"
    )
    max_text_tokens: Count | None = setting(
        None,
        "Longest text in tokens, input included, virtual tokens not counted.",
        flag="--max-text-tokens",
        aliases=["--max-length"],
        elsewhere="max_length",
    )
    temperature: float = setting(
        0.0, "0 takes the likeliest token; higher draws more freely.", flag="--temperature", ge=0
    )
    top_p: float = setting(
        1.0, "Draw from the likeliest tokens that make up this share.", flag="--top-p", gt=0, le=1
    )
    top_k: int = setting(
        0, "Draw from this many likeliest tokens; 0 for all.", flag="--top-k", ge=0, le=LARGEST
    )
    min_p: float = setting(
        0.0,
        "Draw from tokens that are at least this share as likely as the likeliest; 0 for all.",
        flag="--min-p",
        ge=0,
        le=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "Above 1 weighs down tokens that occurred in the input text or the continuation.",
        flag="--repetition-penalty",
        ge=0.01,
        le=100,
    )
    logit_bias: TokenAmounts = setting(
        {}, "Amounts added to the logits of tokens, by token id: 50=-2.5.", flag="--logit-bias"
    )
    bad_words: Texts = setting(
        (),
        "A text that is never generated, neither at the start of a word nor inside one.",
        flag="--bad-words",
        elsewhere="bad_words_ids",
    )
    stop: Texts = setting(
        (),
        "A text that ends the continuation and is cut off.",
        flag="--stop",
        elsewhere="stop_strings",
    )
    seed: int = setting(0, "Seed of the draws.", flag="--seed", le=2**64 - 1)
    n: Drawn = setting(
        1, "Continuations for each text.", flag="--n", aliases=["-n"], elsewhere="num_return_sequences"
    )
    best_of: Drawn | None = setting(
        None, "Draw this many continuations and keep the n likeliest per token.", flag="--best-of"
    )
    ignore_end: bool = setting(
        False, "Continue past end tokens.", flag="--ignore-end", elsewhere="ignore_eos"
    )
    log_probabilities: bool = setting(
        False,
        "Record how likely the base finds each chosen token.",
        flag="--log-probabilities",
        elsewhere="logprobs",
    )

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "max_length" not in values:
            return values
        values = dict(values)
        length = values.pop("max_length")
        if values.get("max_text_tokens", length) != length:
            raise ValueError(
                f"max_length: found {length!r} and max_text_tokens {values['max_text_tokens']!r}, which are two names "
                "of one setting. Give max_text_tokens alone."
            )
        return {**values, "max_text_tokens": length}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not all(self.stop):
            raise ValueError(f"stop: found {self.stop!r}, wanted texts that are not empty.")
        far = next((amount for amount in self.logit_bias.values() if abs(amount) > 1e9), None)
        if far is not None:
            raise ValueError(f"logit_bias: found {far}, wanted amounts from -1e9 to 1e9.")
        if not all(self.bad_words):
            raise ValueError(f"bad_words: found {self.bad_words!r}, wanted texts that are not empty.")
        if self.drawn < self.n:
            raise ValueError(f"best_of: found {self.best_of}, wanted at least n ({self.n}).")
        if self.drawn > 1 and self.temperature == 0:
            raise ValueError(
                f"n: found {self.drawn} texts at temperature 0, which would all be the same. "
                "Set a temperature, or n to 1."
            )
        return self

    def __hash__(self) -> int:
        # pydantic's own hash fails on the dict of logit_bias.
        values = {**dict(self), "logit_bias": frozenset(self.logit_bias.items())}
        return hash(tuple(values.values()))

    @property
    def max_length(self) -> int | None:
        """Former name of `max_text_tokens`."""
        return self.max_text_tokens

    @property
    def drawn(self) -> int:
        """Texts drawn for each input."""
        return self.n if self.best_of is None else self.best_of

    @property
    def rated(self) -> bool:
        """Whether the chosen tokens' log-probabilities are needed."""
        return self.log_probabilities or self.drawn > self.n
