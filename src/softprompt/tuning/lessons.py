"""Lessons: questions with the teacher's answers and probabilities, and the loss and plan that a student learns by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.base.context_length import longest_text
from softprompt.data.batch import EncodedSet, collate
from softprompt.data.encoded import EncodedRows
from softprompt.data.example import Example, Splits
from softprompt.data.template import Soft, Template
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.loss.soft_targets import SoftTargets
from softprompt.prompt.soft_prompt import Plain, Prompt
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Data, PromptSettings, Recipe
from softprompt.tuning.settle import fast_loss, settled_batch_size, settled_rate
from softprompt.tuning.task import Task
from softprompt.tuning.teacher import Answer, Teachers, answers_under

# The likeliest tokens by which a student is judged. Few are enough to learn by, but all others count as one, and where the
# teacher is unsure that hides half of the divergence (figures in LOG.md).
JUDGED_TOP_K = 1_000


@dataclass(frozen=True)
class Lesson:
    """A question, the teacher's answer to it, and what it found likely at every token of that answer."""

    question: Example
    answer: Answer
    targets: SoftTargets


def lessons_of(
    teacher: Teachers,
    questions: Sequence[Example],
    settings: DistilSettings,
    *,
    likeliest: bool = False,
    student: Prompt | None = None,
    number: int = 0,
) -> list[Lesson]:
    """The teacher's answers to every question with its probabilities; `likeliest` ones alone are what a student is
    judged by.

    With `student`, the answers are the student's own, and the probabilities still the teacher's: on-policy distillation
    (Agarwal et al. 2024) corrects mistakes where the student makes them. `number` is the round. With `gold`, the answer
    is the row's own, and its tokens get that share of the targets: the best step is chosen by what is learned."""
    distil = settings.distil
    k = distil.teacher_top_k or None
    if likeliest and k is not None:
        k = max(k, JUDGED_TOP_K)
    drawn = not likeliest and distil.temperature > 0
    decode = DecodeSettings(
        max_new_tokens=distil.answer_tokens,
        temperature=distil.temperature if drawn else 0.0,
        n=distil.answers if drawn else 1,
        seed=settings.tune.seed + number,
    )
    if distil.gold:
        answers = [[teacher.of(question).gold(question)] for question in questions]
    elif student is not None:
        answers = answers_under(teacher.lm, compile_prompt(teacher.lm, student), questions, decode)
    else:
        answers = teacher.answers(questions, decode)
    pairs = [
        (question, answer)
        for question, own in zip(questions, answers, strict=True)
        for answer in own
        if answer.ids
    ]
    targets = teacher.targets([(question, answer.ids) for question, answer in pairs], k)
    if distil.gold:
        targets = [
            target.mixed(torch.tensor(answer.ids, device=target.ids_Nk.device), distil.gold)
            for target, (_, answer) in zip(targets, pairs, strict=True)
        ]
    return [
        Lesson(question, answer, target) for (question, answer), target in zip(pairs, targets, strict=True)
    ]


def divergence_of(teacher: Teachers, lessons: Sequence[Lesson], plain: Plain | None) -> float:
    """Mean KL divergence from the teacher at every token of the answers, in nats; of the bare base without `plain`."""
    loss = DivergenceLoss(FastLoss(teacher.lm), {n: lesson.targets for n, lesson in enumerate(lessons)})
    rows = [
        teacher.of(lesson.question).student_row(lesson.question, lesson.answer.ids, n)
        for n, lesson in enumerate(lessons)
    ]
    if plain is not None and len(plain) == 1:
        rows = [row.behind_slot(len(plain[0])) for row in rows]
    with torch.inference_mode():
        parts = [loss(collate(rows[first : first + 8]), plain) for first in range(0, len(rows), 8)]
    return float(torch.cat(parts).mean())


def distil_plan(
    settings: DistilSettings,
    teacher: Teachers,
    splits: Splits,
    lessons: Sequence[Lesson],
    judged: Sequence[Lesson],
    out: str,
) -> Plan:
    """A plan whose rows are questions with their answers, and whose loss is the divergence from the teacher. Where
    answers are refreshed, every round takes its share of the steps."""
    lm, tune = teacher.lm, settings.tune
    everything = [*lessons, *judged]
    rows = [
        teacher.of(lesson.question).student_row(lesson.question, lesson.answer.ids, n)
        for n, lesson in enumerate(everything)
    ]
    train, held_out = rows[: len(lessons)], rows[len(lessons) :]
    kind, length = settings.distil.kind, settings.distil.length
    template = Template((Soft(length), *teacher.layout.pieces), teacher.layout.target)
    recipe = Recipe(
        base=settings.base,
        base_revision=settings.base_revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        out=out,
        data=Data(
            source=settings.data.source or splits.source,
            column=settings.data.column,
            messages=settings.data.messages,
            target=settings.data.target,
            template=str(template),
        ),
        prompt=PromptSettings(kind=kind, length=length),
        tune=tune,
    )
    task = Task(
        template, splits, lm.tokenizer, longest_text(lm), on_overflow="error", end=recipe.data.end, kind=kind
    )
    if kind == "soft":
        train, held_out = ([row.behind_slot(length) for row in part] for part in (train, held_out))
    targets = {n: lesson.targets for n, lesson in enumerate(everything)}
    batch_size = settled_batch_size(recipe)
    steps = tune.epochs * math.ceil(len(train) / batch_size)
    return Plan(
        recipe=recipe,
        lm=lm,
        loss=DivergenceLoss(fast_loss(recipe, lm), targets),
        task=task,
        train=EncodedSet(EncodedRows(train)),
        learned_from=splits.train,
        held_out=held_out,
        held_out_base=rows[len(lessons) :],
        judged_on="validation",
        learning_rate=settled_rate(recipe, lm),
        batch_size=batch_size,
        steps=math.ceil(min(steps, tune.max_steps or steps) / (settings.distil.on_policy + 1)),
    )
