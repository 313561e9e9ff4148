"""What tokens say, as far as it is certain: characters of several tokens, and stop texts that may just have begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

CONTEXT_TOKENS = 6  # of the text before: enough for tokenizers that write a token by what stands before it
UNFINISHED = "\ufffd"


class Spoken:
    """The text of one row as it grows. `add` a token, then `finish`. `ending` is taken off the end of the whole text."""

    def __init__(
        self,
        tokenizer: Any,
        before: Sequence[int],
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        *,
        ending: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.on_text = on_text
        self.ending = ending
        self.ids = list(before[-CONTEXT_TOKENS:])
        self.text = ""
        self._from = 0
        self._read = len(self.ids)
        self._told = 0
        self._stopped = False

    def add(self, token: int) -> bool:
        """Take one more token; says whether a stop text is complete."""
        if self._stopped:
            return True
        self.ids.append(token)
        self._follow(final=False)
        self._tell(final=False)
        return self._stopped

    def finish(self) -> str:
        """All the text, and the last of it told."""
        if not self._stopped:
            self._follow(final=True)
            if self.ending:
                self.text = self.text.removesuffix(self.ending)
        self._tell(final=True)
        return self.text

    def _follow(self, final: bool) -> None:
        if self._read == len(self.ids):
            return
        known = self._decode(self.ids[self._from : self._read])
        now = self._decode(self.ids[self._from :])
        if len(now) <= len(known) or (now.endswith(UNFINISHED) and not final):
            return
        searched = len(self.text)
        self.text += now[len(known) :]
        # Decoding goes on from the last whole piece: constant work a token, however long the text.
        self._from, self._read = self._read, len(self.ids)
        places = [
            found for one in self.stop if (found := self.text.find(one, max(0, searched - len(one) + 1))) >= 0
        ]
        if places:
            self.text = self.text[: min(places)]
            self._stopped = True

    def _tell(self, final: bool) -> None:
        if self.on_text is None:
            return
        sure = len(self.text) if final or self._stopped else len(self.text) - self._begun()
        if sure > self._told:
            self.on_text(self.text[self._told : sure])
            self._told = sure

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop text, or the ending."""
        longest = [(text, len(text) - 1) for text in self.stop] + [(self.ending, len(self.ending))]
        return max(
            (
                size
                for text, most in longest
                for size in range(1, min(most, len(self.text)) + 1)
                if self.text.endswith(text[:size])
            ),
            default=0,
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
