"""Distillation: a long context becomes a short prompt, without labels, by learning what the base says under the context.

The frozen base is teacher and student at once (context distillation: Snell et al. 2022; Cartridges, arXiv 2506.06266). The
context is read once; the teacher's answers and its likeliest tokens at every position of them are stored once; the
student then learns from rows that hold the question alone, as any prompt does.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY
from softprompt.base.rotary import rotary_of
from softprompt.data.batch import Batch, EncodedSet
from softprompt.data.encoded import Encoded, EncodedRows
from softprompt.data.example import Example, Message, Splits
from softprompt.data.shots import drawn_shots
from softprompt.data.source import load_splits
from softprompt.data.template import Field, Soft, Template, Text
from softprompt.errors import BaseError, DataError
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.fast import FastLoss
from softprompt.loss.soft_targets import SoftTargets, soft_cross_entropy
from softprompt.progress.events import Event, Note
from softprompt.progress.shown import shown
from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain, Prompt
from softprompt.tuning.compaction import compact, moved
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.questions import parts_of, write_questions
from softprompt.tuning.recipe import Data, PromptSettings, Recipe
from softprompt.tuning.settle import fast_loss, settled_batch_size, settled_rate
from softprompt.tuning.task import Task
from softprompt.tuning.teacher import Answer, Teacher, Teachers, teacher_of

JUDGED_QUESTIONS = 64  # held-out questions that are answered for the agreement
COMPACTION_ROWS = 48  # questions and answers whose queries say which keys matter
QUESTION_SHARE = (
    8  # of the base's positions, that much is left for a question where a document is cut into parts
)
OWN_HELD_OUT = 0.2  # of questions that the base wrote


@dataclass(frozen=True)
class DistilResult:
    """The short prompt, and how near it comes to the long context. Divergences are KL(teacher || student) in nats a token of
    the teacher's answers to held-out questions; agreement is the share of those questions that get the same greedy
    answer. A figure that is not known is nan."""

    prompt: Prompt = field(repr=False)
    path: str
    base: str
    context_positions: int
    virtual_tokens: int
    questions: int
    held_out: int
    kl_base: float
    kl_start: float
    kl: float
    agreement: float
    agreement_base: float
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
            f"a token, {self.agreement:.0%} of {self.held_out} answers the same)"
        )


@dataclass(frozen=True)
class Lesson:
    """A question, the teacher's answer to it, and what it found likely at every token of that answer."""

    question: Example
    answer: Answer
    targets: SoftTargets


class DistilLoss:
    """KL divergence of the student from the teacher at every token of an answer, as a loss to learn with.

    The targets of a row are found by its number. Below zero only by rounding; 0 where the student is the teacher."""

    def __init__(self, fast: FastLoss, targets: Mapping[int, SoftTargets]) -> None:
        self.fast, self.targets = fast, targets

    def __call__(self, batch: Batch, prompt: Plain | None = None) -> Tensor:
        """Nats at every trained token, float32 [N]."""
        hidden_ND = self.fast.hidden(batch, prompt)
        wanted = SoftTargets.joined([self.targets[row] for row in batch.rows]).to(hidden_ND.device)
        return soft_cross_entropy(hidden_ND, wanted, self.fast.lm.head) - wanted.entropy_N


def distil(
    settings: DistilSettings,
    *,
    lm: FrozenLM | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    progress: bool | None = None,
    resume: bool = False,
) -> DistilResult:
    """Distils the long text that `settings` names into a short prompt, saved in `settings.out`.

    Killed at any moment, it continues with `resume` from its last checkpoint to the same result. Progress is shown in
    terminals and notebooks, unless `progress` is False. Raises the errors of
    softprompt.errors; DataError for an empty context, a context that fits into the prompt, or no questions."""
    with shown(on_event, progress) as show:
        return _distil(settings, lm, show, resume)


def _distil(
    settings: DistilSettings, lm: FrozenLM | None, on_event: Callable[[Event], None], resume: bool
) -> DistilResult:
    began = time.perf_counter()
    lm = lm or FrozenLM.load(
        settings.base,
        revision=settings.base_revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.distil.exact and rotary_of(lm) is None:
        raise BaseError(
            f"{lm.name}: has no rotary positions, so a shortened context cannot keep its distances exactly. "
            "Leave --exact out, or choose another base."
        )
    document = _document(settings)
    texts = [document] if settings.context.shots is not None else _parts(settings, lm, document)
    layout, splits = _questions(settings, lm, texts, on_event)
    if settings.context.shots is not None and isinstance(layout.pieces[-1], Field):
        # Examples are parted by a blank line, so an answer ends there: the prompt learns to stop as the block does.
        layout = Template((*layout.pieces, Text("\n\n")), layout.target)
    if settings.context.shots is not None:
        texts = [few_shot_text(splits.train, layout, settings.context.shots, settings.tune.seed)]
    teacher = Teachers(tuple(teacher_of(lm, _in_front(text, layout), layout) for text in texts))
    if len(texts) > 1:
        on_event(
            Note(
                f"The document is longer than {lm.name} reads at once: it is cut into {len(texts)} parts, and a question is "
                "answered by one of them."
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
    lessons = _lessons(teacher, splits.train, settings)
    judged = _lessons(teacher, splits.validation, settings, likeliest=True)
    taught = time.perf_counter()
    plan, form = _plan(settings, teacher, splits, lessons, judged), None
    if settings.distil.init != "vocabulary":
        form = FixedFirst(_context_start(settings, teacher, lessons))
    started = time.perf_counter()
    result = tune(plan.recipe, plan=plan, form=form, on_event=on_event, progress=False, resume=resume)
    test = splits.test or splits.validation
    agreement, agreement_base = _agreements(
        teacher, result.prompt, test[:JUDGED_QUESTIONS], settings.distil.answer_tokens
    )
    gold = _gold(teacher, result.prompt, test) if settings.data.target is not None else (math.nan,) * 3
    return DistilResult(
        result.prompt,
        path=result.path,
        base=lm.name,
        context_positions=teacher.context_positions,
        virtual_tokens=settings.distil.length,
        questions=len(splits.train),
        held_out=len(test),
        kl_base=result.nll_base,
        kl_start=result.nll_before,
        kl=result.nll_after,
        agreement=agreement,
        agreement_base=agreement_base,
        gold_context=gold[0],
        gold_prompt=gold[1],
        gold_base=gold[2],
        milliseconds_saved=_milliseconds_saved(teacher, result.prompt),
        seconds_teacher=taught - began,
        seconds_start=started - taught,
        seconds=time.perf_counter() - began,
        steps=result.steps,
        peak_memory_bytes=result.peak_memory_bytes,
        prompt_bytes=result.prompt_bytes,
    )


class FixedFirst(Form):
    """A prompt whose first row never moves: much attention rests on a context's first position, and learning is unsteady
    where that moves (Cartridges, section 3.2)."""

    def __init__(self, start: Plain) -> None:
        super().__init__(start)
        self.rest_PW = nn.Parameter(self.start_PW[1:].clone())

    def rows(self) -> Tensor:
        """The prompt as a matrix [P, W]."""
        return torch.cat([self.start_PW[:1], self.rest_PW])


def _questions(
    settings: DistilSettings, lm: FrozenLM, texts: Sequence[str], on_event: Callable[[Event], None]
) -> tuple[Template, Splits]:
    """The template around a question, and the questions in parts: to learn from, to choose by, to judge on."""
    data = settings.data
    if data.source is None:
        questions = _written_questions(settings, lm, texts, on_event)
        held = max(1, round(OWN_HELD_OUT * len(questions)))
        if len(questions) < 4:
            raise DataError(
                f"{lm.name} wrote {len(questions)} usable questions, wanted at least 4. Give questions with --data."
            )
        splits = Splits(questions[:-held], questions[-held:], (), "questions by the base")
    else:
        splits = load_splits(
            data.source,
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
    if data.template is not None:
        return Template.parse(data.template, target=data.target), splits
    chat = splits.train[0].messages is not None or bool(lm.tokenizer.chat_template)
    if chat and data.target is None:
        return Template.parse("{messages}"), _as_chats(splits)
    names = [name for name in splits.train[0].fields if name != data.target]
    question = "text" if "text" in names else names[0]
    if data.target is None:
        return Template((Field(question), Text("\n"))), splits
    return Template.parse(f"{{{question}}}\n{data.target}: {{{data.target}}}", target=data.target), splits


def _written_questions(
    settings: DistilSettings, lm: FrozenLM, texts: Sequence[str], on_event: Callable[[Event], None]
) -> tuple[Example, ...]:
    """Questions by the base about every part, numbered so that each falls to the teacher of its part."""
    data, questions = settings.data, list[Example]()
    empty = repeated = 0
    for place, text in enumerate(texts):
        written = write_questions(lm, text, math.ceil(data.written / len(texts)), seed=data.seed)
        empty, repeated = empty + written.empty, repeated + written.repeated
        questions += [
            replace(question, row=len(texts) * n + place) for n, question in enumerate(written.questions)
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
        return given
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{given}: cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error


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


def _in_front(text: str, layout: Template) -> str:
    """The context in front of a question: its own turn in a chat, else separated by a blank line."""
    return text if layout.chat or text.endswith("\n") or not text.strip() else f"{text}\n\n"


def few_shot_text(train: Sequence[Example], layout: Template, count: int, seed: int) -> str:
    """`count` training rows with their answers, one after another, each answer about as often as the others."""
    chosen = drawn_shots(train, lambda example: example.fields[str(layout.target)], count, seed)
    return "".join(_written_out(layout, example) for example in chosen)


def _written_out(layout: Template, example: Example) -> str:
    return "".join(
        piece.text if isinstance(piece, Text) else example.fields[piece.name]
        for piece in layout.pieces
        if isinstance(piece, Text | Field)
    )


def _lessons(
    teacher: Teachers, questions: Sequence[Example], settings: DistilSettings, *, likeliest: bool = False
) -> list[Lesson]:
    """The teacher's answers to every question; `likeliest` ones alone are what a student is judged by.

    With `gold`, the answer is the row's own, and its tokens get that share of the targets."""
    distil = settings.distil
    k = distil.teacher_top_k or None
    if distil.gold:
        answers = [[teacher.of(question).gold(question)] for question in questions]
    else:
        drawn = not likeliest and distil.temperature > 0
        decode = DecodeSettings(
            max_new_tokens=distil.answer_tokens,
            temperature=distil.temperature if drawn else 0.0,
            n=distil.answers if drawn else 1,
            seed=settings.tune.seed,
        )
        answers = teacher.answers(questions, decode)
    pairs = [
        (question, answer)
        for question, own in zip(questions, answers, strict=True)
        for answer in own
        if answer.ids
    ]
    targets = teacher.targets([(question, answer.ids) for question, answer in pairs], k)
    if distil.gold and not likeliest:
        targets = [
            target.mixed(torch.tensor(answer.ids, device=target.ids_Nk.device), distil.gold)
            for target, (_, answer) in zip(targets, pairs, strict=True)
        ]
    return [
        Lesson(question, answer, target) for (question, answer), target in zip(pairs, targets, strict=True)
    ]


def _plan(
    settings: DistilSettings,
    teacher: Teachers,
    splits: Splits,
    lessons: Sequence[Lesson],
    judged: Sequence[Lesson],
) -> Plan:
    """A plan whose rows are questions with the teacher's answers, and whose loss is the divergence from the teacher."""
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
        out=settings.out,
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
        train, held_out = ([_with_slot(row, length) for row in part] for part in (train, held_out))
    targets = {n: lesson.targets for n, lesson in enumerate(everything)}
    batch_size = settled_batch_size(recipe)
    steps = tune.epochs * math.ceil(len(train) / batch_size)
    return Plan(
        recipe=recipe,
        lm=lm,
        loss=DistilLoss(fast_loss(recipe, lm), targets),
        task=task,
        train=EncodedSet(EncodedRows(train)),
        held_out=held_out,
        held_out_base=[
            teacher.of(one.question).student_row(one.question, one.answer.ids, len(lessons) + n)
            for n, one in enumerate(judged)
        ],
        judged_on="validation",
        learning_rate=settled_rate(recipe, lm),
        batch_size=batch_size,
        steps=min(steps, tune.max_steps or steps),
    )


def _with_slot(row: Encoded, length: int) -> Encoded:
    """The row with the soft prompt's positions in front."""
    return replace(
        row,
        ids=[*[0] * length, *row.ids],
        soft=[*range(length), *row.soft],
        trained=[*[False] * length, *row.trained],
    )


def _context_start(settings: DistilSettings, teacher: Teachers, lessons: Sequence[Lesson]) -> Plain:
    """Keys and values that a deep prompt starts from, out of the context's own."""
    starts, offset = [], 0
    for place, part in enumerate(teacher.parts):
        # Every part gets its share of the positions; its keys are turned to their positions among the others.
        length = settings.distil.length * (place + 1) // len(teacher.parts) - offset
        own = [lesson for lesson in lessons if teacher.of(lesson.question) is part]
        starts.append(moved(teacher.lm, _part_start(settings, part, own, length), offset))
        offset += length
    return tuple(torch.cat(layers, 1) for layers in zip(*starts, strict=True))


def _part_start(settings: DistilSettings, part: Teacher, lessons: Sequence[Lesson], length: int) -> Plain:
    """Keys and values of `length` positions out of one part's own, as if they were at the front."""
    state = part.compiled.state
    if settings.distil.init == "first":
        first = state.first(length)
        return tuple(
            torch.stack([layer.transpose(0, 1) for layer in layers]).float().cpu()
            for layers in (first.keys, first.values)
        )
    order = random.Random(f"compaction/{settings.tune.seed}").sample(range(len(lessons)), len(lessons))
    rows = []
    for n in order[:COMPACTION_ROWS]:
        marks = part.compiled.marks(part.lm, part.example(lessons[n].question))
        rows.append([*marks[part.context_positions :], *lessons[n].answer.ids])
    return compact(part.lm, state, rows, length, ridge=settings.distil.ridge).plain


def _agreements(
    teacher: Teachers, prompt: Prompt, questions: Sequence[Example], answer_tokens: int
) -> tuple[float, float]:
    """The share of questions that prompt and bare base answer as the teacher does, greedily, token for token, in as many
    tokens as answers were learned."""
    decode = DecodeSettings(max_new_tokens=answer_tokens)
    wanted = [own[0].ids for own in teacher.answers(questions, decode)]
    bare = compile_prompt(teacher.lm, None, template=teacher.layout)
    shares = []
    for compiled in (compile_prompt(teacher.lm, prompt), bare):
        answers = [found.token_ids for found in generate(teacher.lm, questions, compiled, decode)]
        shares.append(sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted))
    return shares[0], shares[1]


def _gold(teacher: Teachers, prompt: Prompt, questions: Sequence[Example]) -> tuple[float, float, float]:
    """The share of right answers of the long context, of the prompt and of the bare base."""
    decode = DecodeSettings(max_new_tokens=32)
    target = str(teacher.layout.target)
    bare = compile_prompt(teacher.lm, None, template=teacher.layout)
    written = [[own[0].text for own in teacher.answers(questions, decode)]]
    for compiled in (compile_prompt(teacher.lm, prompt), bare):
        written.append([answer.text for answer in generate(teacher.lm, questions, compiled, decode)])
    right = [
        sum(
            _first_line(text) == question.fields[target].strip()
            for text, question in zip(texts, questions, strict=True)
        )
        for texts in written
    ]
    return right[0] / len(questions), right[1] / len(questions), right[2] / len(questions)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _milliseconds_saved(teacher: Teachers, prompt: Prompt) -> float:
    """The time by which a request that reads everything from the start can begin to answer earlier: the median of three."""
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for place, length in enumerate((teacher.context_positions, prompt.length)):
            marks = tuple(1 % teacher.lm.vocab_size for _ in range(length))
            started = time.perf_counter()
            with torch.inference_mode():
                prefill(teacher.lm, [PrefillRow(EMPTY, marks)])
            times[place].append(1000 * (time.perf_counter() - started))
    return statistics.median(times[0]) - statistics.median(times[1])
