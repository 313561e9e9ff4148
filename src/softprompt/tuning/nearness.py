"""Nearness of a short prompt to its long text: the same answers, right answers, and the time that it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from softprompt.base.kv import EMPTY
from softprompt.data.example import Example
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.inference.sampling import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt
from softprompt.tuning.teacher import Teachers


def agreements(
    teacher: Teachers, prompt: Prompt, questions: Sequence[Example], answer_tokens: int
) -> tuple[float, float]:
    """The share of questions that prompt and bare base answer as the teacher does, greedily, token for token, in as many
    tokens as answers were learned."""
    decode = DecodeSettings(max_new_tokens=answer_tokens)
    wanted = [own[0].ids for own in teacher.answers(questions, decode)]
    bare = compile_prompt(teacher.lm, None, template=teacher.layout)
    shares = []
    for compiled in (compile_prompt(teacher.lm, prompt), bare):
        answers = [
            generation.token_ids
            for generation in generate(teacher.lm, questions, compiled, decode, progress=False)
        ]
        shares.append(sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted))
    return shares[0], shares[1]


def gold(teacher: Teachers, prompt: Prompt, questions: Sequence[Example]) -> tuple[float, float, float]:
    """The share of right answers of the long context, of the prompt and of the bare base."""
    decode = DecodeSettings(max_new_tokens=32)
    target = str(teacher.layout.target)
    bare = compile_prompt(teacher.lm, None, template=teacher.layout)
    written = [[own[0].text for own in teacher.answers(questions, decode)]]
    for compiled in (compile_prompt(teacher.lm, prompt), bare):
        written.append(
            [answer.text for answer in generate(teacher.lm, questions, compiled, decode, progress=False)]
        )
    right = [
        sum(
            _first_line(text) == question.fields[target].strip()
            for text, question in zip(texts, questions, strict=True)
        )
        for texts in written
    ]
    return right[0] / len(questions), right[1] / len(questions), right[2] / len(questions)


def milliseconds_saved(teacher: Teachers, prompt: Prompt) -> float:
    """The time by which a request that reads everything from the start can begin to answer earlier: the median of three."""
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for index, length in enumerate((teacher.context_positions, prompt.length)):
            marks = tuple(1 % teacher.lm.vocab_size for _ in range(length))
            started = time.perf_counter()
            with torch.inference_mode():
                prefill(teacher.lm, [PrefillRow(EMPTY, marks)])
            times[index].append(1000 * (time.perf_counter() - started))
    return statistics.median(times[0]) - statistics.median(times[1])


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
