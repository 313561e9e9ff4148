"""An arm's pace: its curve as it learns, and the steps that fit into a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from softprompt.comparison import weights
from softprompt.comparison.assignment import Assignment
from softprompt.progress.events import Event, Started, Stepped, Validated
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan, settled_batch_size

PROBED_STEPS = 4


class CurveRecorder:
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


Probe = Callable[[Assignment, Recipe, Callable[[Event], None]], Any]


def within_seconds(assignment: Assignment, probe: Probe, recipe: Recipe | None = None) -> Recipe:
    """The recipe with as many steps as fit into the time allowed, by the pace of a few; unchanged without one."""
    recipe = recipe or assignment.recipe
    seconds = assignment.job.settings.seconds
    if seconds is None:
        return recipe
    tree = recipe.model_dump()
    tree["tune"]["max_steps"] = PROBED_STEPS
    tree["out"] = str(assignment.job.folder / "pace")
    recorder = CurveRecorder(lambda event: None)
    probe(assignment, Recipe(**tree), recorder)
    pace = (recorder.times[-1] - recorder.times[0]) / max(1, len(recorder.times) - 1)
    tree = recipe.model_dump()
    steps = max(1, int(seconds / max(pace, 1e-6)))
    rows = len(assignment.task.splits.train)
    batch = settled_batch_size(recipe)
    tree["tune"] |= {"max_steps": steps, "epochs": math.ceil(steps / math.ceil(rows / batch))}
    return Recipe(**tree)


def deep_recipe(assignment: Assignment, recipe: Recipe) -> Recipe:
    """The recipe for a deep prompt of the same length, in front of everything."""
    tree = recipe.model_dump()
    length = assignment.task.template.soft_length
    tree["data"]["template"] = f"{{soft:{length}}}{assignment.task.template.without_slots()}"
    tree["prompt"] |= {"kind": "deep", "length": length, "place": "front"}
    return Recipe(**tree)


def deep_probe(assignment: Assignment, recipe: Recipe, tell: Callable[[Event], None]) -> None:
    tune(
        deep_recipe(assignment, recipe),
        lm=assignment.lm,
        splits=assignment.splits,
        on_event=tell,
        progress=False,
    )


def lora_probe(assignment: Assignment, recipe: Recipe, tell: Callable[[Event], None]) -> None:
    plan = make_plan(recipe, lm=assignment.lm, splits=assignment.splits)
    model, trained = weights.with_lora(assignment.lm, assignment.job.seed)
    _probe_weights(plan, trained, lambda batch: weights.plain_nll(model, batch), assignment, tell)
    model.unload()


def full_probe(assignment: Assignment, recipe: Recipe, tell: Callable[[Event], None]) -> None:
    plan = make_plan(recipe, lm=assignment.lm, splits=assignment.splits)
    model = weights.trainable_copy(assignment.lm)
    _probe_weights(
        plan, list(model.parameters()), lambda batch: weights.plain_nll(model, batch), assignment, tell
    )


def _probe_weights(
    plan: Plan, trained: list[Any], nll: weights.Nll, assignment: Assignment, tell: Callable[[Event], None]
) -> None:
    weights.learn_weights(plan, trained, nll, lambda: 0.0, 1e-9, assignment.job.folder / "pace.pt", tell)
