"""Text to token ids in pieces that together read as one text, and what a tokenizer does of itself around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from softprompt.data.turns import refuse_broken


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
class SpecialTokens:
    """The special tokens of a tokenizer, and the space that it may add in front of a text.

    `before` and `after` are the special tokens it puts around a text (BOS; EOS). With `leading_space` it reads a text
    as if a space came first (SentencePiece's dummy prefix), which is wrong in the middle of a line. `spellings` are
    the texts that it reads as special tokens wherever they occur.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    leading_space: bool
    spellings: tuple[str, ...] = ()


Spans = Sequence[tuple[int, int]]
"""Parts of a text, each from its first character up to the one behind its last."""


def special_tokens_of(tokenizer: Tokenizer) -> SpecialTokens:
    """Finds out how a tokenizer treats a text by tokenising three short ones."""
    bare, wrapped = _ids(tokenizer, "a"), _ids(tokenizer, "a", special=True)
    start = _find(bare, wrapped)
    before, after = (wrapped[:start], wrapped[start + len(bare) :]) if start is not None else ([], [])
    return SpecialTokens(
        tuple(before),
        tuple(after),
        leading_space=_behind(tokenizer, "\n", "a") not in (None, bare),
        spellings=_spellings(tokenizer),
    )


def tokens(
    tokenizer: Tokenizer, text: str, special: SpecialTokens, *, continues: bool, data: Spans = ()
) -> list[int]:
    """Tokenises `text` with nothing put around it; with `continues` as it is tokenised behind other text.

    `data` are the spans that come from a row: what looks like a special token there is plain text."""
    if not text:
        return []
    if not text.isascii():
        refuse_broken(text, "the text")
    marks = special_spans(text, special)
    written = [mark for mark in marks if not _overlaps(mark, data)]
    if len(written) == len(marks):
        return _continued(tokenizer, text, special, continues=continues, plain=False)
    # Some data spells a special token. The text is cut at those that the template writes; all else is plain.
    ids: list[int] = []
    start = 0
    for first, last in [*written, (len(text), len(text))]:
        behind = continues or start > 0
        if start < first:
            ids += _continued(tokenizer, text[start:first], special, continues=behind, plain=True)
        if first < last:
            ids += _ids(tokenizer, text[first:last])
        start = last
    return ids


def special_spans(text: str, special: SpecialTokens) -> list[tuple[int, int]]:
    """Finds the spans of `text` that spell special tokens."""
    if not special.spellings:
        return []
    return [match.span() for match in _spelled(special.spellings).finditer(text)]


def surviving(
    tokenizer: Tokenizer, text: str, special: SpecialTokens | None = None, *, special_tokens: bool = False
) -> str:
    """The text after encoding and decoding: the most that a base can be trained to generate of it.

    Some tokenizers have no token for a character, lower its case or change its width. Blanks at the start are kept,
    as some tokenizers show them only behind other text. With `special_tokens` the special tokens that it spells are
    read as such, and so left out of what is read back."""
    special = special or special_tokens_of(tokenizer)
    data = () if special_tokens else [(0, len(text))]
    return read_back(tokenizer, text, tokens(tokenizer, text, special, continues=True, data=data))


def read_back(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens left out, with the blanks that `text` starts with."""
    back = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    blanks = len(text) - len(text.lstrip(" "))
    return text[:blanks] + back.lstrip(" ") if blanks or back[:1] == " " else back


def _continued(
    tokenizer: Tokenizer, text: str, special: SpecialTokens, *, continues: bool, plain: bool
) -> list[int]:
    if continues and special.leading_space:
        for anchor in ("\n", "=", "a"):  # each of them merges with some texts, so try a few
            ids = _behind(tokenizer, anchor, text, plain=plain)
            if ids is not None:
                return ids
    return _ids(tokenizer, text, plain=plain)


def _overlaps(mark: tuple[int, int], spans: Spans) -> bool:
    return any(first < mark[1] and mark[0] < last for first, last in spans)


def _spellings(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    texts = [str(token) for token in added.values() if getattr(token, "special", False)]
    return tuple(dict.fromkeys([*texts, *map(str, getattr(tokenizer, "all_special_tokens", ()))]))


@lru_cache(maxsize=8)
def _spelled(spellings: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(spellings, key=len, reverse=True) if text))


def first_token_bytes(tokenizer: Tokenizer, text: str, special: SpecialTokens, *, continues: bool) -> int:
    """Counts the UTF-8 bytes of `text` that its first token encodes."""
    ids = tokens(tokenizer, text, special, continues=continues)
    whole = len(text.encode())
    if len(ids) < 2:
        return whole
    rest = len(str(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)).encode())
    return max(0, whole - rest)


def _behind(tokenizer: Tokenizer, anchor: str, text: str, *, plain: bool = False) -> list[int] | None:
    """Ids of `text` after `anchor`; None where the two share a token."""
    head, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text, plain=plain)
    return both[len(head) :] if both[: len(head)] == head and len(both) > len(head) else None


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = False, plain: bool = False) -> list[int]:
    # verbose=False: it would warn of texts over model_max_length, which encode checks itself
    settings = {"split_special_tokens": True} if plain else {}
    return list(tokenizer(text, add_special_tokens=special, verbose=False, **settings)["input_ids"])


def _find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    for start in range(len(whole) - len(part) + 1):
        if list(whole[start : start + len(part)]) == list(part):
            return start
    return None
