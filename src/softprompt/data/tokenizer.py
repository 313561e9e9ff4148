"""What is asked of a tokenizer, and text to token ids so that pieces laid side by side read as one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of transformers' PreTrainedTokenizerFast that is used here."""

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    def __call__(self, text: str, **settings: Any) -> Any: ...

    def decode(self, token_ids: Any, **settings: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any: ...


@dataclass(frozen=True)
class Habits:
    """What a tokenizer adds to a text of its own accord.

    `before` and `after` are the special tokens it puts around a text (BOS; EOS). `leading_space` tells that it reads
    a text's start as if a space stood there (SentencePiece's dummy prefix), which is wrong in the middle of a line.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    leading_space: bool


def habits(tokenizer: Tokenizer) -> Habits:
    """Find out by tokenising three short texts."""
    bare, wrapped = _ids(tokenizer, "a"), _ids(tokenizer, "a", special=True)
    start = _find(bare, wrapped)
    before, after = (wrapped[:start], wrapped[start + len(bare) :]) if start is not None else ([], [])
    return Habits(
        tuple(before), tuple(after), leading_space=_behind(tokenizer, "\n", "a") not in (None, bare)
    )


def tokens(tokenizer: Tokenizer, text: str, habit: Habits, *, continues: bool) -> list[int]:
    """Ids of `text` without special tokens; with `continues` as they are when other text stands before it."""
    if not text:
        return []
    if continues and habit.leading_space:
        for anchor in ("\n", "=", "a"):  # none of them joins with every text, so try a few
            ids = _behind(tokenizer, anchor, text)
            if ids is not None:
                return ids
    return _ids(tokenizer, text)


def first_token_bytes(tokenizer: Tokenizer, text: str, habit: Habits, *, continues: bool) -> int:
    """UTF-8 bytes of `text` that its first token stands for."""
    ids = tokens(tokenizer, text, habit, continues=continues)
    whole = len(text.encode())
    if len(ids) < 2:
        return whole
    rest = len(str(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)).encode())
    return max(0, whole - rest)


def _behind(tokenizer: Tokenizer, anchor: str, text: str) -> list[int] | None:
    """Ids of `text` after `anchor`; None where the two share a token."""
    head, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
    return both[len(head) :] if both[: len(head)] == head and len(both) > len(head) else None


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: it would warn of texts over model_max_length, which encode checks itself
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    for start in range(len(whole) - len(part) + 1):
        if list(whole[start : start + len(part)]) == list(part):
            return start
    return None
