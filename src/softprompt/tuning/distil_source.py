"""The input of a distillation: the long text, in parts where it is longer than the base reads, the template around a
question, and the questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Message, Splits
from softprompt.data.shots import drawn_shots
from softprompt.data.source import load_splits
from softprompt.data.template import Field, Template, Text
from softprompt.errors import DataError
from softprompt.progress.events import Event, Note
from softprompt.store.plain_file import read_text
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.questions import parts_of, write_questions

QUESTION_SHARE = (
    8  # of the base's positions, one in so many is left for a question where a document is cut into parts
)
OWN_HELD_OUT = 0.2  # of questions that the base wrote
SHOT_END = (
    "\n###\n"  # between examples, so that an answer ends there: a blank line alone may be part of an answer
)


@dataclass(frozen=True)
class Source:
    """The contexts as they come before a question, one a part of the long text; the template around a question,
    without the context; and the questions to learn from, to choose the best step by, and to judge on: None until the
    base has written them."""

    contexts: tuple[str, ...]
    layout: Template
    splits: Splits | None


def read_source(settings: DistilSettings, lm: FrozenLM, on_event: Callable[[Event], None]) -> Source:
    """Reads the text and the questions that `settings` names. Raises DataError."""
    given = None
    if settings.data.source is not None:
        given = _given_questions(settings, settings.data.source, on_event)
    if settings.context.shots is None:
        contexts = _parts(settings, lm, _document(settings))
        layout = _layout(settings, lm, given)
    else:
        assert given is not None  # examples are rows, as DistilSettings demands
        layout = _layout(settings, lm, given)
        if isinstance(layout.pieces[-1], Field):
            layout = Template((*layout.pieces, Text(SHOT_END)), layout.target)
        contexts = [few_shot_text(given.train, layout, settings.context.shots, settings.tune.seed)]
    if given is not None and layout.chat and settings.data.template is None:
        given = _as_chats(given)
    return Source(tuple(in_front(context, layout) for context in contexts), layout, given)


def questions_of(
    source: Source, settings: DistilSettings, lm: FrozenLM, on_event: Callable[[Event], None]
) -> Splits:
    """The questions of `source`; where none were given, the base writes them. Raises DataError."""
    if source.splits is not None:
        return source.splits
    questions = _written_questions(settings, lm, source.contexts, on_event)
    held = max(1, round(OWN_HELD_OUT * len(questions)))
    if len(questions) < 4:
        raise DataError(
            f"{lm.name} wrote {len(questions)} usable questions, wanted at least 4. Give questions with --data."
        )
    return Splits(questions[:-held], questions[-held:], (), "questions by the base")


def few_shot_text(train: Sequence[Example], layout: Template, count: int, seed: int) -> str:
    """`count` training rows with their answers, one after another, each answer about as often as the others."""
    chosen = drawn_shots(train, lambda example: example.fields[str(layout.target)], count, seed)
    return "".join(_written_out(layout, example) for example in chosen)


def in_front(text: str, layout: Template) -> str:
    """The context in front of a question: its own turn in a chat, else separated by a blank line."""
    return text if layout.chat or text.endswith("\n") or not text.strip() else f"{text}\n\n"


def _given_questions(settings: DistilSettings, source: str, on_event: Callable[[Event], None]) -> Splits:
    data = settings.data
    splits = load_splits(
        source,
        column=data.column,
        messages=data.messages,
        target=data.target,
        limit=data.limit,
        validation=data.validation,
        test=data.test,
        seed=data.seed,
    )
    if not splits.validation:
        raise DataError(
            f"{splits.source}: too few rows to hold some out, so the prompt cannot be measured. Give more "
            "questions, or --validation."
        )
    for text in splits.notes:
        on_event(Note(text))
    return splits


def _layout(settings: DistilSettings, lm: FrozenLM, given: Splits | None) -> Template:
    """The template around a question: the one that was named, a chat where the base has a template or the rows are
    chats, else the text and what separates it from the answer."""
    data = settings.data
    if data.template is not None:
        return Template.parse(data.template, target=data.target)
    chat = bool(lm.tokenizer.chat_template) or (given is not None and given.train[0].messages is not None)
    if chat and data.target is None:
        return Template.parse("{messages}")
    names = ["text"] if given is None else [name for name in given.train[0].fields if name != data.target]
    question = "text" if "text" in names else names[0]
    if data.target is None:
        return Template((Field(question), Text("\n")))
    return Template.parse(f"{{{question}}}\n{data.target}: {{{data.target}}}", target=data.target)


def _written_questions(
    settings: DistilSettings, lm: FrozenLM, texts: Sequence[str], on_event: Callable[[Event], None]
) -> tuple[Example, ...]:
    """Questions by the base about every part, numbered so that each falls to the teacher of its part."""
    data, questions = settings.data, list[Example]()
    empty = repeated = 0
    for index, text in enumerate(texts):
        written = write_questions(lm, text, math.ceil(data.written / len(texts)), seed=data.seed)
        empty, repeated = empty + written.empty, repeated + written.repeated
        questions += [
            replace(question, row=len(texts) * n + index) for n, question in enumerate(written.questions)
        ]
    on_event(
        Note(
            f"{lm.name} wrote {len(questions)} questions; {empty} empty and {repeated} repeated ones were left out."
        )
    )
    return tuple(sorted(questions, key=lambda question: question.row))


def _as_chats(splits: Splits) -> Splits:
    """Questions as a user's turn; of chats, everything before the last answer of the assistant."""

    def chat(example: Example) -> Example:
        if example.messages is None:
            text = example.fields.get("text") or next(iter(example.fields.values()), "")
            return replace(example, messages=(Message("user", text),))
        turns = example.messages
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns:
            raise DataError(f"{example.where} has no turn of a user, so nothing is asked. Leave the row out.")
        return replace(example, messages=turns)

    parts = (
        tuple(chat(example) for example in part) for part in (splits.train, splits.validation, splits.test)
    )
    train, validation, test = parts
    return replace(splits, train=train, validation=validation, test=test)


def _document(settings: DistilSettings) -> str:
    """The text that is distilled, from its file where it is one."""
    given = settings.context.document or settings.context.instruction or ""
    path = Path(given).expanduser()
    is_file = len(given) < 1_000 and "\n" not in given and path.is_file()
    if not is_file:
        if settings.context.document is not None:
            raise DataError(f"{given}: there is no such file. Check --context.")
        demand_text(given)
        return given
    try:
        text = read_text(path).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{given}: cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error
    demand_text(text)
    return text


def demand_text(context: str) -> None:
    """Raises DataError for a context without text."""
    if not context.strip():
        raise DataError("The context is empty. Give a text to distil.")


def _parts(settings: DistilSettings, lm: FrozenLM, document: str) -> list[str]:
    """The document whole, or in parts of which each leaves room in the base for a question and its answer."""
    most = longest_text(lm)
    if most is None or settings.context.document is None:
        return [document]
    room = most - settings.distil.answer_tokens - most // QUESTION_SHARE
    if room < 1 or len(_ids(lm, document)) <= room:
        return [document]
    characters = len(document)
    while characters > 1:  # parts of whole paragraphs, smaller until the longest fits
        parts = parts_of(document, characters)
        if max(len(_ids(lm, part)) for part in parts) <= room:
            return parts
        characters = characters * 3 // 4
    return [document]


def _ids(lm: FrozenLM, text: str) -> list[int]:
    ids: list[int] = lm.tokenizer(text, verbose=False)["input_ids"]
    return ids


def _written_out(layout: Template, example: Example) -> str:
    return "".join(
        piece.text if isinstance(piece, Text) else example.fields[piece.name]
        for piece in layout.pieces
        if isinstance(piece, Text | Field)
    )
