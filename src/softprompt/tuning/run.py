"""A run in progress: the rows of each step, when to validate and to write a checkpoint, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softprompt.base.hardware import peak_memory_bytes
from softprompt.base.processes import Processes
from softprompt.data.batch import epoch_order
from softprompt.data.encoded import Encoded
from softprompt.errors import NotFinite
from softprompt.loss.gradient import Gradients, positions_read
from softprompt.loss.mean import BaseLosses
from softprompt.progress.events import BatchHalved, Event, Saved, Started, Stepped, Stopped, Validated
from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain, Prompt, prompt_of
from softprompt.store.artifact import prompt_bytes, save_prompt
from softprompt.store.json_values import plain
from softprompt.tuning.checkpoint import Checkpoints, demand_same, identity
from softprompt.tuning.find_rate import find_rate
from softprompt.tuning.keep import Keeper
from softprompt.tuning.learner import Learner, is_finite
from softprompt.tuning.plain_reading import plain_reading
from softprompt.tuning.plan import Plan
from softprompt.tuning.rate import (
    TRIED_STEPS,
    FirstGradient,
    measured_rate,
    take_back_last_step,
    try_last_step,
)
from softprompt.tuning.records import versions
from softprompt.tuning.result import TuneResult
from softprompt.tuning.run_log import RunLog
from softprompt.tuning.scores import SCORES
from softprompt.tuning.starts import start


class Run:
    """Joins what is learned (`learner`), from what (`plan`), and what is recorded (`log`)."""

    def __init__(
        self,
        plan: Plan,
        on_event: Callable[[Event], None],
        form: Form | None = None,
        *,
        shares_a_part: bool = False,
        processes: Processes | None = None,
        base_losses: BaseLosses | None = None,
    ) -> None:
        self.plan = plan
        self.base_losses = base_losses or BaseLosses()
        tune = plan.recipe.tune
        out = Path(plan.recipe.out)
        self.learner = Learner(form or start(plan), tune, plan.learning_rate, plan.steps, plan.lm.device)
        self.learner.length.promises_all = plan.steps_promise_all
        # No task may move what others share a second time.
        if tune.learning_rate == "auto" and not shares_a_part:
            self.learner.length.tried_steps = TRIED_STEPS
        self.processes = processes or Processes()
        self.gradients = Gradients(
            plan.loss, plan.batch_size, self._halved, self.processes, positions_read(plan.lm.device)
        )
        self.keeper = Keeper(plan) if tune.keep else None
        self.log = RunLog(plan.recipe, on_event)
        self.checkpoints = Checkpoints(out, tune, self.log.note)
        self.nll_base = math.nan
        self._first: FirstGradient | None = None  # until the first step, where the rate was measured by it
        self.shares_a_part = shares_a_part
        self.ending = "finished"

    @property
    def steps_done(self) -> int:
        """Optimiser steps taken so far."""
        return self.learner.steps_done

    def close(self) -> None:
        """Closes the records."""
        self.log.close()

    def newest_checkpoint(self, identity: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """The newest checkpoint in this run's folder, or None, with a note, if there is none.

        One of another run (with another `identity`, by default this run's) is refused before any file is changed."""
        self.log.folder.own()
        state = self.checkpoints.newest()
        if state is None:
            self.log.note(
                f"{self.checkpoints.folder}: holds no checkpoint, so the run starts from the beginning."
            )
        else:
            demand_same(state["run"], identity or self.identity(), self.plan.recipe.out)
        return state

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Starts the records, then measures the base and the start, or continues the killed run of checkpoint `state`."""
        self.log.begin(state["recorded_bytes"] if state and self.processes.first else 0)
        if state:
            self._continue_from(state)
        else:
            self._begin_new()

    def _begin_new(self) -> None:
        held_out = self.plan.held_out_base
        at_a_time = self.gradients.rows_read(held_out)
        self.nll_base = self.base_losses.nll(self.plan.loss, held_out, batch_size=at_a_time)
        if isinstance(self.plan.recipe.tune.learning_rate, str):
            measured = measured_rate(self.plan, self.gradients, self.learner.form)
            length = self.learner.length
            if not self.shares_a_part:  # the first step of such a part takes the gradients of all tasks
                self._first = measured.first
            length.learning_rate, length.reachable_nll = measured.lowest, measured.reachable_nll
            length.highest_rate = self.plan.learning_rate
            if self.plan.recipe.tune.learning_rate == "find":
                search = find_rate(self.plan, self.gradients, measured.rate)
                length.learning_rate = length.highest_rate = search.rate
                self.log.note(str(search))
        self._announce()
        self.validate()

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self.learner.restore(state["learner"])
        self.gradients.rows = state["rows_at_a_time"]
        self.nll_base = state["nll_base"]
        self.log.restore(state)
        self._announce()
        self.log.note(f"Continues after step {self.steps_done} of {self.plan.steps}.")

    def batches(self) -> Iterator[list[Encoded]]:
        """The rows of every step that is still to come, epoch by epoch, until patience ends."""
        plan, encoded = self.plan, self.plan.train.encoded
        while self.steps_done < plan.steps:
            epoch, done = divmod(self.steps_done, plan.steps_per_epoch)
            order = epoch_order(plan.train.lengths, plan.batch_size, seed=plan.recipe.tune.seed, epoch=epoch)
            for indices in order[done:]:
                if self.at_its_end:
                    return
                if self.learner.out_of_patience:
                    self.ending = "patience"
                    return
                self.log.step_begins()
                yield [encoded[index] for index in indices]

    def take_known_gradient(self) -> float | None:
        """Where the rate was measured by the gradient of the first step's rows, gives it to the form at that step; the mean loss of the
        rows, in nats per trained token. Else, and at all other steps, None."""
        first, self._first = self._first, None
        if first is None:
            return None
        for parameter, gradient in zip(self.learner.parameters, first.gradients, strict=True):
            parameter.grad = gradient
        self.log.seconds_learning += first.seconds
        return first.nll

    def try_last_step(self) -> None:
        """Tries the length of one of the first steps on the rows of the next one, and corrects it and the rate."""
        if self.learner.is_tried and not self.at_its_end:
            nll_of = self._nll_of(self._rows_of(self.steps_done))
            try_last_step(self.learner, nll_of, self.plan.learning_rate)

    def doubt_last_step(self, rows: Sequence[Encoded], nll: float) -> float:
        """Takes most of the last step back where it threw the loss `nll` of the coming step's `rows`; the loss that their
        gradient then belongs to."""
        learner, usual_nll = self.learner, self.learner.length.usual_nll
        if not learner.is_doubted(nll) or not take_back_last_step(learner, nll, self._nll_of(rows)):
            return nll
        self.log.note(
            f"Step {self.steps_done}: lifted the loss of the next rows to {nll:.4f}, where batches had {usual_nll:.4f}. Most of "
            f"the step was taken back, learning rate lowered to {learner.length.learning_rate:.2g}."
        )
        for parameter in learner.parameters:
            parameter.grad = None
        return self.gradients([learner.form], [rows])[0]

    def _nll_of(self, rows: Sequence[Encoded]) -> Callable[[Plain], float]:
        return lambda prompt: self.gradients.losses([prompt], [rows])[0]

    def _rows_of(self, step: int) -> list[Encoded]:
        """The rows of a step, counted from 0."""
        plan = self.plan
        epoch, index = divmod(step, plan.steps_per_epoch)
        order = epoch_order(plan.train.lengths, plan.batch_size, seed=plan.recipe.tune.seed, epoch=epoch)
        return [plan.train.encoded[number] for number in order[index]]

    def add_keep_gradient(self) -> None:
        """Adds the pull towards the bare base on general text to the form's gradient, where `tune.keep` asks for it."""
        if self.keeper is not None:
            self.keeper.add_gradient(self.learner.form, self.steps_done)

    def record_step(self, rows: Sequence[Encoded], nll: float, seconds: float | None = None) -> None:
        """Records a step that was taken on `rows`; `seconds` is its share of a pass that several runs take together."""
        plan = self.plan
        pace = self.log.count(sum(slot < 0 for row in rows for slot in row.soft), seconds)
        tokens_left = plan.text_tokens * plan.steps / plan.steps_per_epoch - self.log.tokens
        self.log(
            Stepped(
                step=self.steps_done,
                steps=plan.steps,
                epoch=self.steps_done / plan.steps_per_epoch,
                nll=nll,
                learning_rate=self.learner.rate_taken,
                tokens_per_second=pace,
                remaining_seconds=max(0.0, tokens_left / pace),
            )
        )

        if self.learner.diverges() and not self.at_its_end:
            self._go_back(f"training loss {sum(self.learner.recent) / len(self.learner.recent):.4f}")

    def _go_back(self, loss: str) -> None:
        """Lowers the rate and returns to the best prompt, unless tasks share a part, which no one of them may undo."""
        if self.shares_a_part:
            return
        self.learner.go_back()
        self.log.note(
            f"Step {self.steps_done}: {loss} is above the start's {self.learner.nll_start:.4f}. Back to the prompt of "
            f"step {self.learner.best_step}, learning rate lowered to {self.learner.length.highest_rate:.2g}."
        )

    @property
    def validation_is_due(self) -> bool:
        """Whether to validate: after the last step, and during the run where there are held-out rows."""
        on_the_way = (
            self.plan.judged_on == "validation" and self.steps_done % self.plan.valid_every_steps == 0
        )
        return on_the_way or self.at_its_end

    @property
    def at_its_end(self) -> bool:
        """Whether all steps of the plan are done."""
        return self.steps_done == self.plan.steps

    def validate(self) -> None:
        """Measures held-out loss, and keeps the prompt if it is the best so far (or the last, with none held out)."""
        prompt = self.learner.snapshot()
        (nll,) = self.gradients.losses([prompt], [self.plan.held_out])
        self.record_validation(nll, prompt)

    def record_validation(self, nll: float, prompt: Plain) -> None:
        """Records the held-out loss of `prompt`, and keeps it if it is the best so far."""
        plan, select = self.plan, self.plan.recipe.tune.select
        score = math.nan
        if select in SCORES:
            score = SCORES[select](plan.lm, plan.held_out, prompt, self.gradients.rows)
        best = self.learner.note_validation(nll, prompt, score=score, always=plan.judged_on == "training")
        self.log(Validated(step=self.steps_done, nll=nll, best=best, score=score))
        if plan.judged_on == "validation" and not self.at_its_end and self.learner.diverges(nll):
            self._go_back(f"held-out loss {nll:.4f}")

    def checkpoint(self) -> None:
        """Writes a checkpoint if one is due, or the run at its end."""
        if self.at_its_end or self.checkpoints.due(self.steps_done):
            self.write_checkpoint()

    def write_checkpoint(self) -> None:
        """Writes a checkpoint now."""
        self.checkpoints.keep(self.steps_done, self.state())

    def state(self) -> dict[str, Any]:
        """All that another process needs to continue."""
        return {
            "run": self.identity(),
            "learner": self.learner.state(),
            "rows_at_a_time": self.gradients.rows,
            "nll_base": self.nll_base,
            **self.log.state(),
        }

    def identity(self) -> dict[str, str]:
        """Everything that must be equal for a checkpoint to belong to this run."""
        return identity(self.plan.recipe, self.plan.lm.fingerprint, self.plan.rows_sha256())

    def save(self, reason: str) -> TuneResult:
        """Writes the best prompt and its figures."""
        plan, learner = self.plan, self.learner
        if (
            plan.judged_on == "training"
            and learner.best_step < self.steps_done
            and is_finite(learner.snapshot())
        ):
            # Nothing is held out, so the latest is the best known.
            learner.best, learner.best_step, learner.nll_best = learner.snapshot(), self.steps_done, math.nan
        out = Path(plan.recipe.out)
        figures: dict[str, Any] = {
            "path": str(out),
            "base": plan.lm.name,
            "judged_on": plan.judged_on,
            "nll_base": self.nll_base,
            "nll_before": learner.nll_start,
            "nll_after": learner.nll_best,
            "best_step": learner.best_step,
            "steps": self.steps_done,
            "tokens": self.log.tokens,
            "seconds": self.log.seconds,
            "peak_memory_bytes": peak_memory_bytes(plan.lm.device),
            "selected_by": plan.recipe.tune.select,
            "score_before": learner.score_start,
            "score_after": learner.score_best,
            "learning_rate": learner.length.learning_rate,
            "batch_size": plan.batch_size,
            "accumulation": math.ceil(plan.batch_size / self.gradients.rows),
            "truncated_rows": plan.train.truncated,
            "dropped_rows": plan.train.dropped,
            "stopped": reason,
        }
        if learner.nll_best > self.nll_base:
            self.log.note(
                f"Worse than the base: the prompt's loss is {learner.nll_best:.4f}, that of the base alone "
                f"{self.nll_base:.4f}. Learn longer (tune.epochs), or from more rows."
            )
        prompt = as_prompt(plan, learner.best, figures, run=self.log.folder.run)
        save_prompt(prompt, out)
        result = TuneResult(prompt, **figures, prompt_bytes=prompt_bytes(out))
        self.log(Stopped(reason, self.steps_done, learner.best_step, learner.nll_best))
        self.log(Saved(result.path, result.prompt_bytes))
        return result

    def _halved(self, rows: int) -> None:
        self.log(BatchHalved(rows, math.ceil(self.plan.batch_size / rows)))

    def _announce(self) -> None:
        plan = self.plan
        self.log(
            Started(
                steps=plan.steps,
                epochs=plan.steps / plan.steps_per_epoch,
                batch_size=plan.batch_size,
                accumulation=math.ceil(plan.batch_size / self.gradients.rows),
                learning_rate=self.learner.length.learning_rate,
                examples=len(plan.train.encoded),
                validation_examples=plan.validation_examples,
                trained_tokens=plan.trained_tokens,
                prompt_values=self.learner.form.trained_values,
                baseline_nll=self.nll_base,
            )
        )
        for text in plan.remarks():
            self.log.note(text)

    def not_finite(self, rows: Sequence[Encoded], nll: float) -> NotFinite:
        """The error for a step on `rows` whose loss or gradient is not finite; names the rows that break it alone."""
        prompt = self.learner.snapshot()
        bad = [row.row for row in rows if not math.isfinite(self.gradients.losses([prompt], [[row]])[0])] or [
            row.row for row in rows
        ]
        best_step, out = self.learner.best_step, self.plan.recipe.out
        kept = f", and the prompt of step {best_step} is in {out}" if self.steps_done else ""
        return NotFinite(
            f"Step {self.steps_done + 1}: the loss or its gradient is not finite (loss {nll}, rate "
            f"{self.learner.rate:.3g}) on the rows {', '.join(map(str, bad))} of the data. The step was refused{kept}. "
            "Lower tune.learning_rate, or load the base with dtype: float32."
        )


def as_prompt(plan: Plan, learned: Plain, figures: Mapping[str, Any], *, run: str = "") -> Prompt:
    """A plain prompt with all that belongs to it: base, template, how it was made and what was measured.

    `run` is the id of the run, by which the records beside the prompt are known to be its own."""
    reading = plain_reading(plan)
    common: dict[str, Any] = {
        "base": plan.lm.fingerprint,
        "template": str(plan.template),
        "target": plan.template.target,
        "name": Path(plan.recipe.out).resolve().name,
        "notes": {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": {"source": plan.splits.source, "revision": plan.splits.revision},
            "metrics": {
                name: plain(value) for name, value in figures.items() if name not in ("path", "base")
            },
            "recipe": plan.recipe.model_dump(),
            "versions": versions(),
            **({"run": run} if run else {}),
            **({"plain_reading": asdict(reading)} if reading is not None else {}),
        },
    }
    return prompt_of(learned, **common)
