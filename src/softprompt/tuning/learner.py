"""One prompt as it learns: its trained form, optimiser and schedule, and the best prompt so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.optim import OPTIMIZERS, Muon, prepare_steps, rate_factor
from softprompt.tuning.recipe import TuneSettings

RECENT_STEPS = 3  # training losses that are averaged to see a divergence
TRAINING_MARGIN, TRAINING_MARGIN_NATS = 1.25, 0.25  # above the start; batches of one task differ by less
HELD_OUT_MARGIN = 1.02  # the same rows every time, so that little noise is left
LOWERED_BY, MOST_LOWERED = 3.0, 4  # down to an 81st
REGROWTH_SHARE = 0.1  # of a run's steps, in which the highest rate doubles after a return
LEARNED_SHARE = 0.2  # of what batches have left to fall: one that has less takes the shortest step
MEMORY = 0.8  # of the mean of what they have left; about five steps


class Learner:
    """Takes optimiser steps and keeps the best prompt; knows neither data nor base.

    `best` is the prompt of the best held-out loss so far (nats per token), which is what gets saved. `rate_taken` is
    the learning rate of the latest step. Where `highest_rate` is above `learning_rate`, each step takes the rate between
    the two at which it promises to take its loss down to `reachable_nll` (nats per token), or the lower one where its batch is
    learned already. `device` is where a step may
    be computed, whatever the form lies on."""

    def __init__(
        self,
        form: Form,
        settings: TuneSettings,
        learning_rate: float,
        steps: int,
        device: torch.device | None = None,
    ) -> None:
        self.form, self.settings, self.learning_rate, self.steps = form, settings, learning_rate, steps
        self.highest_rate = learning_rate
        self.reachable_nll = 0.0
        self.usual_gap = math.nan  # mean of what batches had left to fall, nats per token
        self.tried_steps: tuple[int, ...] = ()  # from the start or the last return on; see rate.try_last_step
        self.returned_at = 0  # steps that had been done then
        self.regrown_rate = (
            0.0  # up to which `highest_rate` rises again after a return; 0 where steps are not measured
        )
        self._last_start: list[Tensor] = []
        self._last_way: list[Tensor] = []
        trained = form.trained()
        self.parameters = [part.parameter for part in trained]
        groups = [
            {"params": [part.parameter], "factor": part.factor, "parts": part.parts} for part in trained
        ]
        self.optimiser = OPTIMIZERS[settings.optimizer](groups, learning_rate, settings.weight_decay)
        if isinstance(self.optimiser, Muon) and device is not None:
            self.optimiser.device = device
        self.steps_done, self.best_step, self.without_gain, self.times_lowered = 0, 0, 0, 0
        self._norm: float | None = None  # of gradients that have been clipped, by prepare_each
        self.rate_taken = math.nan
        self.highest_taken = 0.0  # before the schedule, of all steps since the last return
        self.recent: list[float] = []
        self.nll_start = self.nll_best = self.nll_first = self.score_start = self.score_best = math.nan
        self.best: Plain = self.snapshot()
        self.best_form = _copies(form)

    @property
    def rate(self) -> float:
        """The learning rate of the coming step; the lowest that it may take where it is measured."""
        return self.learning_rate * self._scheduled_share()

    def _scheduled_share(self) -> float:
        tune = self.settings
        return rate_factor(tune.schedule, self.steps_done + 1, self.steps, tune.warmup_share)

    def snapshot(self) -> Plain:
        """A copy of the plain prompt at this step."""
        with torch.no_grad():
            return tuple(tensor.clone() for tensor in self.form())

    def step(self, nll: float = 0.0) -> bool:
        """Takes one optimiser step along the parameters' gradients, clipped, at the scheduled rate.

        False, and no step, where the gradient or the loss `nll` that it belongs to is not finite."""
        norm = self._clipped() if self._norm is None else self._norm
        self._norm = None
        finite = math.isfinite(nll) and math.isfinite(norm)
        if finite:
            is_measured = self.highest_rate > self.learning_rate
            is_tried = self.steps_done + 1 - self.returned_at in self.tried_steps
            before = self._values() if is_measured or is_tried else []
            self._set_rate(self.highest_rate * self._scheduled_share() if is_measured else self.rate)
            self.optimiser.step()
            self.rate_taken = self._shortened(before, nll, norm) if is_measured else self.rate
            self.highest_taken = max(self.highest_taken, self.rate_taken / self._scheduled_share())
            if is_tried:
                self._last_start = before
                self._last_way = [now - old for now, old in zip(self._values(), before, strict=True)]
            # Not after the last return that there may be: nothing would catch a rate that rises too far again.
            if 0 < self.times_lowered < MOST_LOWERED and self.highest_rate < self.regrown_rate:
                doublings = 1 / (REGROWTH_SHARE * self.steps * self.times_lowered)
                self.highest_rate = min(self.regrown_rate, self.highest_rate * 2**doublings)
            self.steps_done += 1
            self.recent = [*self.recent, nll][-RECENT_STEPS:]
            self.nll_first = nll if math.isnan(self.nll_first) else self.nll_first
        for parameter in self.parameters:
            parameter.grad = None
        return finite

    @property
    def is_tried(self) -> bool:
        """Whether the step just taken is one of `tried_steps`."""
        return self.steps_done - self.returned_at in self.tried_steps

    def moved(self, factor: float) -> Plain:
        """Moves to where the last step had led if it were `factor` times as long; the plain prompt there."""
        with torch.no_grad():
            for parameter, old, way in zip(self.parameters, self._last_start, self._last_way, strict=True):
                parameter.copy_(old + factor * way)
        return self.snapshot()

    def lengthen(self, factor: float) -> None:
        """Makes the last step `factor` times as long, and all later ones."""
        self.moved(factor)
        self.learning_rate, self.highest_rate = self.learning_rate * factor, self.highest_rate * factor
        self.rate_taken *= factor
        self._last_start = self._last_way = []

    def promised_fall(self) -> float:
        """By how much the loss falls, to first order, for a unit of learning rate: minus the sum of gradient times
        the optimiser's step at rate 1. Takes that step, so call it on a learner that is thrown away."""
        before = self._values()
        self._set_rate(1.0)
        self.optimiser.step()
        return self._fall_since(before)

    def _set_rate(self, rate: float) -> None:
        """Sets the rate of the optimiser's next step; every parameter takes its own share of it."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]

    def _shortened(self, before: Sequence[Tensor], nll: float, norm: float) -> float:
        """Shortens the step from `before`, just taken at `highest_rate`, to the rate at which it promises to take the
        loss `nll` down to `reachable_nll`, and at least `learning_rate`, both times the schedule. `norm` is that of the gradient before
        clipping. Returns the rate."""
        share = self._scheduled_share()
        # A step is linear in its rate, so the one wanted lies on the way to here. The gradients have been clipped to a
        # norm, so the fall that they promise is smaller by as much.
        clip = self.settings.clip
        clipped = clip / max(norm, clip) if clip else 1.0
        slope = self._fall_since(before) / clipped / (self.highest_rate * share)
        # Momentum may point uphill for one batch, which says nothing about how far to go. Nor does a batch that is learned
        # already: next to nothing is left to fall along next to no slope, and the quotient of the two is noise.
        gap = nll - self.reachable_nll
        is_learned = gap < LEARNED_SHARE * self.usual_gap
        wanted = gap / slope if slope > 0 and not is_learned else self.learning_rate
        self.usual_gap = gap if math.isnan(self.usual_gap) else MEMORY * self.usual_gap + (1 - MEMORY) * gap
        rate = min(self.highest_rate, max(self.learning_rate, wanted))
        if rate < self.highest_rate:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.lerp_(old, 1.0 - rate / self.highest_rate)
        return rate * share

    def _clipped(self) -> float:
        """Scales the gradients down to a norm of `clip` where theirs is larger, as torch's clip_grad_norm_ does; their norm
        before. (That function takes longer than a prompt's own sums, for each of many prompts side by side.)"""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients))
        clip = self.settings.clip
        if clip and norm > clip:
            for gradient in gradients:
                gradient.mul_(clip / (norm + 1e-6))
        return norm

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _fall_since(self, before: Sequence[Tensor]) -> float:
        """What the present gradients promise of the way from `before` to here."""
        return -sum(
            float((parameter.grad.double() * (parameter.detach() - old).double()).sum())
            for parameter, old in zip(self.parameters, before, strict=True)
            if parameter.grad is not None
        )

    def note_validation(
        self, nll: float, prompt: Plain, *, score: float = math.nan, always: bool = False
    ) -> bool:
        """Compares the held-out loss of `prompt` with the best so far; True if it is better, or with `always`.

        A higher `score` is better whatever the loss; among equal scores, and without any, the lower loss is."""
        if math.isnan(self.nll_start):
            self.nll_start, self.score_start = nll, score
        first = math.isnan(self.nll_best)
        scored = math.isfinite(score) and score != self.score_best
        better = score > self.score_best if scored else nll < self.nll_best
        best = first or better or (always and math.isfinite(nll))
        if best:
            self.best, self.best_step, self.nll_best, self.without_gain = prompt, self.steps_done, nll, 0
            self.best_form = _copies(self.form)
            self.score_best = score
        else:
            self.without_gain += 1
        return best

    def diverges(self, nll: float | None = None) -> bool:
        """Whether the loss has risen clearly above its start: the held-out loss `nll` of just now, or without one the
        mean training loss of the last steps.

        The margins keep a rate that only looks bad: batches differ from each other, so training losses get a wider one
        and count only when several have been seen."""
        if self.times_lowered == MOST_LOWERED or not self.steps_done:
            return False
        if nll is not None:
            return not nll <= HELD_OUT_MARGIN * self.nll_start  # `not <=`, so that nan counts as risen
        if len(self.recent) < RECENT_STEPS:
            return False
        # The first batch may be harder than the held-out rows: the higher of the two counts as the start.
        start = max(self.nll_first, self.nll_start)
        return sum(self.recent) / len(self.recent) > TRAINING_MARGIN * start + TRAINING_MARGIN_NATS

    def go_back(self) -> None:
        """Returns to the best step's form, with a fresh optimiser and a third of the rate. The schedule continues.

        Where steps are measured, none takes more than a third of the highest rate that led here: where text is learned, most of the
        loss cannot be taken away, and steps that promise all of it go too far. What was too far at the start need not be so later: the highest
        rate doubles in a tenth of the steps (slower after each further return) until it is what it was, and the first steps from here
        are tried as those of the run were."""
        if not self.times_lowered and self.highest_rate > self.learning_rate:
            self.regrown_rate = self.highest_rate
        self.learning_rate /= LOWERED_BY
        self.highest_rate = max(self.learning_rate, self.highest_taken / LOWERED_BY)
        self.highest_taken, self.returned_at = 0.0, self.steps_done
        self.times_lowered += 1
        self.recent, self.usual_gap = [], math.nan
        self.form.load_state_dict(self.best_form)
        self.optimiser.state.clear()

    @property
    def out_of_patience(self) -> bool:
        """Whether `patience` validations in a row brought nothing better."""
        return bool(self.settings.patience) and self.without_gain >= (self.settings.patience or 0)

    def state(self) -> dict[str, Any]:
        """All that another process needs to continue: plain numbers and tensors."""
        return {
            "form": self.form.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "best_form": self.best_form,
            "highest_rate": self.highest_rate,
            "highest_taken": self.highest_taken,
            "returned_at": self.returned_at,
            "regrown_rate": self.regrown_rate,
            "reachable_nll": self.reachable_nll,
            "usual_gap": self.usual_gap,
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a former `state()`."""
        self.form.load_state_dict(state["form"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.best, self.best_form = state["best"], state["best_form"]
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.highest_rate = state.get("highest_rate", self.learning_rate)
        self.highest_taken = state.get("highest_taken", 0.0)
        self.returned_at = state.get("returned_at", 0)
        self.regrown_rate = state.get("regrown_rate", 0.0)
        self.reachable_nll = state.get("reachable_nll", 0.0)
        self.usual_gap = state.get("usual_gap", math.nan)


def prepare_each(learners: Sequence[Learner], nlls: Sequence[float]) -> None:
    """Makes ready what the coming `step` of each takes most time for, all at once."""
    finite = []
    for learner, nll in zip(learners, nlls, strict=True):
        learner._norm = learner._clipped()
        if math.isfinite(nll) and math.isfinite(learner._norm):
            finite.append(learner.optimiser)
    prepare_steps(finite)


_COUNTS = (
    "steps_done",
    "learning_rate",
    "best_step",
    "without_gain",
    "nll_start",
    "nll_best",
    "score_start",
    "score_best",
    "nll_first",
    "recent",
    "times_lowered",
)


def _copies(form: Form) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in form.state_dict().items()}


def is_finite(prompt: Plain) -> bool:
    """Whether every number of a plain prompt is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in prompt)
