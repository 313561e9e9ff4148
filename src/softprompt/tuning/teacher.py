"""The base as its own teacher: with a long context in front it answers, and says how likely it found every token.

The context is read once and its keys and values are kept. A student is the same base under a short prompt, with the
same text behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.shared_prefix import with_shared_prefix
from softprompt.data.encoded import Encoded
from softprompt.data.ending import End
from softprompt.data.example import Example, Message
from softprompt.data.layout import Layout, to_answer, to_learn
from softprompt.data.template import Messages, Soft, Template, Text
from softprompt.errors import DataError
from softprompt.inference.compiled import CompiledPrompt, compile_prompt, with_common_beginning
from softprompt.inference.generate import generate
from softprompt.inference.prefill import PrefillRow, like_lengths, prefill
from softprompt.inference.running_batch import position_bytes
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.soft_targets import SoftTargets
from softprompt.tuning.distil_source import demand_text

READ_AT_ONCE = 8
# Rows that are answered side by side. A step of 64 rows of SmolLM2 on a CPU takes 2.5 times as long as one of 16.
LEAST_ROWS, MOST_ROWS = 16, 64
ROWS_BYTES = 2 * 2**30  # of keys and values
QUESTION_POSITIONS = 128  # that a question is supposed to take


@dataclass(frozen=True)
class Answer:
    """One answer to a question: its token ids, an end token included if there is one, and its text."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Teacher:
    """The base with `context` in front of every question. Make one with `teacher_of`.

    `layout` is the text around a question without the context: the student's template less its slot."""

    lm: FrozenLM
    context: str
    layout: Template
    compiled: CompiledPrompt

    @property
    def context_positions(self) -> int:
        """Positions that are read before the question's own text begins."""
        return self.compiled.length

    def example(self, question: Example) -> Example:
        """A question as the teacher reads it: in a chat, the context is the system's turn."""
        return _with_system(question, self.context) if self.layout.chat else question

    def answers(self, questions: Sequence[Example], settings: DecodeSettings) -> list[list[Answer]]:
        """`settings.n` answers to each question."""
        asked = [self.example(question) for question in questions]
        return answers_under(self.lm, self.compiled, asked, settings)

    def gold(self, question: Example) -> Answer:
        """The row's own right answer, as the template's target writes it, with an end token."""
        encoded = to_learn(self._layout(end="auto"), question)
        ids = tuple(token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained)
        return Answer(ids, question.fields[str(self.layout.target)])

    def student_row(self, question: Example, answer: Sequence[int], row: int) -> Encoded:
        """The row that a student learns from: the question, and the answer's tokens to predict."""
        laid_out = to_answer(self._layout(), question)
        read = len(laid_out)
        return Encoded(
            [*laid_out.ids, *answer],
            [-1] * (read + len(answer)),
            [False] * read + [True] * len(answer),
            row,
            0,
            special=laid_out.special,
        )

    def _layout(self, end: End = "never") -> Layout:
        return replace(self.compiled.layout(self.lm, self.layout, end=end), slots=False)

    @torch.inference_mode()
    def targets(self, pairs: Sequence[tuple[Example, Sequence[int]]], k: int | None) -> list[SoftTargets]:
        """The teacher's probabilities at every token of the answer, for each question and answer.

        Raises DataError where context, question and answer together do not fit into the base."""
        rows, starts = [], []
        most = longest_text(self.lm)
        for question, answer in pairs:
            marks = self.compiled.marks(self.lm, self.example(question))
            if most is not None and len(marks) + len(answer) > most:
                raise DataError(
                    f"{question.where}: context, question and answer are {len(marks) + len(answer)} positions, and "
                    f"{self.lm.name} has {most}. Shorten the context or the question."
                )
            row = self.compiled.row([*marks, *answer[:-1]], need=len(marks) - 1)
            shared, own = with_shared_prefix(self.lm, row.state)
            rows.append(replace(row, shared=shared, state=own))
            starts.append(len(marks) - 1)
        targets_by_number: dict[int, SoftTargets] = {}
        order = sorted(range(len(rows)), key=lambda n: rows[n].rest)
        for first in range(0, len(order), READ_AT_ONCE):
            numbers = order[first : first + READ_AT_ONCE]
            for n, hidden_AD in zip(
                numbers, self._hidden([rows[n] for n in numbers], [starts[n] for n in numbers]), strict=True
            ):
                targets_by_number[n] = SoftTargets.of(self.lm.logits(hidden_AD), k)
        return [targets_by_number[n] for n in range(len(rows))]

    def _hidden(self, rows: Sequence[PrefillRow], starts: Sequence[int]) -> list[Tensor]:
        """The hidden states from position `start` of each row on: those that predict its answer."""
        by_row: dict[int, Tensor] = {}
        for group in like_lengths(self.lm, rows):
            done = prefill(self.lm, group)
            for b, row in enumerate(group):
                by_row[id(row)] = done.hidden_BTD[b, : row.rest]
        return [by_row[id(row)][start - row.known :] for row, start in zip(rows, starts, strict=True)]


@dataclass(frozen=True)
class Teachers:
    """A long document's teachers, one a part of it: a question is answered by the part that its row number falls to."""

    parts: tuple[Teacher, ...]

    @property
    def lm(self) -> FrozenLM:
        """The base."""
        return self.parts[0].lm

    @property
    def layout(self) -> Template:
        """The layout of a question without the context."""
        return self.parts[0].layout

    @property
    def context_positions(self) -> int:
        """Positions of all parts together."""
        return sum(part.context_positions for part in self.parts)

    def of(self, question: Example) -> Teacher:
        """The teacher of a question."""
        return self.parts[question.row % len(self.parts)]

    def answers(self, questions: Sequence[Example], settings: DecodeSettings) -> list[list[Answer]]:
        """`settings.n` answers to each question."""
        answers_by_number: dict[int, list[Answer]] = {}
        for part, numbers in self._shared(questions):
            asked = [questions[n] for n in numbers]
            answers_by_number |= zip(numbers, part.answers(asked, settings), strict=True)
        return [answers_by_number[n] for n in range(len(questions))]

    def targets(self, pairs: Sequence[tuple[Example, Sequence[int]]], k: int | None) -> list[SoftTargets]:
        """The teacher's probabilities at every token of the answer, for each question and answer."""
        targets_by_number: dict[int, SoftTargets] = {}
        for part, numbers in self._shared([question for question, _ in pairs]):
            targets_by_number |= zip(numbers, part.targets([pairs[n] for n in numbers], k), strict=True)
        return [targets_by_number[n] for n in range(len(pairs))]

    def _shared(self, questions: Sequence[Example]) -> Iterator[tuple[Teacher, list[int]]]:
        """Every teacher with the numbers of its questions."""
        for index, part in enumerate(self.parts):
            numbers = [n for n, question in enumerate(questions) if question.row % len(self.parts) == index]
            if numbers:
                yield part, numbers


def answers_under(
    lm: FrozenLM, prompt: CompiledPrompt, questions: Sequence[Example], settings: DecodeSettings
) -> list[list[Answer]]:
    """`settings.n` answers to each question under a prompt."""
    rows = _rows_side_by_side(lm, prompt, settings)
    texts = generate(lm, questions, prompt, settings, batch_rows=rows, progress=False)
    answers = [Answer(text.token_ids, text.text) for text in texts]
    return [answers[start : start + settings.n] for start in range(0, len(answers), settings.n)]


def _rows_side_by_side(lm: FrozenLM, prompt: CompiledPrompt, settings: DecodeSettings) -> int:
    """As many rows as have room in ROWS_BYTES. Not as many as the memory that is free now would hold: rows side by side
    change the rounding, and the same settings give the same prompt."""
    own = with_shared_prefix(lm, prompt.state)[1].length + (settings.max_new_tokens or 0) + QUESTION_POSITIONS
    return min(MOST_ROWS, max(LEAST_ROWS, ROWS_BYTES // (position_bytes(lm) * own)))


def teacher_of(lm: FrozenLM, context: str, layout: Template) -> Teacher:
    """Reads `context` once, in front of `layout` (a template without slots).

    Raises DataError for a context without text, or one that leaves no room in the base."""
    demand_text(context)
    layout = Template(tuple(piece for piece in layout.pieces if not isinstance(piece, Soft)), layout.target)
    if layout.chat:
        compiled = _compiled_chat(lm, context)
    else:
        compiled = compile_prompt(
            lm, Template((Text(context), *layout.pieces), layout.target), name="context"
        )
    most = longest_text(lm)
    if most is not None and compiled.length >= most:
        raise DataError(
            f"The context has {compiled.length} positions, and {lm.name} reads {most}. Shorten it, or let it be cut into parts."
        )
    return Teacher(lm, context, layout, compiled)


def _compiled_chat(lm: FrozenLM, context: str) -> CompiledPrompt:
    """The context as the system's turn of a chat: what two chats that share nothing else begin with is read once."""
    blank = compile_prompt(lm, Template((Messages(),)), name="context")
    chats = [_with_system(Example({}, (Message("user", text),)), context) for text in ("a", "0")]
    return with_common_beginning(lm, blank, [blank.marks(lm, chat) for chat in chats])


def _with_system(question: Example, context: str) -> Example:
    """The context in front of what the system says already."""
    messages = question.messages or ()
    own = [message.content for message in messages if message.role == "system"]
    rest = tuple(message for message in messages if message.role != "system")
    return replace(question, messages=(Message("system", "\n\n".join([context, *own])), *rest))
