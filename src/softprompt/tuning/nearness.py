"""Nearness of a short prompt to its long text: the same answers, right answers, and the time that it saves.

Where the long text leaves the base undecided between two tokens, a small difference changes the answer: bfloat16 against
float32 is enough. So agreement is given on the questions that it answers surely, too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.base.kv import EMPTY
from softprompt.data.example import Example
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.soft_targets import SoftTargets
from softprompt.prompt.soft_prompt import Prompt
from softprompt.tuning.lessons import Lesson
from softprompt.tuning.teacher import Answer, Teachers, answers_under

SURE_MARGIN = 0.2  # between the teacher's two likeliest tokens, in probability, at every token of its answer


@dataclass(frozen=True)
class Nearness:
    """Shares of the judged questions. Agreement: the answer is the teacher's, greedily, token for token. `sure` is the share
    that the teacher answers with a margin of SURE_MARGIN or more at every token, and `agreement_sure` the agreement on
    those; nan where there is none, as `right_*` is without right answers."""

    judged: int
    agreement: float
    agreement_base: float
    sure: float
    agreement_sure: float
    right_context: float
    right_prompt: float
    right_base: float


def nearness(
    teacher: Teachers,
    prompt: Prompt,
    questions: Sequence[Example],
    answer_tokens: int,
    lessons: Sequence[Lesson] = (),
) -> Nearness:
    """Answers the questions under the long context, the prompt and no prompt at all, and compares the answers.

    Agreement is on as many tokens as answers were learned. `lessons` are greedy answers of that length under the long context
    that are there already, one a question in the same order, or none."""
    lm, target = teacher.lm, teacher.layout.target
    longest = answer_tokens
    if target is not None:  # a right answer that is longer must be able to come
        longest = max(longest, *(len(teacher.of(question).gold(question).ids) + 1 for question in questions))
    decode = DecodeSettings(max_new_tokens=longest)
    if lessons:
        by_context = [lesson.answer for lesson in lessons]
        margins = [_margin(lesson.targets) for lesson in lessons]
    else:
        by_context = [own[0] for own in teacher.answers(questions, decode)]
        pairs = [(row, answer.ids[:answer_tokens]) for row, answer in zip(questions, by_context, strict=True)]
        margins = [_margin(targets) for targets in teacher.targets(pairs, 2)]
    by_prompt, by_base = (
        [own[0] for own in answers_under(lm, compiled, questions, decode)]
        for compiled in (compile_prompt(lm, prompt), compile_prompt(lm, None, template=teacher.layout))
    )

    def same(answers: Sequence[Answer]) -> list[bool]:
        return [
            answer.ids[:answer_tokens] == wanted.ids[:answer_tokens]
            for answer, wanted in zip(answers, by_context, strict=True)
        ]

    def right(answers: Sequence[Answer]) -> float:
        if target is None:
            return math.nan
        return statistics.fmean(
            _first_line(answer.text) == question.fields[target].strip()
            for answer, question in zip(answers, questions, strict=True)
        )

    same_by_prompt = same(by_prompt)
    surely = [agrees for agrees, margin in zip(same_by_prompt, margins, strict=True) if margin >= SURE_MARGIN]
    return Nearness(
        judged=len(questions),
        agreement=statistics.fmean(same_by_prompt),
        agreement_base=statistics.fmean(same(by_base)),
        sure=len(surely) / len(questions),
        agreement_sure=statistics.fmean(surely) if surely else math.nan,
        right_context=right(by_context),
        right_prompt=right(by_prompt),
        right_base=right(by_base),
    )


def _margin(targets: SoftTargets) -> float:
    """The smallest distance in probability between the two likeliest tokens along an answer."""
    return float((targets.probabilities_Nk[:, 0] - targets.probabilities_Nk[:, 1]).min())


def milliseconds_saved(teacher: Teachers, prompt: Prompt) -> float:
    """The time by which a request can begin to answer earlier: that of reading its part of the long text, less that of reading
    a soft prompt's vectors. A deep prompt's keys and values are there already. The median of three."""
    longest = max(part.context_positions for part in teacher.parts)
    read = _milliseconds_to_read(teacher, longest)
    return read - _milliseconds_to_read(teacher, prompt.length) if prompt.kind == "soft" else read


def _milliseconds_to_read(teacher: Teachers, positions: int) -> float:
    row = PrefillRow(EMPTY, (1 % teacher.lm.vocab_size,) * positions)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode():
            prefill(teacher.lm, [row])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
