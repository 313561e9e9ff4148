"""One prompt as it learns: its trained form, its optimiser, its place in the schedule, and the best prompt so far."""

from __future__ import annotations

import math
from typing import Any

import torch

from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.optim import OPTIMIZERS, rate_factor
from softprompt.tuning.recipe import Tune


class Learner:
    """Knows neither data nor base: gradients come in, steps and judgements are made.

    `best` is the prompt of the best held-out loss so far (nats per token), which is what gets saved."""

    def __init__(self, form: Form, settings: Tune, learning_rate: float, steps: int) -> None:
        self.form, self.settings, self.learning_rate, self.steps = form, settings, learning_rate, steps
        trained = form.trained()
        self.parameters = [one.parameter for one in trained]
        groups = [{"params": [one.parameter], "factor": one.factor, "parts": one.parts} for one in trained]
        self.optimiser = OPTIMIZERS[settings.optimizer](groups, learning_rate, settings.weight_decay)
        self.step, self.best_step, self.without_gain = 0, 0, 0
        self.nll_start = self.nll_best = self.score_start = self.score_best = math.nan
        self.best: Plain = self.now()

    @property
    def rate(self) -> float:
        """The learning rate of the coming step."""
        tune = self.settings
        return self.learning_rate * rate_factor(tune.schedule, self.step + 1, self.steps, tune.warmup_share)

    def now(self) -> Plain:
        """A copy of the prompt as it stands."""
        with torch.no_grad():
            prompt = self.form()
        return tuple(tensor.clone() for tensor in prompt)

    def move(self) -> bool:
        """One step along the gradient at hand, clipped; False, and no step, where the gradient is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * group["factor"]
            self.optimiser.step()
            self.step += 1
        self.optimiser.zero_grad()
        return finite

    def judge(self, nll: float, prompt: Plain, *, score: float = math.nan, always: bool = False) -> bool:
        """Take note of the held-out loss of `prompt`; True if it is the best so far (or the latest, with `always`).

        A higher `score` is better whatever the loss; among equal scores, and without any, the lower loss is."""
        if math.isnan(self.nll_start):
            self.nll_start, self.score_start = nll, score
        first = math.isnan(self.nll_best)
        scored = math.isfinite(score) and score != self.score_best
        better = score > self.score_best if scored else nll < self.nll_best
        best = first or better or (always and math.isfinite(nll))
        if best:
            self.best, self.best_step, self.nll_best, self.without_gain = prompt, self.step, nll, 0
            self.score_best = score
        else:
            self.without_gain += 1
        return best

    @property
    def out_of_patience(self) -> bool:
        return bool(self.settings.patience) and self.without_gain >= (self.settings.patience or 0)

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on: plain numbers and tensors."""
        return {
            "form": self.form.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.form.load_state_dict(state["form"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.best = state["best"]
        for name in _COUNTS:
            setattr(self, name, state[name])


_COUNTS = (
    "step",
    "learning_rate",
    "best_step",
    "without_gain",
    "nll_start",
    "nll_best",
    "score_start",
    "score_best",
)


def is_finite(prompt: Plain) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in prompt)
