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
from softprompt.prompt.soft_prompt import Prompt
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


def nearness(teacher: Teachers, prompt: Prompt, questions: Sequence[Example], answer_tokens: int) -> Nearness:
    """Answers the questions under the long context, the prompt and no prompt at all, and compares the answers.

    Agreement is on as many tokens as answers were learned."""
    lm, target = teacher.lm, teacher.layout.target
    longest = answer_tokens
    if target is not None:  # a right answer that is longer must be able to come
        longest = max(longest, *(len(teacher.of(question).gold(question).ids) + 1 for question in questions))
    decode = DecodeSettings(max_new_tokens=longest)
    bare = compile_prompt(lm, None, template=teacher.layout)
    by_context, by_prompt, by_base = (
        [own[0] for own in answers]
        for answers in (
            teacher.answers(questions, decode),
            answers_under(lm, compile_prompt(lm, prompt), questions, decode),
            answers_under(lm, bare, questions, decode),
        )
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
    margins = _margins(teacher, questions, [answer.ids[:answer_tokens] for answer in by_context])
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


def _margins(
    teacher: Teachers, questions: Sequence[Example], answers: Sequence[Sequence[int]]
) -> list[float]:
    """The smallest distance in probability between the teacher's two likeliest tokens along each of its answers."""
    targets = teacher.targets(list(zip(questions, answers, strict=True)), 2)
    return [
        float((target.probabilities_Nk[:, 0] - target.probabilities_Nk[:, 1]).min()) for target in targets
    ]


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
