"""Questions about a document, written by the base itself where a user has none.

Five kinds, as in Cartridges (arXiv 2506.06266): one kind alone teaches a prompt one kind of answer. Each question comes
from one part of the document; empty ones and repeated ones are refused and counted.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Message
from softprompt.data.template import Messages, Template
from softprompt.data.tokenizer import tokens
from softprompt.errors import DataError
from softprompt.inference.compiled import compile_prompt, with_common_beginning
from softprompt.inference.generate import run
from softprompt.inference.request import Request, request
from softprompt.inference.running_batch import Running
from softprompt.inference.sampling import DecodeSettings


@dataclass(frozen=True)
class Kind:
    """A kind of question: what the base is told to write, and words that such a question may begin with.

    A small base, left to begin by itself, writes about the task or the text, and no question."""

    task: str
    openings: tuple[str, ...]


KINDS = {
    "structuring": Kind(
        "Write a question about this text that is answered with a list or a table.",
        ("List the", "Make a table of the", "Give me a list of the", "Put in order the"),
    ),
    "summary": Kind(
        "Write a question about this text that is answered with a summary.",
        ("Summarize", "What does the text say about", "Explain briefly", "What is the main point of"),
    ),
    "question": Kind(
        "Write a question about a detail that this text names.",
        ("What is", "Which", "Who", "When did", "Where", "Why did", "How"),
    ),
    "use case": Kind(
        "Write what somebody wants to do who needs this text, with a question about it.",
        ("I want to", "I am writing about", "I need to know", "I am planning"),
    ),
    "creative": Kind(
        "Write a request for a rhyme, a slogan or a letter about this text.",
        ("Write a poem about", "Write a slogan for", "Write a letter to", "Make up a story about"),
    ),
}
PART_CHARACTERS = 1_500
QUESTION_TOKENS = 48
ROWS = 64  # written side by side
TRIES = 4  # rounds of writing before fewer questions than wanted are accepted


@dataclass(frozen=True)
class Written:
    """Questions, and how many were refused because they were empty or had been asked already."""

    questions: tuple[Example, ...]
    empty: int
    repeated: int


@dataclass(frozen=True)
class Wish:
    """What the base is asked for: a question of one kind about one part of the document, and how it begins."""

    part: str
    task: str
    opening: str


def write_questions(lm: FrozenLM, document: str, count: int, *, seed: int = 0) -> Written:
    """`count` questions about `document`, all kinds about equally often. Raises DataError where none comes."""
    wishes = _by_turns(parts_of(document), random.Random(f"questions/{seed}"))
    questions: dict[str, Example] = {}
    empty = repeated = 0
    for attempt in range(TRIES):
        missing = count - len(questions)
        if missing <= 0:
            break
        for text in _written(lm, list(islice(wishes, missing)), seed * TRIES + attempt):
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


def _by_turns(parts: Sequence[str], drawn: random.Random) -> Iterator[Wish]:
    """Wishes without end: the kinds by turns, and of each kind all parts and openings before any comes twice."""
    orders = []
    for kind in KINDS.values():
        own = [Wish(part, kind.task, opening) for part, opening in product(parts, kind.openings)]
        orders.append(cycle(drawn.sample(own, len(own))))
    for order in cycle(orders):
        yield next(order)


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


def _written(lm: FrozenLM, wishes: Sequence[Wish], seed: int) -> list[str]:
    """What the base writes for every wish, the opening included. A part is read once for all of its wishes, and what is asked
    several times is read once and drawn as often."""
    settings = DecodeSettings(
        max_new_tokens=QUESTION_TOKENS, temperature=0.8, min_p=0.05, seed=seed, stop=("\n",)
    )
    chat = bool(lm.tokenizer.chat_template)
    blank = compile_prompt(lm, Template((Messages(),)) if chat else None, name="questions" if chat else None)
    requests: dict[Wish, list[Request]] = {}
    for part in dict.fromkeys(wish.part for wish in wishes):
        marks = {}
        for wish in dict.fromkeys(wish for wish in wishes if wish.part == part):
            if chat:
                asked = Example({}, (Message("user", f"{part}\n\n{wish.task}"),))
                opening = tokens(lm.tokenizer, wish.opening, blank.special, continues=True)
                marks[wish] = [*blank.marks(lm, asked), *opening]
            else:
                marks[wish] = blank.marks(lm, f"{part}\n\n{wish.task}\n{wish.opening}")
        shared = with_common_beginning(lm, blank, list(marks.values()))
        for wish, own in marks.items():
            first = request(lm, shared, own, settings)
            more = range(1, Counter(wishes)[wish])
            requests[wish] = [
                first,
                *(request(lm, shared, own, settings, sample=n, row=first.row) for n in more),
            ]
    run(Running(lm, max_rows=ROWS), [row for rows in requests.values() for row in rows])
    texts = {wish: iter(rows) for wish, rows in requests.items()}
    return [f"{wish.opening}{next(texts[wish]).text}" for wish in wishes]
