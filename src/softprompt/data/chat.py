"""A chat as the base's own chat template writes it, cut into what is read and what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt.data.example import Example, Message
from softprompt.data.tokenizer import Spans, SpecialTokens, Tokenizer, special_spans
from softprompt.errors import DataError


@dataclass(frozen=True)
class Turn:
    """A part of the rendered chat, trained or only read. `ids` is given where the chat template marked the parts itself.

    `open` says that the assistant's words end without a mark, so that an end token has to follow. `words` is what the
    assistant says of the text, the closing mark left out. `data` are the stretches of the text that come from the row,
    given where they spell a special token.
    """

    text: str
    said_by_assistant: bool
    ids: tuple[int, ...] | None = None
    open: bool = False
    words: str | None = None
    data: Spans = ()


def turns(
    example: Example, tokenizer: Tokenizer, *, generation: bool = False, special: SpecialTokens | None = None
) -> list[Turn]:
    """Cuts the chat into trained and read parts, in order, up to the end of the assistant's last words.

    Each turn of the assistant starts where generation would start it: the chat before it is rendered with the
    generation prompt, the chat up to it without, and each rendering must begin with the one before. Where it does not
    (templates that rewrite earlier turns), the template's own {% generation %} marks are used, if it has them.
    The closing mark that the template writes after the assistant's words belongs to them; blanks behind it do not.

    With `generation` a last turn of the assistant is left out and the rendering ends where the answer starts. Calls of
    functions, and the row's tools, are written by the chat template. With `special` special tokens that a message spells
    are plain text.

    Raises DataError without messages, without a chat template, and where the assistant's words cannot be found.
    """
    messages = example.messages or ()
    if not messages:
        raise DataError(
            f"{example.where} has no chat messages, but the template has {{messages}}. "
            "Name the column that holds them by data.messages."
        )
    if not tokenizer.chat_template:
        raise DataError(
            "The base's tokenizer has no chat template, so {messages} cannot be written out. "
            "Use a chat base, or a template of fields."
        )
    if generation and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not generation and not any(_teaches(message) for message in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise Unlabelled(
            f"{example.where} has no token to learn: no turn of the role 'assistant' says anything (it has {roles}). "
            "Leave the row out, or name the roles as the base's chat template does."
        )
    _refuse_unwritten(messages, tokenizer, example)
    if not generation:  # what follows the last words that are learned is no part of the row
        messages = messages[: 1 + max(i for i, message in enumerate(messages) if _teaches(message))]
    try:
        cut = _by_rendering(messages, tokenizer, example, generation)
        return _with_data(cut, messages, example, special)
    except _Rewritten as rewritten:
        if generation:
            cut = [Turn(_render(messages, tokenizer, example, prompt=True), False)]
            return _with_data(cut, messages, example, special)
        if "{% generation" not in str(tokenizer.chat_template).replace("{%-", "{%"):
            raise DataError(str(rewritten)) from None
        return _by_marks(messages, tokenizer, example)


def _teaches(message: Message) -> bool:
    return message.role == "assistant" and message.learned and bool(message.content.strip() or message.more)


_LEFT_OUT = ("name", "tool_call_id", "prefix")  # templates that leave these out lose no word


def _refuse_unwritten(messages: Sequence[Message], tokenizer: Tokenizer, example: Example) -> None:
    """Raises DataError for what a chat says beside its words and the chat template would drop without a sign."""
    source = str(tokenizer.chat_template)
    for number, message in enumerate(messages):
        for key, _ in message.more:
            if key not in source and key not in _LEFT_OUT:
                raise DataError(
                    f"{example.where}: turn {number} ({message.role}) has {key}, which the base's chat template does not "
                    "write. Use a base whose chat template does, write it into the content, or leave the row out."
                )
    if "tools" in example.fields and "tools" not in source:
        raise DataError(
            f"{example.where} has tools, which the base's chat template does not write. Use a base whose chat template "
            "does, write them into the system turn, or leave the column out."
        )


def _with_data(
    cut: list[Turn], messages: Sequence[Message], example: Example, special: SpecialTokens | None
) -> list[Turn]:
    """Marks where the messages' own text is, if any of it spells a special token."""
    spelled = [message.content for message in messages]
    spelled += [text for message in messages for _, text in message.more]
    if special is None or not any(
        special_spans(text, special) for text in [*spelled, example.fields.get("tools", "")]
    ):
        return cut
    whole = "".join(turn.text for turn in cut)
    spans, at = [], 0
    for message in messages:
        content = message.content.strip()
        first = whole.find(content, at)
        if any(special_spans(text, special) for text in (content, *(text for _, text in message.more))) and (
            first < 0 or not special_spans(content, special)
        ):
            raise DataError(
                f"{example.where}: a turn ({message.role}) spells a special token, and the base's chat template rewrites "
                "that turn, so that the two cannot be distinguished. Leave the row out, or set data.special_tokens."
            )
        if first >= 0:
            at = first + len(content)
            spans.append((first, at))
    if special_spans(example.fields.get("tools", ""), special):
        raise DataError(
            f"{example.where}: its tools spell a special token. Leave the row out, or set data.special_tokens."
        )
    placed, start = [], 0
    for turn in cut:
        stop = start + len(turn.text)
        inside = [
            (max(first, start) - start, min(last, stop) - start)
            for first, last in spans
            if first < stop and start < last
        ]
        placed.append(replace(turn, data=inside))
        start = stop
    return placed


class Unlabelled(DataError):
    """A row in which no token would be learned."""


class _Rewritten(Exception):
    """A longer rendering does not begin with a shorter one."""


def _by_rendering(
    messages: Sequence[Message], tokenizer: Tokenizer, example: Example, generation: bool
) -> list[Turn]:
    whole = _render(messages, tokenizer, example, prompt=generation)
    cut: list[Turn] = []
    done = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(messages[:i], tokenizer, example, prompt=True)
        upto = _render(messages[: i + 1], tokenizer, example, prompt=False)
        if not (upto.startswith(before) and whole.startswith(upto)):
            raise _Rewritten(
                f"{example.where}: the base's chat template writes turn {i} (assistant) differently once other turns "
                "follow, or not where its generation prompt ends, so what the assistant said cannot be distinguished. "
                "Keep one assistant turn a row, use a template with {% generation %} marks, or a template of fields."
            )
        if not message.learned:
            continue
        ends, marked = _end(upto, len(before), message.content)
        answer = whole[len(before) : ends]
        words = _words(answer, message, tokenizer)
        cut += [Turn(whole[done : len(before)], False), Turn(answer, True, open=not marked, words=words)]
        done = ends
    if generation:
        cut.append(Turn(whole[done:], False))
    return cut


def _end(upto: str, start: int, content: str) -> tuple[int, bool]:
    """Finds where the assistant's words and their closing mark end in `upto`, and whether there is such a mark."""
    words = content.strip()
    at = upto.find(words, start)
    mark = upto[at + len(words) :] if at >= 0 else ""
    if mark.strip():
        return len(upto.rstrip()), True
    return len(upto), bool(mark)


def _words(text: str, message: Message, tokenizer: Tokenizer) -> str:
    """The assistant's words in a part of the chat: all of it but the mark that closes the turn."""
    content = message.content.strip()
    at = text.find(content)
    if at >= 0 and content and not message.more:
        return text[: at + len(content)]
    closed = str(getattr(tokenizer, "eos_token", None) or "")
    marks = [*map(str, getattr(tokenizer, "all_special_tokens", ())), closed]
    for mark in marks:
        text = text.removesuffix(mark) if mark else text
    return text


def _by_marks(messages: Sequence[Message], tokenizer: Tokenizer, example: Example) -> list[Turn]:
    try:
        rendered = tokenizer.apply_chat_template(
            _plain(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **_tools(example),
        )
        ids, mask = [int(i) for i in rendered["input_ids"]], [bool(m) for m in rendered["assistant_masks"]]
    except Exception as error:  # jinja, the tokenizer and transformers raise many kinds here
        raise _refused(example, error) from error
    cut: list[Turn] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            run = tuple(ids[start:stop])
            cut.append(Turn(str(tokenizer.decode(list(run), skip_special_tokens=True)), mask[start], run))
            start = stop
    while cut and not cut[-1].said_by_assistant:
        cut.pop()
    if not cut:
        raise DataError(
            f"{example.where}: the {{% generation %}} marks of the base's chat template take in none of these turns. "
            "Mend the marks, or use a template of fields."
        )
    return cut


def _render(messages: Sequence[Message], tokenizer: Tokenizer, example: Example, *, prompt: bool) -> str:
    if not messages and not prompt:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=prompt, **_tools(example)
            )
        )
    except Exception as error:  # whatever the template's author or jinja raises
        raise _refused(example, error) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": message.content,
            **{key: json.loads(text) for key, text in message.more},
        }
        for message in messages
    ]


def _tools(example: Example) -> dict[str, Any]:
    tools = example.fields.get("tools")
    return {} if tools is None else {"tools": json.loads(tools)}


def _refused(example: Example, error: Exception) -> DataError:
    roles = ", ".join(message.role for message in example.messages or ())
    return DataError(
        f"{example.where}: the base's chat template refuses these turns ({roles}): {str(error).strip()}. "
        "Bring the turns into the order that the template wants."
    )
