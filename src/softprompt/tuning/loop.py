"""Learning a prompt, on one page: batches, loss through the frozen base, the prompt's gradient, a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.hardware import peak_memory_bytes
from softprompt.data.batch import Encoded, epoch_order
from softprompt.data.example import Splits
from softprompt.errors import NotFinite
from softprompt.loss.gradient import Gradients, Loss
from softprompt.loss.mean import mean_nll
from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain, Prompt, prompt_of
from softprompt.store.artifact import prompt_bytes, save_prompt
from softprompt.tuning.checkpoint import Checkpoints, demand_same, identity
from softprompt.tuning.events import BatchHalved, Event, Said, Saved, Started, Stepped, Stopped, Validated
from softprompt.tuning.find_rate import find_rate
from softprompt.tuning.learner import Learner, is_finite
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.records import RunFolder, number_or_none, versions
from softprompt.tuning.scores import SCORES
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from softprompt.tuning.trackers import TRACKERS, Tracker, figures


@dataclass(frozen=True)
class Tuned:
    """The best prompt of a run, and the run's figures as plain data (losses in nats per trained token)."""

    prompt: Prompt
    record: dict[str, Any]


def tune(
    recipe: Recipe,
    *,
    lm: FrozenLM | None = None,
    splits: Splits | None = None,
    loss: Loss | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    resume: bool = False,
) -> Tuned:
    """Learn a prompt as `recipe` says and save the best validated one in `recipe.out`.

    `lm` and `splits` stand in for what the recipe would load, `loss` for FastLoss over the base. Held-out loss is measured before the first step too, so
    the result is never worse there than its start. On Ctrl-C, a loss that is not finite or any other failure, the
    best prompt so far is saved before the exception goes on. With `resume`, a run that was killed goes on from its
    last checkpoint, and ends as if nothing had happened. Raises the errors of softprompt.errors.
    """
    run = Run(make_plan(recipe, lm=lm, splits=splits, loss=loss), on_event)
    try:
        run.begin(run.newest() if resume else None)
        for rows in run.batches():
            run.learn_from(rows)
            if run.validation_is_due:
                run.validate()
            run.checkpoint()
        return run.save(run.ending)
    except BaseException as error:
        if run.step:  # else there is nothing worth keeping, and a former prompt in that folder stays
            run.save("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    finally:
        run.close()


class Run:
    """One run's moving parts: what is learned (`learner`), from what (`plan`), and what is told about it."""

    def __init__(self, plan: Plan, on_event: Callable[[Event], None], form: Form | None = None) -> None:
        self.plan, self.on_event = plan, on_event
        tune = plan.recipe.tune
        out = Path(plan.recipe.out)
        self.learner = Learner(form or start(plan), tune, plan.learning_rate, plan.steps)
        self.gradients = Gradients(plan.loss, plan.batch_size, self._halved)
        self.checkpoints = Checkpoints(out, tune, lambda text: self.tell(Said(text)))
        self.trackers: list[Tracker] = []
        self.folder = RunFolder(out, plan.recipe)
        self.began = time.perf_counter()
        self.tokens, self.seconds_learning, self.seconds_before = 0, 0.0, 0.0
        self.nll_base = math.nan
        self.ending = "finished"

    @property
    def step(self) -> int:
        """Steps done."""
        return self.learner.step

    def tell(self, event: Event) -> None:
        """Record an event, and hand it on."""
        trouble = self.folder(event)
        if told := figures(event):
            for tracker in self.trackers:
                tracker.log(told[1], told[0])
        self.on_event(event)
        if trouble:
            self.on_event(Said(trouble))

    def close(self) -> None:
        """Close the records."""
        self.folder.close()
        for tracker in self.trackers:
            tracker.close()

    def newest(self, identity: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """The newest checkpoint in this run's folder; where there is none, that is said. One of another run (with
        another `identity`, where that is not the run's own) is refused, and no file has been changed."""
        state = self.checkpoints.newest()
        if state is None:
            self.tell(
                Said(f"{self.checkpoints.folder}: no checkpoint to go on from, so the run starts anew.")
            )
        else:
            demand_same(state["run"], identity or self.identity(), self.plan.recipe.out)
        return state

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Measure the base and the start, or become the killed run that `state` was taken from. The records begin."""
        recipe = self.plan.recipe
        self.trackers = [TRACKERS[name](recipe) for name in recipe.tune.trackers]
        self.folder.begin(state["recorded_bytes"] if state else 0)
        if state:
            self.go_on(state)
        else:
            self.begin_anew()

    def begin_anew(self) -> None:
        """Measure the base and the start."""
        self.nll_base = mean_nll(self.plan.loss, self.plan.held_out_base, batch_size=self.gradients.rows)
        if self.plan.recipe.tune.learning_rate == "find":
            found = find_rate(self.plan, self.gradients)
            self.learner.learning_rate = found.rate
            self.tell(Said(str(found)))
        self._announce()
        self.validate()

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Become the run that `state` was taken from."""
        self.learner.restore(state["learner"])
        self.gradients.rows = state["rows_at_a_time"]
        self.nll_base, self.tokens = state["nll_base"], state["tokens"]
        self.seconds_learning, self.seconds_before = state["seconds_learning"], state["seconds"]
        self._announce()
        self.tell(Said(f"Goes on after step {self.step} of {self.plan.steps}."))

    def batches(self) -> Iterator[list[Encoded]]:
        """The rows of every step that is still to come, epoch by epoch, until patience ends."""
        plan, encoded = self.plan, self.plan.train.encoded
        while self.step < plan.steps:
            epoch, done = divmod(self.step, plan.steps_per_epoch)
            order = epoch_order(plan.train.lengths, plan.batch_size, seed=plan.recipe.tune.seed, epoch=epoch)
            for indices in order[done:]:
                if self.step == plan.steps:
                    return
                if self.learner.out_of_patience:
                    self.ending = "patience"
                    return
                yield [encoded[index] for index in indices]

    def learn_from(self, rows: Sequence[Encoded]) -> None:
        """One optimiser step on `rows`: the mean loss of their trained tokens, however they are split to fit."""
        began = time.perf_counter()
        (nll,) = self.gradients([self.learner.form], [rows])
        self.move(rows, nll, time.perf_counter() - began)

    def move(self, rows: Sequence[Encoded], nll: float, seconds: float) -> None:
        """The step itself, with the gradient at hand; refused where anything is not finite."""
        plan, learner, rate = self.plan, self.learner, self.learner.rate
        if not math.isfinite(nll) or not learner.move():
            raise NotFinite(self._not_finite(rows, nll, rate))
        self.tokens += sum(place < 0 for row in rows for place in row.soft)
        self.seconds_learning += seconds
        pace = self.tokens / self.seconds_learning
        ahead = plan.text_tokens * plan.steps / plan.steps_per_epoch - self.tokens
        self.tell(
            Stepped(
                step=self.step,
                steps=plan.steps,
                epoch=self.step / plan.steps_per_epoch,
                nll=nll,
                learning_rate=rate,
                tokens_per_second=pace,
                remaining_seconds=max(0.0, ahead / pace),
            )
        )

    @property
    def validation_is_due(self) -> bool:
        """After the last step; and on the way, where there are rows to judge by."""
        every = self.plan.recipe.tune.valid_every_steps or self.plan.steps_per_epoch
        on_the_way = self.plan.judged_on == "validation" and self.step % every == 0
        return on_the_way or self.at_its_end

    @property
    def at_its_end(self) -> bool:
        """Whether all steps of the plan are done."""
        return self.step == self.plan.steps

    def validate(self) -> None:
        """Measure held-out loss, and keep the prompt if it is the best so far (or the last, with none held out)."""
        prompt = self.learner.now()
        (nll,) = self.gradients.losses([prompt], [self.plan.held_out])
        self.judge(nll, prompt)

    def judge(self, nll: float, prompt: Plain) -> None:
        """Take note of the held-out loss of `prompt`."""
        plan, select = self.plan, self.plan.recipe.tune.select
        score = math.nan
        if select in SCORES:
            score = SCORES[select](plan.lm, plan.held_out, prompt, self.gradients.rows)
        best = self.learner.judge(nll, prompt, score=score, always=plan.judged_on == "training")
        self.tell(Validated(step=self.step, nll=nll, best=best, score=score))

    def checkpoint(self) -> None:
        """Keep all that a killed run needs, from time to time and after the last step."""
        if self.at_its_end or self.checkpoints.due(self.step):
            self.keep()

    def keep(self) -> None:
        """Write a checkpoint now."""
        self.checkpoints.keep(self.step, self.state())

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on."""
        return {
            "run": self.identity(),
            "learner": self.learner.state(),
            "rows_at_a_time": self.gradients.rows,
            "nll_base": self.nll_base,
            "tokens": self.tokens,
            "seconds_learning": self.seconds_learning,
            "seconds": self._seconds(),
            "recorded_bytes": self.folder.recorded_bytes,
        }

    def identity(self) -> dict[str, str]:
        """What makes this run the one that it is."""
        return identity(self.plan.recipe, self.plan.lm.fingerprint, self.plan.rows_sha256())

    def save(self, reason: str) -> Tuned:
        """Write the best prompt and tell where."""
        plan, learner = self.plan, self.learner
        if plan.judged_on == "training" and learner.best_step < self.step and is_finite(learner.now()):
            # Nothing is held out, so the latest is the best known.
            learner.best, learner.best_step, learner.nll_best = learner.now(), self.step, math.nan
        out = Path(plan.recipe.out)
        record: dict[str, Any] = {
            "path": str(out),
            "base": plan.lm.name,
            "judged_on": plan.judged_on,
            "nll_base": self.nll_base,
            "nll_before": learner.nll_start,
            "nll_after": learner.nll_best,
            "best_step": learner.best_step,
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": self._seconds(),
            "peak_memory_bytes": peak_memory_bytes(plan.lm.device),
            "selected_by": plan.recipe.tune.select,
            "score_before": learner.score_start,
            "score_after": learner.score_best,
            "learning_rate": learner.learning_rate,
            "batch_size": plan.batch_size,
            "accumulation": math.ceil(plan.batch_size / self.gradients.rows),
            "truncated_rows": plan.train.truncated,
            "dropped_rows": plan.train.dropped,
            "stopped": reason,
        }
        prompt = as_prompt(plan, learner.best, record)
        save_prompt(prompt, out)
        record["prompt_bytes"] = prompt_bytes(out)
        self.tell(Stopped(reason, self.step, learner.best_step, learner.nll_best))
        self.tell(Saved(str(out), record["prompt_bytes"]))
        return Tuned(prompt, record)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _halved(self, rows: int) -> None:
        self.tell(BatchHalved(rows, math.ceil(self.plan.batch_size / rows)))

    def _announce(self) -> None:
        plan = self.plan
        self.tell(
            Started(
                steps=plan.steps,
                epochs=plan.steps / plan.steps_per_epoch,
                batch_size=plan.batch_size,
                accumulation=math.ceil(plan.batch_size / self.gradients.rows),
                learning_rate=self.learner.learning_rate,
                examples=len(plan.train.encoded),
                validation_examples=len(plan.splits.validation),
                trained_tokens=plan.trained_tokens,
                prompt_values=sum(parameter.numel() for parameter in self.learner.parameters),
                baseline_nll=self.nll_base,
            )
        )
        for text in plan.remarks():
            self.tell(Said(text))

    def _not_finite(self, rows: Sequence[Encoded], nll: float, rate: float) -> str:
        """Which rows break the loss, seen one by one."""
        prompt = self.learner.now()
        bad = [row.row for row in rows if not math.isfinite(self.gradients.losses([prompt], [[row]])[0])] or [
            row.row for row in rows
        ]
        best_step, out = self.learner.best_step, self.plan.recipe.out
        kept = f", and the prompt of step {best_step} is in {out}" if self.step else ""
        return (
            f"Step {self.step + 1}: the loss or its gradient is not finite (loss {nll}, rate {rate:.3g}) on the rows "
            f"{', '.join(map(str, bad))} of the data. The step was refused{kept}. Lower tune.learning_rate, or load "
            "the base with dtype: float32."
        )


def as_prompt(plan: Plan, learned: Plain, record: dict[str, Any]) -> Prompt:
    """A plain prompt with all that belongs to it: base, template, how it was made and what was measured."""
    common: dict[str, Any] = {
        "base": plan.lm.fingerprint,
        "template": str(plan.template),
        "target": plan.template.target,
        "name": Path(plan.recipe.out).resolve().name,
        "notes": {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": {"source": plan.splits.source, "revision": plan.splits.revision},
            "metrics": {
                key: number_or_none(value) for key, value in record.items() if key not in ("path", "base")
            },
            "recipe": plan.recipe.model_dump(),
            "versions": versions(),
        },
    }
    return prompt_of(learned, **common)
