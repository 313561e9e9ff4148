"""The engine's input from a request's body: the text as the prompt lays it out, and what steers the row."""

from __future__ import annotations

import json
from collections.abc import Sequence

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Message
from softprompt.data.layout import Layout, to_answer
from softprompt.data.template import Template
from softprompt.serving import wire
from softprompt.serving.catalogue import Served
from softprompt.serving.refusals import Refused
from softprompt.serving.steering import Grammars, Penalties, Steers

Input = str | Example | list[int]


def completion_input(
    lm: FrozenLM, served: Served, given: str | list[int], body: wire.CompletionBody
) -> Input:
    """One prompt of a completion."""
    if body.fields is not None:
        return _of_fields(served, body.fields)
    if isinstance(given, str):
        if len(served.template.inputs) > 1:
            raise _needs_fields(served)
        if served.template.chat:
            return Example({}, (Message("user", given),))
        return given
    if any(not 0 <= token < lm.vocab_size for token in given):
        raise Refused(400, f"prompt: wanted ids from 0 to {lm.vocab_size - 1}.", param="prompt")
    if served.digest is not None:
        raise Refused(
            400,
            f"{served.name} lays its input out as text, so token ids cannot be put in. Send text, or ask `base`.",
            param="prompt",
        )
    if not given:
        raise Refused(400, "prompt: an empty list of ids gives nothing to continue.", param="prompt")
    return given


def chat_input(
    lm: FrozenLM, served: Served, turns: Sequence[Message], fields: dict[str, str] | None, where: str
) -> Input:
    """A chat as the prompt's layout wants it: its own chat, or the last thing the user said."""
    if fields is not None:
        return _of_fields(served, fields)
    chat = Example({}, tuple(turns))
    if served.template.chat:
        return chat
    if served.digest is None:
        if not lm.tokenizer.chat_template:
            raise Refused(400, f"{served.name} has no chat template. Use /v1/completions.", param=where)
        layout = Layout.of(Template.parse("{messages}"), lm.tokenizer, end="never")
        encoded = to_answer(layout, chat)
        return [int(token) for token in encoded.ids]
    if len(served.template.inputs) != 1:
        raise _needs_fields(served)
    questions = [turn.content for turn in turns if turn.role == "user"]
    if not questions:
        raise Refused(
            400, f"{where}: there is no user turn, which this prompt's input is taken from.", param=where
        )
    return questions[-1]


def messages(given: Sequence[wire.ChatMessage], where: str = "messages") -> list[Message]:
    """The turns of a chat. Raises Refused for parts that are not text."""
    try:
        return [
            Message(
                "system" if turn.role == "developer" else turn.role,
                turn.text,
                tuple((name, _as_json(value)) for name, value in turn.more.items()),
            )
            for turn in given
        ]
    except ValueError as error:
        raise Refused(400, f"{where}: {error}.", param=where) from None


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def steering(body: wire.Decoding, given: Input, grammars: Grammars) -> Steers | None:
    """The steering of this body's rows, if any. Raises Refused and RecipeError for what cannot be followed."""
    penalties = Penalties(body.presence_penalty or 0.0, body.frequency_penalty or 0.0)
    try:
        schema = wire.json_schema(body.response_format)
    except ValueError as error:
        raise Refused(400, f"{error}.", param="response_format") from None
    if sum((bool(body.choice), body.regex is not None, schema is not None)) > 1:
        raise Refused(
            400, "choice, regex and response_format exclude each other. Send one.", param="response_format"
        )
    grammar = None
    if body.regex is not None:
        grammar = grammars.regex(body.regex)
    elif schema is not None:
        grammar = grammars.schema(schema)
    labels = tuple(body.choice or ())
    if penalties == Penalties() and not labels and grammar is None:
        return None
    return Steers(given, penalties, labels, grammar, grammars)


def demand_in_vocabulary(body: wire.Decoding, vocabulary: int) -> None:
    """Raises Refused for a bias of a token that the base does not have."""
    if any(
        not (token.isascii() and token.isdecimal() and len(token) < 10) or int(token) >= vocabulary
        for token in body.logit_bias or {}
    ):
        raise Refused(
            400, f"logit_bias: wanted token ids from 0 to {vocabulary - 1} as keys.", param="logit_bias"
        )


def _of_fields(served: Served, fields: dict[str, str]) -> Example:
    missing = [name for name in served.template.inputs if name not in fields]
    if missing:
        raise Refused(400, f"softprompt.fields: {', '.join(missing)} is missing.", param="softprompt.fields")
    return Example(fields)


def _needs_fields(served: Served) -> Refused:
    names = ", ".join(served.template.inputs)
    return Refused(
        400,
        f"{served.name} has several inputs ({names}). Send them as softprompt: {{fields: {{...}}}}.",
        param="softprompt.fields",
    )
