"""Questions about a document, written by the base itself where a user has none.

Five kinds, as in Cartridges (arXiv 2506.06266): one kind alone teaches a prompt one kind of answer. Each question comes
from one part of the document; empty ones and repeated ones are refused and counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Message
from softprompt.data.template import Messages, Template
from softprompt.errors import DataError
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.sampling import DecodeSettings

KINDS = {
    "structuring": "Ask for the information of the text in a structured form, such as a list or a table.",
    "summary": "Ask for a summary of a part of the text.",
    "question": "Ask a question that the text answers, about a detail that it names.",
    "use case": "Describe in one sentence what somebody wants to do, and ask what the text says about it.",
    "creative": "Ask for something new that can be made from the text, such as a rhyme, a slogan or a letter.",
}
PART_CHARACTERS = 1_500
QUESTION_TOKENS = 48
TRIES = 4  # rounds of writing before fewer questions than wanted are accepted


@dataclass(frozen=True)
class Written:
    """Questions, and how many were refused because they were empty or had been asked already."""

    questions: tuple[Example, ...]
    empty: int
    repeated: int


def write_questions(
    lm: FrozenLM, document: str, count: int, *, seed: int = 0, batch_rows: int = 16
) -> Written:
    """`count` questions about `document`, in the order of their parts and kinds. Raises DataError where none comes."""
    parts = parts_of(document)
    rng = random.Random(f"questions/{seed}")
    questions: dict[str, Example] = {}
    empty = repeated = 0
    for attempt in range(TRIES):
        missing = count - len(questions)
        if missing <= 0:
            break
        asked = [
            (parts[rng.randrange(len(parts))], list(KINDS.values())[n % len(KINDS)]) for n in range(missing)
        ]
        for text in _written(lm, asked, seed * TRIES + attempt, batch_rows):
            question = first_question(text)
            if not question:
                empty += 1
            elif question.lower() in questions:
                repeated += 1
            else:
                row = Example({"text": question}, (Message("user", question),), row=len(questions))
                questions[question.lower()] = row
    if not questions:
        raise DataError(
            f"{lm.name} wrote no question about the text ({empty} were empty). Give questions with --data, or take an "
            "instruct base."
        )
    return Written(tuple(questions.values()), empty, repeated)


def parts_of(document: str, characters: int = PART_CHARACTERS) -> list[str]:
    """The document in parts of whole paragraphs, of about so many characters; longer paragraphs are cut at a blank."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document):
        for piece in _cut(paragraph.strip(), characters):
            if parts and len(parts[-1]) + len(piece) < characters:
                parts[-1] = f"{parts[-1]}\n\n{piece}"
            elif piece:
                parts.append(piece)
    return parts


def first_question(text: str) -> str:
    """The first line with words, without numbering and quotes; empty if there is none."""
    for line in text.splitlines():
        question = re.sub(r"^[\s\-*\d.)\"'“]+|[\s\"'”]+$", "", line)
        if len(re.findall(r"\w+", question)) >= 3:
            return question
    return ""


def _cut(paragraph: str, characters: int) -> list[str]:
    pieces = []
    while len(paragraph) > characters:
        at = paragraph.rfind(" ", 1, characters)
        at = at if at > 0 else characters
        pieces.append(paragraph[:at])
        paragraph = paragraph[at:].strip()
    return [*pieces, paragraph]


def _written(lm: FrozenLM, asked: Sequence[tuple[str, str]], seed: int, batch_rows: int) -> list[str]:
    settings = DecodeSettings(max_new_tokens=QUESTION_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
    if lm.tokenizer.chat_template:
        layout = compile_prompt(lm, Template((Messages(),)), name="questions")
        examples = [
            Example({}, (Message("user", f"{part}\n\n{kind} Write that one request alone."),))
            for part, kind in asked
        ]
        return [
            generation.text
            for generation in generate(lm, examples, layout, settings, batch_rows=batch_rows, progress=False)
        ]
    texts = [f"{part}\n\nTask: {kind}\nRequest:" for part, kind in asked]
    return [
        generation.text
        for generation in generate(lm, texts, None, settings, batch_rows=batch_rows, progress=False)
    ]
