"""The end of an answer: one definition for training, for stopping generation and for judging answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from softprompt.data import chat
from softprompt.data.example import Example, Message
from softprompt.data.template import Field, Template, Text
from softprompt.data.tokenizer import SpecialTokens, Tokenizer, special_spans, special_tokens_of
from softprompt.errors import DataError

End = Literal["auto", "always", "never"]
_QUESTION, _ANSWER = "Question", "Answer"


@dataclass(frozen=True)
class Ending:
    """The ways in which an answer ends.

    Any of the token `ids` ends it. `text` is what the template writes after it: it is learned with the answer and is no
    part of it. `stop` is that text where it ends an answer wherever it occurs, or nothing: a lone full stop before an
    end token also occurs inside answers. `learned` says whether training shows any end at all.
    """

    ids: frozenset[int] = frozenset()
    text: str = ""
    stop: tuple[str, ...] = ()
    learned: bool = True


NO_ENDING = Ending(learned=False)


def ending_of(
    template: Template, tokenizer: Tokenizer, end: End = "auto", *, also: Iterable[int] = ()
) -> Ending:
    """The ending that rows of `template` are trained with; `also` are end tokens that the base names itself."""
    text, is_open = _closing_chat(template, tokenizer) if template.chat else (_fixed_text(template), True)
    appends = tokenizer.eos_token_id is not None and appends_end(
        template, tokenizer, special_tokens_of(tokenizer), end, is_open=is_open
    )
    ids = {int(token_id) for token_id in also}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    learned = appends or bool(text)
    token = _special_start(text.strip(), tokenizer)
    if token is not None:  # generation stops at that token, before its text is written
        return Ending(frozenset({*ids, token}), learned=learned)
    # Without an end token behind it the text alone ends an answer. With an end token, a short text may also occur
    # inside answers ("3.14" under "{label}."), so it is only removed from their end.
    decides = bool(text) and (not appends or len(text.strip()) >= 2)
    return Ending(frozenset(ids), text, (text,) if decides else (), learned)


def appends_end(
    template: Template, tokenizer: Tokenizer, special: SpecialTokens, end: End, *, is_open: bool
) -> bool:
    """Whether a row's last token is an end token, where the tokenizer has one.

    `is_open` says that the chat template writes no closing mark after the assistant's words. auto: after a target that
    the template does not close with a special token, after an open turn, and after plain text only where the tokenizer
    does so by itself."""
    if end != "auto":
        return end == "always"
    if template.chat:
        return is_open
    closing = special_spans(_fixed_text(template).strip(), special)
    if closing and closing[0][0] == 0:
        return False
    return template.target is not None or tokenizer.eos_token_id in special.after


def remark(template: Template, ending: Ending) -> str | None:
    """A remark on a task whose answers have no end; None where they have one."""
    if ending.learned or (template.target is None and not template.chat):
        return None
    return (
        "Nothing ends an answer: no end token is trained and no text follows it in data.template, so generation continues "
        "to its token limit. Set data.end to auto or always, or write an ending such as ' ###' after the target."
    )


def _fixed_text(template: Template) -> str:
    """The text behind the target."""
    if template.target is None or Field(template.target) not in template.pieces:
        return ""
    after = template.pieces[template.pieces.index(Field(template.target)) + 1 :]
    return "".join(piece.text for piece in after if isinstance(piece, Text))


def _closing_chat(template: Template, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The mark that the chat template writes after the assistant's words, blank ones too; and whether it has none."""
    example = Example({}, (Message("user", _QUESTION), Message("assistant", _ANSWER)))
    try:
        last = chat.turns(example, tokenizer)[-1]
    except DataError:  # no chat template, or one that wants other turns: rows say so where they are encoded
        return "", True
    if last.ids is not None:
        written = str(tokenizer.decode(list(last.ids), clean_up_tokenization_spaces=False))
        mark = written.partition(_ANSWER)[2]
        return mark, not mark
    return last.text.partition(_ANSWER)[2], last.open


def _special_start(text: str, tokenizer: Tokenizer) -> int | None:
    """The special token that `text` begins with: decoding leaves it out, so only its id can be seen."""
    if not text:
        return None
    first = int(next(iter(tokenizer(text, add_special_tokens=False)["input_ids"])))
    shown = str(tokenizer.decode([first], skip_special_tokens=False)).strip()
    hidden = str(tokenizer.decode([first], skip_special_tokens=True)).strip()
    return first if shown and not hidden and text.startswith(shown) else None
