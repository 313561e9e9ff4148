"""One prompt as it learns: its trained form, optimiser and schedule, and the best prompt so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.optim import OPTIMIZERS, Muon, prepare_steps
from softprompt.tuning.recipe import TuneSettings
from softprompt.tuning.step_length import StepLength

RECENT_STEPS = 3  # training losses that are averaged to see a divergence
TRAINING_MARGIN, TRAINING_MARGIN_NATS = 1.25, 0.25  # above the start; batches of one task differ by less
HELD_OUT_MARGIN = 1.02  # the same rows every time, so that little noise is left


class Learner:
    """Takes optimiser steps and keeps the best prompt; knows neither data nor base.

    `best` is the prompt of the best held-out loss so far (nats per token), which is what gets saved. `rate_taken` is
    the learning rate of the latest step, schedule included; `length` holds the rules that it follows. `device` is where a step
    may be computed, whatever the form lies on."""

    def __init__(
        self,
        form: Form,
        settings: TuneSettings,
        learning_rate: float,
        steps: int,
        device: torch.device | None = None,
    ) -> None:
        self.form, self.settings = form, settings
        self.length = StepLength(learning_rate, settings, steps)
        # What is trained, before and after the last step, where that may be corrected.
        self._last_start: list[Tensor] = []
        self._last_end: list[Tensor] = []
        trained = form.trained()
        self.parameters = [part.parameter for part in trained]
        groups = [
            {"params": [part.parameter], "factor": part.factor, "parts": part.parts} for part in trained
        ]
        self.optimiser = OPTIMIZERS[settings.optimizer](groups, learning_rate, settings.weight_decay)
        if isinstance(self.optimiser, Muon) and device is not None:
            self.optimiser.device = device
        self.steps_done, self.best_step, self.without_gain = 0, 0, 0
        self._norm: float | None = None  # of gradients that have been clipped, by prepare_each
        self.rate_taken = math.nan
        self.recent: list[float] = []
        self.nll_start = self.nll_best = self.nll_first = self.score_start = self.score_best = math.nan
        self.best: Plain = self.snapshot()
        self.best_form = _copies(form)

    @property
    def rate(self) -> float:
        """The learning rate of the coming step; the lowest that it may take where it is measured."""
        return self.length.learning_rate * self.length.scheduled_share(self.steps_done + 1)

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
            length, step = self.length, self.steps_done + 1
            share = length.scheduled_share(step)
            before = self._values() if length.is_measured or length.tried_steps else []
            self._set_rate(length.highest_rate * share)  # the lowest too, where it is not measured
            self.optimiser.step()
            rate = self._shortened(before, nll, norm, share) if length.is_measured else length.highest_rate
            self.rate_taken = rate * share
            if length.tried_steps:
                self._last_start, self._last_end = before, self._values()
            length.note_taken(rate, nll)
            self.steps_done += 1
            self.recent = [*self.recent, nll][-RECENT_STEPS:]
            self.nll_first = nll if math.isnan(self.nll_first) else self.nll_first
        for parameter in self.parameters:
            parameter.grad = None
        return finite

    @property
    def is_tried(self) -> bool:
        """Whether the length of the step just taken is to be tried on other rows."""
        return self.length.is_tried(self.steps_done)

    def is_doubted(self, nll: float) -> bool:
        """Whether the loss `nll` of the coming step's rows is so high that the last step may have caused it."""
        return bool(self._last_start) and self.length.is_doubted(self.steps_done, nll)

    def moved(self, factor: float) -> Plain:
        """Moves to where the last step had led if it were `factor` times as long (1: exactly to where it led); the plain
        prompt there."""
        with torch.no_grad():
            for parameter, start, end in zip(self.parameters, self._last_start, self._last_end, strict=True):
                torch.lerp(start, end, factor, out=parameter.detach())
        return self.snapshot()

    def lengthen(self, factor: float) -> None:
        """Makes the last step `factor` times as long, and all later ones."""
        self._correct(factor)
        self.length.lengthen(factor)

    def take_back(self, kept: float) -> None:
        """Leaves no more than the share `kept` of the last step, and makes all later ones half as long."""
        self._correct(kept)
        self.length.halve()

    def _correct(self, factor: float) -> None:
        self.moved(factor)
        self.rate_taken *= factor
        self._last_start = self._last_end = []

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

    def _shortened(self, before: Sequence[Tensor], nll: float, norm: float, share: float) -> float:
        """Shortens the step from `before`, just taken at the highest rate, to what its loss `nll` asks for; the rate.

        `norm` is that of the gradient before clipping, `share` the schedule's factor."""
        # A step is linear in its rate, so the one wanted lies on the way to here. The gradients have been clipped to a
        # norm, so the fall that they promise is smaller by as much.
        clip = self.settings.clip
        clipped = clip / max(norm, clip) if clip else 1.0
        highest = self.length.highest_rate
        rate = self.length.measured(nll, self._fall_since(before) / clipped / (highest * share))
        if rate < highest:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.lerp_(old, 1.0 - rate / highest)
        return rate

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
        if not self.length.can_lower or not self.steps_done:
            return False
        if nll is not None:
            return not nll <= HELD_OUT_MARGIN * self.nll_start  # `not <=`, so that nan counts as risen
        if len(self.recent) < RECENT_STEPS:
            return False
        # The first batch may be harder than the held-out rows: the higher of the two counts as the start.
        start = max(self.nll_first, self.nll_start)
        return sum(self.recent) / len(self.recent) > TRAINING_MARGIN * start + TRAINING_MARGIN_NATS

    def go_back(self) -> None:
        """Returns to the best step's form, with a fresh optimiser and a third of the rate. The schedule continues."""
        self.length.lower(self.steps_done)
        self.recent = []
        self._last_start = self._last_end = []
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
            "last_start": self._last_start,
            **self.length.state(),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a former `state()`."""
        self.form.load_state_dict(state["form"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.best, self.best_form = state["best"], state["best_form"]
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.length.restore(state)
        self._last_start = state.get("last_start", [])
        self._last_end = self._values() if self._last_start else []


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
    "best_step",
    "without_gain",
    "nll_start",
    "nll_best",
    "score_start",
    "score_best",
    "nll_first",
    "recent",
)


def _copies(form: Form) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in form.state_dict().items()}


def is_finite(prompt: Plain) -> bool:
    """Whether every number of a plain prompt is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in prompt)
