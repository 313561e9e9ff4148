"""Distillation: a long context becomes a short prompt, without labels, by learning what the base says under the context.

The frozen base is teacher and student at once (context distillation: Snell et al. 2022; Cartridges, arXiv 2506.06266). The
context is read once; the teacher's answers and its likeliest tokens at every position of them are stored once; the
student then learns from rows that hold the question alone, as any prompt does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import demand_alone
from softprompt.base.rotary import rotary_of
from softprompt.data.example import Splits
from softprompt.errors import BaseError, DataError
from softprompt.progress.events import Event, Note
from softprompt.progress.shown import shown
from softprompt.prompt.reparam import Direct, Form
from softprompt.prompt.soft_prompt import Plain, Prompt
from softprompt.store.ownership import PROMPT_FILES, check_replaceable
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.distil_source import questions_of, read_source
from softprompt.tuning.distil_start import FixedFirst, context_start
from softprompt.tuning.lessons import Lesson, distil_plan, divergence_of, lessons_of
from softprompt.tuning.loop import tune
from softprompt.tuning.nearness import milliseconds_saved, nearness
from softprompt.tuning.records import METRICS, RECIPE
from softprompt.tuning.result import TuneResult
from softprompt.tuning.starts import start as starting_form
from softprompt.tuning.teacher import Teachers, teacher_of

JUDGED_QUESTIONS = (
    64  # held-out questions that are answered for the agreement; all, where there are right answers
)


@dataclass(frozen=True)
class DistilResult:
    """The short prompt, and how near it comes to the long context. Divergences are KL(teacher || student) in nats a token of
    the teacher's answers to held-out questions. Agreement is the share of `judged` held-out questions that get the same greedy
    answer, and `agreement_sure` that of the share `sure` which the teacher answers with a clear margin at every token. A
    figure that is not known is nan."""

    prompt: Prompt = field(repr=False)
    path: str
    base: str
    context_positions: int
    virtual_tokens: int
    questions: int
    held_out: int
    judged: int
    kl_base: float
    kl_start: float
    kl: float
    agreement: float
    agreement_base: float
    agreement_sure: float
    sure: float
    gold_context: float
    gold_prompt: float
    gold_base: float
    milliseconds_saved: float
    seconds_teacher: float
    seconds_start: float
    seconds: float
    steps: int
    peak_memory_bytes: int
    prompt_bytes: int

    @property
    def times_shorter(self) -> float:
        """Positions of the context for each of the prompt."""
        return self.context_positions / self.virtual_tokens

    def to_record(self) -> dict[str, Any]:
        """Every figure as plain data for JSON; the prompt itself lies at `path`."""
        return {
            "schema": 1,
            **{each.name: getattr(self, each.name) for each in fields(self) if each.name != "prompt"},
        }

    def __repr__(self) -> str:
        return (
            f"DistilResult({self.path}: {self.context_positions} positions -> {self.virtual_tokens}, KL {self.kl:.3f} nats "
            f"a token, {self.agreement:.0%} of {self.judged} answers the same)"
        )


def distil(
    settings: DistilSettings,
    *,
    lm: FrozenLM | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    progress: bool | None = None,
    resume: bool = False,
) -> DistilResult:
    """Distils the long text that `settings` names into a short prompt, saved in `settings.out`. `lm` replaces the base that
    would be loaded.

    Killed at any moment, it continues with `resume` from its last checkpoint to the same result. Progress is shown in
    terminals and notebooks, unless `progress` is False. Raises the errors of
    softprompt.errors; DataError for an empty context, a context that fits into the prompt, or no questions."""
    demand_alone("distil")
    check_replaceable(settings.out, (RECIPE, METRICS, *PROMPT_FILES), kind="run")  # before hours are spent
    with shown(on_event, progress) as show:
        return _distil(settings, lm, show, resume)


@dataclass(frozen=True)
class Learned:
    """A short prompt's last round of learning; divergences of the bare base, the start and the prompt from the teacher, in
    nats a token; and what it took."""

    result: TuneResult
    kl_base: float
    kl_start: float
    kl: float
    steps: int
    seconds_teacher: float
    seconds_start: float
    judged: Sequence[Lesson] = ()  # the teacher's greedy answers to the validation questions


def learn_from(
    teacher: Teachers,
    splits: Splits,
    settings: DistilSettings,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    resume: bool = False,
) -> Learned:
    """Learns a short prompt from a teacher's answers to the questions of `splits`, and saves it in `settings.out`.

    The best step is chosen on the validation questions."""
    began = time.perf_counter()
    lessons = lessons_of(teacher, splits.train, settings)
    judged = lessons_of(teacher, splits.validation, settings, likeliest=True)
    taught = time.perf_counter()
    form: Form | None = None
    if settings.distil.kind == "deep" and settings.distil.init != "vocabulary":
        form = FixedFirst(context_start(settings, teacher, lessons))
    started = time.perf_counter()
    rounds: list[TuneResult] = []
    start: Plain | None = None
    while len(rounds) <= settings.distil.on_policy:
        number = len(rounds)
        # The last round is the one that is kept; those before it are stages of it.
        out = settings.out if number == settings.distil.on_policy else f"{settings.out}/rounds/{number}"
        plan = distil_plan(settings, teacher, splits, lessons, judged, out)
        if form is None:
            form = starting_form(plan)
        if start is None:
            start = tuple(tensor.detach().clone() for tensor in form())
        rounds.append(
            tune(plan.recipe, plan=plan, form=form, on_event=on_event, progress=False, resume=resume)
        )
        if number < settings.distil.on_policy:
            prompt = rounds[-1].prompt
            lessons = lessons_of(teacher, splits.train, settings, student=prompt, number=number + 1)
            form = FixedFirst(prompt.plain) if len(prompt.plain) == 2 else Direct(prompt.plain)
    kl_base, kl_start, kl = rounds[0].nll_base, rounds[0].nll_before, rounds[-1].nll_after
    if settings.distil.gold:  # what was learned is not the divergence from the teacher alone
        learning = settings.distil.model_copy(update={"gold": 0.0})
        judged = lessons_of(
            teacher, splits.validation, settings.model_copy(update={"distil": learning}), likeliest=True
        )
        kl_base, kl_start, kl = (
            divergence_of(teacher, judged, plain) for plain in (None, start, rounds[-1].prompt.plain)
        )
    return Learned(
        rounds[-1],
        kl_base,
        kl_start,
        kl,
        sum(each.steps for each in rounds),
        taught - began,
        started - taught,
        judged,
    )


def _distil(
    settings: DistilSettings,
    lm: FrozenLM | None,
    on_event: Callable[[Event], None],
    resume: bool,
) -> DistilResult:
    began = time.perf_counter()
    lm = lm or FrozenLM.load(
        settings.base,
        revision=settings.base_revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        spread=settings.spread,
    )
    if settings.distil.exact and rotary_of(lm) is None:
        raise BaseError(
            f"{lm.name}: has no rotary positions, so a shortened context cannot keep its distances exactly. "
            "Leave --exact out, or choose another base."
        )
    source = read_source(settings, lm, on_event)
    teacher = Teachers(tuple(teacher_of(lm, context, source.layout) for context in source.contexts))
    if len(source.contexts) > 1:
        on_event(
            Note(
                f"The document is longer than {lm.name} reads at once: it is cut into {len(source.contexts)} parts, and a "
                "question is answered by one of them."
            )
        )
    if settings.distil.length >= teacher.context_positions:
        raise DataError(
            f"The context has {teacher.context_positions} positions, which fit into {settings.distil.length} virtual "
            "tokens. Set fewer --virtual-tokens, or use the text as it is."
        )
    on_event(
        Note(
            f"Context: {teacher.context_positions} positions, {settings.distil.length} kept: "
            f"{teacher.context_positions / settings.distil.length:.1f} times shorter."
        )
    )
    if settings.distil.kind == "soft":
        on_event(
            Note(
                "Vectors hold far less of a long text than keys and values do, and learn it more slowly (--kind deep)."
            )
        )
    splits = questions_of(source, settings, lm, on_event)
    began_learning = time.perf_counter()
    learned = learn_from(teacher, splits, settings, on_event=on_event, resume=resume)
    result = learned.result
    test = splits.test or splits.validation
    asked = test[:JUDGED_QUESTIONS] if source.layout.target is None else test
    # With a target answers may be longer than those that were learned, so they are not the same ones.
    known = learned.judged[: len(asked)] if source.layout.target is None and not splits.test else ()
    lessons = known if [lesson.question for lesson in known] == list(asked) else ()
    near = nearness(teacher, result.prompt, asked, settings.distil.answer_tokens, lessons)
    return DistilResult(
        result.prompt,
        path=result.path,
        base=lm.name,
        context_positions=teacher.context_positions,
        virtual_tokens=settings.distil.length,
        questions=len(splits.train),
        held_out=len(test),
        judged=near.judged,
        kl_base=learned.kl_base,
        kl_start=learned.kl_start,
        kl=learned.kl,
        agreement=near.agreement,
        agreement_base=near.agreement_base,
        agreement_sure=near.agreement_sure,
        sure=near.sure,
        gold_context=near.right_context,
        gold_prompt=near.right_prompt,
        gold_base=near.right_base,
        milliseconds_saved=milliseconds_saved(teacher, result.prompt),
        seconds_teacher=learned.seconds_teacher + began_learning - began,
        seconds_start=learned.seconds_start,
        seconds=time.perf_counter() - began,
        steps=learned.steps,
        peak_memory_bytes=result.peak_memory_bytes,
        prompt_bytes=result.prompt_bytes,
    )
