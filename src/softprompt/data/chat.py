"""A chat as the base's own chat template writes it, cut into what is read and what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.data.example import Example, Message
from softprompt.data.tokenizer import Tokenizer
from softprompt.errors import DataError


@dataclass(frozen=True)
class Turn:
    """A stretch of the rendered chat. `ids` is given where the tokenizer itself told the stretches apart.

    `open` tells that the assistant's words end without a mark, so that an end token has to follow.
    """

    text: str
    said_by_assistant: bool
    ids: tuple[int, ...] | None = None
    open: bool = False


def turns(example: Example, tokenizer: Tokenizer, *, generation: bool = False) -> list[Turn]:
    """The chat in stretches, in order, up to the end of the assistant's last words.

    Each turn of the assistant starts where generation would start it: the chat before it is rendered with the
    generation prompt, the chat up to it without, and each rendering must begin with the one before. Where it does not
    (templates that rewrite earlier turns), the template's own {% generation %} marks serve, if it has them.
    The closing mark that the template writes after the assistant's words belongs to them; blanks behind it do not.

    With `generation` a last turn of the assistant is left out and the rendering ends where the answer starts.

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
    if not generation and not any(one.role == "assistant" and one.content.strip() for one in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise Unlabelled(
            f"{example.where} has no token to learn: no turn of the role 'assistant' says anything (it has {roles}). "
            "Leave the row out, or name the roles as the base's chat template does."
        )
    try:
        return _by_rendering(messages, tokenizer, example, generation)
    except _Rewritten as rewritten:
        if generation:
            return [Turn(_render(messages, tokenizer, example, prompt=True), False)]
        if "{% generation" not in str(tokenizer.chat_template).replace("{%-", "{%"):
            raise DataError(str(rewritten)) from None
        return _by_marks(messages, tokenizer, example)


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
                "follow, or not where its generation prompt ends, so what the assistant said cannot be told apart. "
                "Keep one assistant turn a row, use a template with {% generation %} marks, or a template of fields."
            )
        ends, marked = _end(upto, len(before), message.content)
        cut += [
            Turn(whole[done : len(before)], False),
            Turn(whole[len(before) : ends], True, open=not marked),
        ]
        done = ends
    if generation:
        cut.append(Turn(whole[done:], False))
    return cut


def _end(upto: str, start: int, content: str) -> tuple[int, bool]:
    """Where the assistant's words and their closing mark end in `upto`, and whether there is such a mark."""
    said = content.strip()
    at = upto.find(said, start)
    mark = upto[at + len(said) :] if at >= 0 else ""
    if mark.strip():
        return len(upto.rstrip()), True
    return len(upto), bool(mark)


def _by_marks(messages: Sequence[Message], tokenizer: Tokenizer, example: Example) -> list[Turn]:
    try:
        found = tokenizer.apply_chat_template(
            _plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = [int(i) for i in found["input_ids"]], [bool(m) for m in found["assistant_masks"]]
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
            tokenizer.apply_chat_template(_plain(messages), tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # whatever the template's author or jinja raises
        raise _refused(example, error) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _refused(example: Example, error: Exception) -> DataError:
    roles = ", ".join(message.role for message in example.messages or ())
    return DataError(
        f"{example.where}: the base's chat template refuses these turns ({roles}): {str(error).strip()}. "
        "Bring the turns into the order that the template wants."
    )
