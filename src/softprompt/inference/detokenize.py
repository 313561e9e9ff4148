"""Detokenizing as tokens come: characters of several tokens, and stop texts that may just have begun, are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

CONTEXT_TOKENS = 6  # of the text before: enough for tokenizers that write a token by what precedes it
UNFINISHED = "\ufffd"  # what the bytes of a character decode to before its last one is there


class TextStream:
    """The text of one row as it grows: `add` each token, then `finish`. `ending` is cut off the end of the whole text.

    `on_text` is called with each piece of text that nothing to come can change or cut off.
    """

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
        self._from = 0  # first token that is decoded again
        self._decoded = len(self.ids)  # tokens whose text is in `text`, or was before it
        self._sent = 0  # characters that `on_text` has had
        self._stopped = False

    def add(self, token: int) -> bool:
        """Takes one more token; says whether a stop text is complete."""
        if self._stopped:
            return True
        self.ids.append(token)
        self._extend(final=False)
        self._send(final=False)
        return self._stopped

    def finish(self) -> str:
        """Gives all the text, and the rest of it to `on_text`."""
        if not self._stopped:
            self._extend(final=True)
            if self.ending:
                self.text = self.text.removesuffix(self.ending)
        self._send(final=True)
        return self.text

    def _extend(self, final: bool) -> None:
        """Appends the text of the new tokens, unless they end inside a character; cut it at the first stop text."""
        if self._decoded == len(self.ids):
            return
        # The same tokens may decode differently without those before them, so both texts start at `_from`.
        before = self._decode(self.ids[self._from : self._decoded])
        after = self._decode(self.ids[self._from :])
        if len(after) <= len(before) or (after.endswith(UNFINISHED) and not final):
            return
        searched = len(self.text)
        self.text += after[len(before) :]
        # Decoding continues from the last whole piece: constant work a token, however long the text.
        self._from, self._decoded = self._decoded, len(self.ids)
        starts = [
            start
            for stop in self.stop
            if (start := self.text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if starts:
            self.text = self.text[: min(starts)]
            self._stopped = True

    def _send(self, final: bool) -> None:
        if self.on_text is None:
            return
        certain = len(self.text) if final or self._stopped else len(self.text) - self._may_be_cut()
        if certain > self._sent:
            self.on_text(self.text[self._sent : certain])
            self._sent = certain

    def _may_be_cut(self) -> int:
        """Counts the characters at the end that may be the beginning of a stop text, or the ending."""
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
