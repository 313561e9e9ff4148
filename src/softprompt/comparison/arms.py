"""The arms: each makes, from the same task, something that answers requests. A function each, by name in ARMS."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison import weights
from softprompt.comparison.settings import DEFAULT_RATES, Job
from softprompt.data.example import Example, Splits
from softprompt.data.template import Template
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import wanted_text, written_out
from softprompt.evaluation.predictor import text_prompt, without_slots
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.artifact import prompt_bytes
from softprompt.tuning.events import Event, Started, Stepped, Validated
from softprompt.tuning.loop import Tuned, tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan

PROBED_STEPS = 4


@dataclass(frozen=True)
class Task:
    """What every arm is given: the base, the rows, the task's template, and the job's settings."""

    lm: FrozenLM
    splits: Splits
    layout: Template
    job: Job
    tell: Callable[[Event], None] = lambda event: None

    @property
    def recipe(self) -> Recipe:
        """The recipe with this arm's seed and folder."""
        tree = self.job.settings.recipe.model_dump()
        tree["tune"]["seed"] = self.job.seed
        tree["out"] = str(self.job.folder / "prompt")
        return Recipe(**tree)

    def rate(self, otherwise: float) -> float:
        """The learning rate that was asked for this arm."""
        return self.job.settings.rates.get(self.job.arm, otherwise)


@dataclass
class Ready:
    """An arm that can answer: a model, the compiled prompt it reads, and what it took.

    `in_front` is what stands before text of any other task when the arm is on. `restore` gives back the base's own
    model, switched off from the task; None where there is no such model any more.
    """

    lm: FrozenLM
    prompt: CompiledPrompt
    in_front: Prompt | str | None = None
    trained_parameters: int = 0
    stored_bytes: int = 0
    steps: int = 0
    best_step: int = 0
    learning_rate: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    restore: Callable[[], FrozenLM] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def base(task: Task) -> Ready:
    """Nothing is learned: the template without its slots."""
    lm = task.lm
    return Ready(lm, compile_prompt(lm, None, template=task.layout), restore=lambda: lm)


def prompt(task: Task) -> Ready:
    """The user's own text in front of every input."""
    return _text(task, task.job.settings.text or "")


def few_shot(task: Task) -> Ready:
    """Examples from the training rows in front, drawn by the seed; with labels, each as often as the others."""
    chosen = draw_examples(task.splits.train, task.layout, task.job.settings.shots, task.job.seed)
    plain = without_slots(task.layout)
    text = "".join(written_out(plain, one) + _answer(plain, one) + "\n" for one in chosen)
    return _text(task, text, rows=[one.row for one in chosen])


def soft(task: Task) -> Ready:
    """Prompt tuning, by the recipe."""
    return _tuned(task, "soft", task.recipe)


def deep(task: Task) -> Ready:
    """Keys and values for every layer; its slot moves to the front, the only place where it can stand."""
    tree = task.recipe.model_dump()
    length = task.layout.soft_length
    tree["data"]["template"] = f"{{soft:{length}}}{without_slots(task.layout)}"
    tree["prompt"] |= {"kind": "deep", "length": length}
    if "deep" not in task.job.settings.rates:
        tree["tune"]["learning_rate"] = "auto"
    return _tuned(task, "deep", Recipe(**tree))


def lora(task: Task) -> Ready:
    """Low-rank updates by PEFT, kept apart from the base's weights so that the base stays shared."""
    lm = task.lm
    plan = make_plan(_within_seconds(task, _lora_probe), lm=lm, splits=task.splits)
    rate = task.rate(DEFAULT_RATES["lora"])
    told = _Told(task.tell)
    model, trained = weights.with_lora(lm, task.job.seed)
    best = weights.learn_weights(
        plan,
        trained,
        lambda batch: weights.plain_nll(model, batch),
        lambda: weights.held_out(lm.model, plan),
        rate,
        task.job.folder / "best.pt",
        told,
    )
    folder = task.job.folder / "lora"
    model.save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size

    def restore() -> FrozenLM:
        model.unload()
        return lm

    adapted = weights.served(lm.model, lm)
    return Ready(
        adapted,
        compile_prompt(adapted, None, template=task.layout),
        trained_parameters=sum(weight.numel() for weight in trained),
        stored_bytes=size,
        steps=plan.steps,
        best_step=best,
        learning_rate=rate,
        curve=told.curve,
        validation=told.validation,
        restore=restore,
        about={"rank": weights.LORA_RANK},
    )


def full(task: Task) -> Ready:
    """Every weight of a copy, in float32; it then serves in the base's own number format."""
    plan = make_plan(_within_seconds(task, _full_probe), lm=task.lm, splits=task.splits)
    rate = task.rate(DEFAULT_RATES["full"])
    told = _Told(task.tell)
    model = weights.trainable_copy(task.lm)
    trained = list(model.parameters())

    best = weights.learn_weights(
        plan,
        trained,
        lambda batch: weights.plain_nll(model, batch),
        lambda: weights.held_out(model, plan),
        rate,
        task.job.folder / "best.pt",
        told,
    )
    model.to(task.lm.dtype)
    served = weights.served(model, task.lm)
    return Ready(
        served,
        compile_prompt(served, None, template=task.layout),
        trained_parameters=sum(weight.numel() for weight in trained),
        stored_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        steps=plan.steps,
        best_step=best,
        learning_rate=rate,
        curve=told.curve,
        validation=told.validation,
    )


ARMS: dict[str, Callable[[Task], Ready]] = {
    "base": base,
    "prompt": prompt,
    "few-shot": few_shot,
    "soft": soft,
    "deep": deep,
    "lora": lora,
    "full": full,
}


def draw_examples(train: Sequence[Example], layout: Template, count: int, seed: int) -> list[Example]:
    """`count` training rows by `seed`. Where answers repeat, one of each answer in turn; else any rows."""
    if layout.chat:
        raise DataError(
            "The arm few-shot writes examples as text, which a chat template does not take. Leave it out."
        )
    rng = random.Random(f"few-shot/{seed}")
    shuffled = list(train)
    rng.shuffle(shuffled)
    by_answer: dict[str, list[Example]] = {}
    for one in shuffled:
        by_answer.setdefault(wanted_text(layout, one), []).append(one)
    chosen: list[Example] = []
    while len(chosen) < min(count, len(shuffled)):
        for rows in by_answer.values():
            if rows and len(chosen) < count:
                chosen.append(rows.pop())
    rng.shuffle(chosen)
    return chosen


def _text(task: Task, text: str, **about: Any) -> Ready:
    lm = task.lm
    return Ready(
        lm,
        text_prompt(lm, task.layout, text, name=task.job.arm),
        in_front=text,
        stored_bytes=len(text.encode()),
        restore=lambda: lm,
        about={"text": text, **about},
    )


def _answer(plain: Template, example: Example) -> str:
    """The target as text; all text is written out already where there is none."""
    return wanted_text(plain, example) if plain.target is not None else ""


def _tuned(task: Task, kind: str, recipe: Recipe) -> Ready:
    tree = recipe.model_dump()
    tree["prompt"]["kind"] = kind
    if kind in task.job.settings.rates:
        tree["tune"]["learning_rate"] = float(task.job.settings.rates[kind])
    recipe = Recipe(**tree)

    def learn(steps: Recipe, tell: Callable[[Event], None]) -> Tuned:
        return tune(steps, lm=task.lm, splits=task.splits, on_event=tell)

    recipe = _within_seconds(task, lambda _, probe, tell: learn(probe, tell), recipe)
    told = _Told(task.tell)
    done = learn(recipe, told)
    record = done.record
    return Ready(
        task.lm,
        compile_prompt(task.lm, done.prompt),
        in_front=done.prompt,
        trained_parameters=told.trained or sum(one.numel() for one in done.prompt.tensors.values()),
        stored_bytes=prompt_bytes(recipe.out),
        steps=int(record["steps"]),
        best_step=int(record["best_step"]),
        learning_rate=float(record["learning_rate"]),
        curve=told.curve,
        validation=told.validation,
        restore=lambda: task.lm,
        about={"path": recipe.out, "virtual_tokens": done.prompt.length, "learned": done.prompt},
    )


class _Told:
    """Keeps a run's curve and passes every event on."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell
        self.trained = 0
        self.curve: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.times: list[float] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.trained = event.prompt_values
            case Stepped():
                self.times.append(time.perf_counter())
                self.curve.append({"step": event.step, "nll": event.nll})
            case Validated():
                self.validation.append({"step": event.step, "nll": event.nll})
            case _:
                pass
        self.tell(event)


Probe = Callable[[Task, Recipe, Callable[[Event], None]], Any]


def _within_seconds(task: Task, probe: Probe, recipe: Recipe | None = None) -> Recipe:
    """The recipe with as many steps as fit into the time allowed, by the pace of a few; unchanged without one."""
    recipe = recipe or task.recipe
    seconds = task.job.settings.seconds
    if seconds is None:
        return recipe
    tree = recipe.model_dump()
    tree["tune"]["max_steps"] = PROBED_STEPS
    tree["out"] = str(task.job.folder / "pace")
    told = _Told(lambda event: None)
    probe(task, Recipe(**tree), told)
    pace = (told.times[-1] - told.times[0]) / max(1, len(told.times) - 1)
    tree = recipe.model_dump()
    steps = max(1, int(seconds / max(pace, 1e-6)))
    rows = len(task.splits.train)
    batch = 8 if recipe.tune.batch_size == "auto" else recipe.tune.batch_size
    tree["tune"] |= {"max_steps": steps, "epochs": math.ceil(steps / math.ceil(rows / batch))}
    return Recipe(**tree)


def _lora_probe(task: Task, recipe: Recipe, tell: Callable[[Event], None]) -> None:
    plan = make_plan(recipe, lm=task.lm, splits=task.splits)
    model, trained = weights.with_lora(task.lm, task.job.seed)
    _probe_weights(plan, trained, lambda batch: weights.plain_nll(model, batch), task, tell)
    model.unload()


def _full_probe(task: Task, recipe: Recipe, tell: Callable[[Event], None]) -> None:
    plan = make_plan(recipe, lm=task.lm, splits=task.splits)
    model = weights.trainable_copy(task.lm)
    _probe_weights(plan, list(model.parameters()), lambda batch: weights.plain_nll(model, batch), task, tell)


def _probe_weights(
    plan: Plan, trained: list[Any], nll: weights.Nll, task: Task, tell: Callable[[Event], None]
) -> None:
    weights.learn_weights(plan, trained, nll, lambda: 0.0, 1e-9, task.job.folder / "pace.pt", tell)
