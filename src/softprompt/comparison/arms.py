"""The arms: each makes, from the same task, something that answers requests. A function each, by name in MAKERS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison import weights
from softprompt.comparison.assignment import Assignment, PreparedArm
from softprompt.comparison.pace import (
    CurveRecorder,
    deep_probe,
    deep_recipe,
    full_probe,
    lora_probe,
    within_seconds,
)
from softprompt.data.example import Example
from softprompt.data.shots import drawn_shots
from softprompt.data.template import Template, Text
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import judge_rows, wanted_text, written_out
from softprompt.evaluation.metric import METRICS
from softprompt.evaluation.predictor import predictor
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.progress.events import Event
from softprompt.store.artifact import prompt_bytes
from softprompt.tuning.distil import learn_from
from softprompt.tuning.distil_settings import Context, DistilSettings, Learning, Questions
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.settle import make_plan
from softprompt.tuning.task import Task
from softprompt.tuning.teacher import Teacher, Teachers

CHOOSING_ROWS = 64  # training rows that a wording is chosen on, and whose answers tell how long answers are
HELD_OUT_PART = 5  # one training row in so many chooses the best step where there are no validation rows


def base(assignment: Assignment) -> PreparedArm:
    """The base alone: nothing is learned, the template has no slots."""
    lm = assignment.lm
    return PreparedArm(
        lm,
        compile_prompt(
            lm, None, template=assignment.task.template, special_tokens=assignment.task.special_tokens
        ),
        restore=lambda: lm,
    )


def wording(assignment: Assignment) -> PreparedArm:
    """The base under the wording that suits it best: the one of lowest loss on some training rows.

    A base may have read the task in one wording and never in another, so a figure under a single wording says little."""
    lm, task, settings = assignment.lm, assignment.task, assignment.job.settings
    compiled, losses, rows = best_wording(lm, task, settings.wordings, batch_rows=settings.batch_rows)
    return PreparedArm(
        lm,
        compiled,
        restore=lambda: lm,
        about={"template": str(compiled.template), "losses": losses, "rows": rows},
    )


def best_wording(
    lm: FrozenLM, task: Task, own: Sequence[str] = (), *, batch_rows: int = 32, rows: int = CHOOSING_ROWS
) -> tuple[CompiledPrompt, dict[str, float], int]:
    """The base alone under the candidate wording of lowest loss, the loss of each in nats per token, and the number of
    training rows they were measured on, of the first `rows`."""
    chosen_on = task.splits.train[:rows]
    metrics = [METRICS["nll"]]
    settings = JudgeSettings(batch_rows=batch_rows)
    losses: dict[str, float] = {}
    for template in candidate_wordings(task.template, own):
        alone = compile_prompt(lm, None, template=template, special_tokens=task.special_tokens)
        judged = judge_rows(
            predictor(lm, alone, template, metrics, settings, end=task.end), chosen_on, metrics, template
        )
        losses[str(template)] = judged.estimates["nll"].value
    best = Template.parse(min(losses, key=lambda source: losses[source]), target=task.template.target)
    return compile_prompt(lm, None, template=best, special_tokens=task.special_tokens), losses, len(chosen_on)


def prompt(assignment: Assignment) -> PreparedArm:
    """The user's own text in front of every input."""
    return _text(assignment, assignment.job.settings.text or "")


def few_shot(assignment: Assignment) -> PreparedArm:
    """Examples from the training rows in front, drawn by the seed; with labels, each as often as the others."""
    chosen, text, layout = _shots(assignment, assignment.job.seed)
    return _text(assignment, text, layout, rows=[example.row for example in chosen])


def context(assignment: Assignment) -> PreparedArm:
    """A long text in front of every input."""
    text, layout = _long_text(assignment)
    return _text(assignment, text, layout)


def soft(assignment: Assignment) -> PreparedArm:
    """Prompt tuning, by the recipe."""
    return _tuned(assignment, "soft", assignment.recipe)


def deep(assignment: Assignment) -> PreparedArm:
    """Keys and values for every layer; its slot moves to the front, the only place where it works."""
    recipe = deep_recipe(assignment, assignment.recipe)
    if "deep" not in assignment.job.settings.rates:
        recipe = recipe.changed(["tune.learning_rate=auto"])
    return _tuned(assignment, "deep", recipe)


def distil(assignment: Assignment) -> PreparedArm:
    """A deep prompt of the task's length that learns to answer as the base does under the long text, without labels."""
    lm, task = assignment.lm, assignment.task
    text, layout = _long_text(assignment)
    plain = task.template.without_slots()
    if plain.chat or plain.target is None:
        raise DataError(
            "The arm distil learns from answers to inputs, so it needs a template with a target. Leave it out, or use "
            "softprompt distil."
        )
    compiled = compile_prompt(lm, layout, name="context", special_tokens=task.special_tokens)
    teacher = Teachers((Teacher(lm, text, plain, compiled),))
    length = task.template.soft_length
    if length >= teacher.context_positions:
        raise DataError(
            f"The long text has {teacher.context_positions} positions, which fit into {length} virtual tokens. Give a "
            "longer one with --context or --shots, or set fewer prompt.length."
        )
    splits = assignment.splits
    if not splits.validation:  # some questions have to choose the best step
        held = max(1, len(splits.train) // HELD_OUT_PART)
        splits = replace(splits, train=splits.train[:-held], validation=splits.train[-held:])
    recipe = within_seconds(assignment, deep_probe)
    settings = DistilSettings(
        base=recipe.base,
        out=recipe.out,
        context=Context(document=text),
        data=Questions(target=plain.target),
        distil=Learning(
            length=length, answers=1, temperature=0.0, answer_tokens=_answer_tokens(assignment, plain)
        ),
        tune=recipe.tune.model_copy(
            update={"learning_rate": assignment.job.settings.rates.get("distil", "auto")}
        ),
    )
    recorder = CurveRecorder(assignment.tell)
    result = learn_from(teacher, splits, settings, on_event=recorder).result
    # No curve: its losses are divergences from the long text, which other arms' losses are no match for.
    return replace(_learned(assignment, result, recorder, text=text), curve=[], validation=[])


def lora(assignment: Assignment) -> PreparedArm:
    """Low-rank updates by PEFT, kept apart from the base's weights so that the base stays shared."""
    lm = assignment.lm
    plan = make_plan(within_seconds(assignment, lora_probe), lm=lm, splits=assignment.splits)
    rate = assignment.rate
    recorder = CurveRecorder(assignment.tell)
    model, trained = weights.with_lora(lm, assignment.job.seed)
    best = weights.learn_weights(
        plan,
        trained,
        lambda batch: weights.plain_nll(model, batch),
        lambda: weights.held_out(lm.model, plan),
        rate,
        assignment.job.folder / "best.pt",
        recorder,
    )
    folder = assignment.job.folder / "lora"
    model.save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size

    def restore() -> FrozenLM:
        model.unload()
        return lm

    adapted = weights.served(lm.model, lm)
    return PreparedArm(
        adapted,
        compile_prompt(
            adapted, None, template=assignment.task.template, special_tokens=assignment.task.special_tokens
        ),
        trained_parameters=sum(weight.numel() for weight in trained),
        stored_bytes=size,
        steps=plan.steps,
        best_step=best,
        learning_rate=rate,
        curve=recorder.curve,
        validation=recorder.validation,
        restore=restore,
        about={"rank": weights.LORA_RANK},
    )


def full(assignment: Assignment) -> PreparedArm:
    """Every weight of a copy, in float32; it then serves in the base's own dtype."""
    plan = make_plan(within_seconds(assignment, full_probe), lm=assignment.lm, splits=assignment.splits)
    rate = assignment.rate
    recorder = CurveRecorder(assignment.tell)
    model = weights.trainable_copy(assignment.lm)
    trained = list(model.parameters())

    best = weights.learn_weights(
        plan,
        trained,
        lambda batch: weights.plain_nll(model, batch),
        lambda: weights.held_out(model, plan),
        rate,
        assignment.job.folder / "best.pt",
        recorder,
    )
    model.to(assignment.lm.dtype)
    served = weights.served(model, assignment.lm)
    return PreparedArm(
        served,
        compile_prompt(
            served, None, template=assignment.task.template, special_tokens=assignment.task.special_tokens
        ),
        trained_parameters=sum(weight.numel() for weight in trained),
        stored_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        steps=plan.steps,
        best_step=best,
        learning_rate=rate,
        curve=recorder.curve,
        validation=recorder.validation,
    )


MAKERS: dict[str, Callable[[Assignment], PreparedArm]] = {
    "base": base,
    "wording": wording,
    "prompt": prompt,
    "few-shot": few_shot,
    "context": context,
    "soft": soft,
    "deep": deep,
    "distil": distil,
    "lora": lora,
    "full": full,
}


def _shots(assignment: Assignment, seed: int) -> tuple[list[Example], str, Template]:
    """Examples drawn by `seed`, their text, and the layout with them in front of an input."""
    task = assignment.task
    chosen = draw_examples(task.splits.train, task.template, assignment.job.settings.shots, seed)
    if task.chat is not None:  # examples are exchanges before the question, as a chat shows them
        layout = task.behind("", chosen)
        return chosen, "".join(piece.text for piece in layout.pieces[:1] if isinstance(piece, Text)), layout
    plain = task.template.without_slots()
    text = "".join(written_out(plain, example) + _answer(plain, example) + "\n" for example in chosen)
    return chosen, text, task.behind(text)


def _long_text(assignment: Assignment) -> tuple[str, Template]:
    """The text of the arms context and distil, the same for every seed, and the layout with it in front of an input."""
    path = assignment.job.settings.document
    if path is None:
        _, text, layout = _shots(assignment, seed=0)
        return text, layout
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--context {path}: cannot be read ({error}). Give a UTF-8 text file.") from error
    if not text.strip():
        raise DataError(f"--context {path}: found no text in it. Give the long text.")
    text = text if text.endswith("\n") else f"{text}\n"
    return text, assignment.task.behind(text)


def _answer_tokens(assignment: Assignment, plain: Template) -> int:
    """As many tokens as the longest of some right answers has, and a few for its end."""
    tokenizer = assignment.lm.tokenizer
    answers = {wanted_text(plain, example) for example in assignment.task.splits.train[:CHOOSING_ROWS]}
    return max(len(tokenizer(text, verbose=False)["input_ids"]) for text in answers) + 4


def candidate_wordings(template: Template, own: Sequence[str] = ()) -> list[Template]:
    """The task's own wording without slots, a few made from its fields, and the user's own.

    Without a target there is nothing to word: all of the text is wanted."""
    plain = template.without_slots()
    if template.target is None or template.chat:
        return [plain]
    target = template.target
    inputs = " ".join(f"{{{name}}}" for name in template.inputs)
    named = " ".join(f"{name.capitalize()}: {{{name}}}" for name in template.inputs)
    made = [f"{inputs} {target.capitalize()}: {{{target}}}", f"{inputs} -> {{{target}}}"]
    made.append(f"{named} {target.capitalize()}: {{{target}}}")
    parsed = [Template.parse(source, target=target) for source in (*made, *own)]
    return list(dict.fromkeys([plain, *(template.without_slots() for template in parsed)]))


def draw_examples(train: Sequence[Example], layout: Template, count: int, seed: int) -> list[Example]:
    """`count` training rows by `seed`. Where answers repeat, one of each answer in turn; else any rows."""
    if layout.chat:
        raise DataError(
            "The arm few-shot writes examples as text, which a chat template does not take. Leave it out."
        )
    return drawn_shots(train, lambda example: wanted_text(layout, example), count, seed)


def _text(assignment: Assignment, text: str, layout: Template | None = None, **about: Any) -> PreparedArm:
    lm = assignment.lm
    return PreparedArm(
        lm,
        compile_prompt(
            lm,
            layout or assignment.task.behind(text),
            name=assignment.job.arm,
            special_tokens=assignment.task.special_tokens,
        ),
        in_front=text,
        stored_bytes=len(text.encode()),
        restore=lambda: lm,
        about={"text": text, **about},
    )


def _answer(plain: Template, example: Example) -> str:
    """The target as text; all text is written out already if there is none."""
    return wanted_text(plain, example) if plain.target is not None else ""


def _tuned(assignment: Assignment, kind: str, recipe: Recipe) -> PreparedArm:
    tree = recipe.model_dump()
    tree["prompt"]["kind"] = kind
    if kind in assignment.job.settings.rates:
        tree["tune"]["learning_rate"] = float(assignment.job.settings.rates[kind])
    recipe = Recipe(**tree)

    def learn(steps: Recipe, tell: Callable[[Event], None]) -> TuneResult:
        return tune(steps, lm=assignment.lm, splits=assignment.splits, on_event=tell, progress=False)

    recipe = within_seconds(assignment, lambda _, probe, tell: learn(probe, tell), recipe)
    recorder = CurveRecorder(assignment.tell)
    done = learn(recipe, recorder)
    return _learned(assignment, done, recorder)


def _learned(
    assignment: Assignment, result: TuneResult, recorder: CurveRecorder, **about: Any
) -> PreparedArm:
    """The arm of a learned prompt."""
    return PreparedArm(
        assignment.lm,
        compile_prompt(assignment.lm, result.prompt),
        in_front=result.prompt,
        trained_parameters=recorder.trained
        or sum(tensor.numel() for tensor in result.prompt.tensors.values()),
        stored_bytes=prompt_bytes(result.path),
        steps=result.steps,
        best_step=result.best_step,
        learning_rate=result.learning_rate,
        curve=recorder.curve,
        validation=recorder.validation,
        restore=lambda: assignment.lm,
        about={
            "path": result.path,
            "virtual_tokens": result.prompt.length,
            "learned": result.prompt,
            **about,
        },
    )
