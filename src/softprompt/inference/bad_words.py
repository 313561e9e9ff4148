"""Bad words as token sequences: the spellings in which a tokenizer would write each of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from softprompt.data.tokenizer import SpecialTokens, Tokenizer, tokens
from softprompt.errors import DataError


def bad_sequences(
    words: Sequence[str], tokenizer: Tokenizer, special: SpecialTokens, end_ids: Collection[int]
) -> tuple[tuple[int, ...], ...]:
    """Each word as tokens, as it is and with a space in front of it: most tokenizers write the two differently.

    Raises DataError for a word without tokens, and for an end token, without which no answer could end."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            sequence = tuple(tokens(tokenizer, text, special, continues=True))
            if not sequence:
                raise DataError(f"bad_words: the base's tokenizer has no token for {word!r}. Leave it out.")
            if len(sequence) == 1 and sequence[0] in end_ids:
                raise DataError(
                    f"bad_words: found {word!r}, which ends an answer. Set ignore_end to continue past end tokens."
                )
            sequences[sequence] = None
    return tuple(sequences)
