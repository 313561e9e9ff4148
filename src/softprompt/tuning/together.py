"""Many prompts in one pass: each row of a batch reads its own prompt, and the frozen base serves them all.

Every prompt has its own start, order of rows, schedule, clipping, optimiser and best step, so that each becomes what it
would have become alone (up to the rounding of sums in other batches). Those of `tune_tasks` share a part.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import demand_alone
from softprompt.data.encoded import Encoded
from softprompt.data.example import Splits
from softprompt.errors import NotFinite, RecipeError, SoftPromptError
from softprompt.loss.gradient import Gradients, Loss, positions_read
from softprompt.loss.mean import BaseLosses
from softprompt.progress.events import BatchHalved, Event
from softprompt.progress.shown import shown_runs
from softprompt.prompt.reparam import Form, SharedTimesLowRank
from softprompt.tuning.checkpoint import Checkpoints, demand_same
from softprompt.tuning.learner import prepare_each
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.run import Run
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import plain_start
from softprompt.tuning.task import read_splits


class Together:
    """Runs side by side over one base. Take them to a step with `advance`, drop some, continue, `save` the rest.

    At most `rows` rows go through the base at a time, by default as many as all runs have in a step.
    Runs whose `forms` share a part resume together: one checkpoint holds them all, at one moment."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        *,
        lm: FrozenLM | None = None,
        splits: Splits | None = None,
        loss: Loss | None = None,
        on_event: Callable[[int, Event], None] = lambda run, event: None,
        resume: bool = False,
        forms: Callable[[Sequence[Plan]], Sequence[Form]] | None = None,
        rows: int | None = None,
    ) -> None:
        _demand_one_base(recipes)
        _demand_folders_of_their_own(recipes)
        read: dict[str, Splits] = {}
        plans: list[Plan] = []
        for recipe in recipes:
            data = recipe.data.model_dump_json()
            if splits is None and data not in read:
                read[data] = read_splits(recipe)
            plan = make_plan(recipe, lm=lm, splits=splits or read[data], loss=loss)
            lm, loss = plan.lm, plan.loss
            plans.append(plan)
        assert lm is not None
        plans[0].settle_contexts(together=False)
        made: Sequence[Form | None] = forms(plans) if forms else [None] * len(plans)
        self.sharing = forms is not None
        base_losses = BaseLosses()
        self.runs = [
            Run(
                plan,
                lambda event, number=number: on_event(number, event),  # type: ignore[misc]
                form,
                shares_a_part=self.sharing,
                base_losses=base_losses,
            )
            for number, (plan, form) in enumerate(zip(plans, made, strict=True))
        ]
        rows = rows or sum(run.plan.batch_size for run in self.runs)
        reads = positions_read(plans[0].lm.device)
        self.gradients = Gradients(plans[0].loss, rows, self._halved, read_positions=reads)
        self.active = list(range(len(self.runs)))
        self.stepping: list[int] = []
        self.failed: dict[int, SoftPromptError] = {}
        self.batches: list[Iterator[list[Encoded]]] = [run.batches() for run in self.runs]
        try:
            if self.sharing:
                self._begin_as_one(resume)
            else:
                # All are looked at before a file of any is changed.
                states = [run.newest_checkpoint() if resume else None for run in self.runs]
                for run, state in zip(self.runs, states, strict=True):
                    run.begin(state)
        except BaseException:
            self.close()
            raise
        for run in self.runs:
            run.gradients = self.gradients

    def advance(self, share: float = 1.0, numbers: Sequence[int] | None = None) -> None:
        """Takes the active runs, or those of `numbers`, to `share` of their steps, or to their own early end."""
        while True:
            rows: dict[int, list[Encoded]] = {}
            for number in self.active:
                run = self.runs[number]
                if (numbers is None or number in numbers) and run.steps_done < round(share * run.plan.steps):
                    batch = next(self.batches[number], None)
                    if batch is not None:
                        rows[number] = batch
            if not rows:
                return
            self._step(rows)

    def losses(self, numbers: Sequence[int]) -> dict[int, float]:
        """Measures the held-out loss of the present prompts of those of `numbers` that are active; the runs do not
        record it."""
        active = [number for number in self.active if number in numbers]
        runs = [self.runs[number] for number in active]
        prompts, rows = [run.learner.snapshot() for run in runs], [run.plan.held_out for run in runs]
        return dict(zip(active, self.gradients.losses(prompts, rows) if runs else [], strict=True))

    def checkpoint(self) -> None:
        """Keeps what every active run needs to continue, now."""
        if self.sharing:
            self._keep_as_one()
        else:
            for number in self.active:
                self.runs[number].write_checkpoint()

    def drop(self, number: int) -> None:
        """Ends a run. Its best prompt so far is saved."""
        self.active.remove(number)
        self.runs[number].save("dropped")
        self.runs[number].close()

    def save(self) -> dict[int, TuneResult]:
        """Saves what is still active, and gives it; of runs that broke, the best so far is saved too."""
        results = {number: self.runs[number].save(self.runs[number].ending) for number in self.active}
        self.save_failed()
        self.close()
        return results

    def save_failed(self) -> None:
        """Saves the best so far of runs that broke."""
        self._leave(list(self.failed), "failed")

    def leave(self, reason: str) -> None:
        """Saves the best so far of every run that has taken a step, as one that ended for `reason`."""
        self._leave(self.active, reason)
        self.save_failed()

    def close(self) -> None:
        """Closes the records of every run."""
        for run in self.runs:
            run.close()

    def _step(self, rows: dict[int, list[Encoded]]) -> None:
        began = time.perf_counter()
        runs = {number: self.runs[number] for number in rows}
        self.stepping = list(rows)
        losses = [
            runs[number].doubt_last_step(rows[number], nll)
            for number, nll in self._add_gradients(rows).items()
        ]
        for run in runs.values():
            run.add_keep_gradient()
        seconds = (time.perf_counter() - began) / len(runs)
        prepare_each([run.learner for run in runs.values()], losses)
        for (number, run), nll in zip(runs.items(), losses, strict=True):
            try:
                if not run.learner.step(nll):
                    raise run.not_finite(rows[number], nll)
                run.try_last_step()
                run.record_step(rows[number], nll, seconds)
            except SoftPromptError as error:  # this run is over; the others continue
                self.failed[number] = error
                self.active.remove(number)
        due = [run for number, run in runs.items() if number not in self.failed and run.validation_is_due]
        prompts = [run.learner.snapshot() for run in due]
        held_out = self.gradients.losses(prompts, [run.plan.held_out for run in due]) if due else []
        for run, prompt, nll in zip(due, prompts, held_out, strict=True):
            run.record_validation(nll, prompt)
        if self.sharing:
            at_their_ends = all(self.runs[number].at_its_end for number in self.active)
            if at_their_ends or self.runs[0].checkpoints.due(self._passes):
                self._keep_as_one()
            return
        for number, run in runs.items():
            if number not in self.failed:
                run.checkpoint()

    def _add_gradients(self, rows: Mapping[int, list[Encoded]]) -> dict[int, float]:
        """Adds each run's gradient on its rows to its form's, all in one pass but for what is known; their losses."""
        known = {number: self.runs[number].take_known_gradient() for number in rows}
        asked = [number for number, nll in known.items() if nll is None]
        forms = [self.runs[number].learner.form for number in asked]
        losses = self.gradients(forms, [rows[number] for number in asked]) if asked else []
        found = dict(zip(asked, losses, strict=True))
        return {number: found[number] if nll is None else nll for number, nll in known.items()}

    def _halved(self, rows: int) -> None:
        batch = sum(self.runs[number].plan.batch_size for number in self.stepping)
        for number in self.active:
            self.runs[number].log(BatchHalved(rows, math.ceil(batch / rows)))

    def _leave(self, numbers: Sequence[int], reason: str) -> None:
        for number in numbers:
            if self.runs[number].steps_done:  # else there is nothing worth keeping
                self.runs[number].save(reason)

    # Runs that share a part. Their one checkpoint lies in the first one's folder, as often as its settings say.

    @property
    def _passes(self) -> int:
        return max(run.steps_done for run in self.runs)

    def _identity(self) -> dict[str, str]:
        return self.runs[0].identity() | {"the number of tasks that share a part": str(len(self.runs))}

    def _keep_as_one(self) -> None:
        first, *others = self.runs
        state = {
            "run": self._identity(),
            "runs": [run.state() for run in self.runs],
            "failed": {number: str(error) for number, error in self.failed.items()},
            "rows_at_a_time": self.gradients.rows,
            "folders": _folders(first.plan.recipe, [run.plan.recipe for run in self.runs]),
        }
        first.checkpoints.keep(self._passes, state)
        for run in others:
            run.checkpoints.clear()  # of former runs: nothing may continue from those

    def _begin_as_one(self, resume: bool) -> None:
        state = self.runs[0].newest_checkpoint(self._identity()) if resume else None
        if state is None:
            for run in self.runs:
                run.begin(None)
            return
        for run, own in zip(self.runs, state["runs"], strict=True):
            demand_same(own["run"], run.identity(), run.plan.recipe.out)
        for run, own in zip(self.runs, state["runs"], strict=True):
            run.begin(own)
        self.failed = {number: NotFinite(text) for number, text in state["failed"].items()}
        self.active = [number for number in self.active if number not in self.failed]
        self.gradients.rows = state["rows_at_a_time"]


def _demand_one_base(recipes: Sequence[Recipe]) -> None:
    for name in (
        "base",
        "base_revision",
        "dtype",
        "device",
        "tune.int8_products",
        "tune.context_cache_gigabytes",
        "tune.gradient_checkpointing",
        "prompt.upper_layers",
    ):
        first, *others = map(attrgetter(name), recipes)
        for value in others:
            if value != first:
                raise RecipeError(
                    f"{name}: found {first} and {value}, but prompts side by side share one base. Set them alike, or run "
                    "them one after another."
                )


def _demand_folders_of_their_own(recipes: Sequence[Recipe]) -> None:
    taken: set[Path] = set()
    for recipe in recipes:
        folder = Path(recipe.out).resolve()
        if folder in taken:
            raise RecipeError(f"out: two recipes write to {recipe.out}. Give each its own folder.")
        taken.add(folder)


def tune_together(
    recipes: Sequence[Recipe],
    *,
    lm: FrozenLM | None = None,
    splits: Splits | None = None,
    loss: Loss | None = None,
    on_event: Callable[[int, Event], None] = lambda run, event: None,
    progress: bool | None = None,
    resume: bool = False,
) -> list[TuneResult]:
    """Learns a prompt for each recipe, all in the same passes over one base. Like `tune` for each of them.

    Deep prompts share the base and the loop, but take a pass each. Progress is shown in terminals and notebooks, unless
    `progress` is False. Raises the first error of any run after the others have ended and were saved."""
    demand_alone("together")
    with _shown(recipes, on_event, progress) as show:
        return _to_the_end(Together(recipes, lm=lm, splits=splits, loss=loss, on_event=show, resume=resume))


def tune_tasks(
    recipes: Sequence[Recipe],
    *,
    lm: FrozenLM | None = None,
    on_event: Callable[[int, Event], None] = lambda run, event: None,
    progress: bool | None = None,
    resume: bool = False,
) -> list[TuneResult]:
    """Learns one prompt a task, each a part that all tasks share times its own low-rank part (Wang et al. 2023).

    The recipes have `prompt.form: multitask`, one kind, length and form_width, and their own data; the shared part
    starts from the first one's start, follows its rate and is frozen when it ends. Each task keeps its own best
    step, and saves a plain prompt. With `resume`, tasks that were killed continue from one common checkpoint, whatever
    the order in which they are given."""
    demand_alone("together")

    def shared(plans: Sequence[Plan]) -> Sequence[Form]:
        first, tune = plans[0], plans[0].recipe
        for plan in plans[1:]:
            if _shape(plan) != _shape(first):
                raise RecipeError(
                    f"{plan.recipe.out}: found a prompt of other shape ({_shape(plan)}) than {tune.out} "
                    f"({_shape(first)}), but tasks share a part only with one kind, length and form_width. Set them "
                    "alike."
                )
        generator = torch.Generator().manual_seed(tune.tune.seed)
        forms = SharedTimesLowRank.of_tasks(
            plain_start(first, generator), len(plans), tune.prompt.form_width or 1, generator
        )
        for form in forms:
            form.first_layer = tune.prompt.first_layer(first.lm.num_layers)
        return forms

    for recipe in recipes:
        if recipe.prompt.form != "multitask":
            raise RecipeError(
                f"{recipe.out}: prompt.form: found {recipe.prompt.form}, wanted multitask as in the other recipes, which "
                "share a part. Set it for all of them, or learn this one by itself."
            )
    order = _as_they_were(recipes) if resume else list(range(len(recipes)))
    with _shown(recipes, on_event, progress) as show:
        results = _to_the_end(
            Together(
                [recipes[number] for number in order],
                lm=lm,
                on_event=lambda position, event: show(order[position], event),
                resume=resume,
                forms=shared,
            )
        )
    return [results[order.index(number)] for number in range(len(recipes))]


@contextlib.contextmanager
def _shown(
    recipes: Sequence[Recipe], on_event: Callable[[int, Event], None], progress: bool | None
) -> Iterator[Callable[[int, Event], None]]:
    """`on_event` that also shows each event, in the line of its recipe's folder."""
    names = [recipe.out for recipe in recipes]
    with shown_runs(names, lambda name, event: on_event(names.index(name), event), progress) as show:
        yield lambda number, event: show(names[number], event)


def _as_they_were(recipes: Sequence[Recipe]) -> list[int]:
    """The numbers of the recipes in the order of the checkpoint that holds them all, which lies in the first one's
    folder; new ones come last. As given if there is no such checkpoint."""
    numbers = list(range(len(recipes)))
    for recipe in recipes:
        state = Checkpoints(Path(recipe.out), recipe.tune, lambda text: None).newest() or {}
        if then := state.get("folders"):
            now = _folders(recipe, recipes)
            return sorted(numbers, key=lambda number: [*then, *now].index(now[number]))
    return numbers


def _folders(first: Recipe, recipes: Sequence[Recipe]) -> list[str]:
    """The folder of each recipe, relative to the first one's: equal when all of them have been moved."""
    return [os.path.relpath(recipe.out, first.out) for recipe in recipes]


def _shape(plan: Plan) -> str:
    prompt = plan.recipe.prompt
    return f"{prompt.kind}, {plan.template.soft_length} virtual tokens, form_width {prompt.form_width or 1}"


def _to_the_end(together: Together) -> list[TuneResult]:
    try:
        together.advance()
    except BaseException as error:
        together.leave("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    else:
        results = together.save()
    finally:
        together.close()
    if together.failed:
        raise together.failed[min(together.failed)]
    return [results[number] for number in range(len(together.runs))]
