"""The learning rate that suits a base and its rows: measured before the first step, and tried again at the first few."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

from torch import Tensor

from softprompt.data.batch import epoch_order
from softprompt.data.encoded import Encoded
from softprompt.loss.gradient import Gradients
from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.learner import Learner
from softprompt.tuning.plan import Plan

KEPT_SHARE = 0.5  # of the fall at half the rate: a rate whose step falls by less than that goes too far
MOST_HALVINGS = 5
# Steps, from the start or a return on, whose length is tried on the rows of the next one; later the noise of one batch decides.
TRIED_STEPS = (2, 4)
CLEAR_RISE, CLEAR_RISE_NATS = 1.1, 0.25  # of the next rows' loss: a step that lifts it by more goes too far

LEFT_SHARE = 0.25  # of a step that is taken back
RECOVERED_SHARE = 1 / 3  # of the rise above the usual loss: a step that explains less of it was not its cause


class FirstGradient(NamedTuple):
    """The loss of the first step's rows at the start (nats per token), its gradient towards each trained parameter, and the time
    that took."""

    nll: float
    gradients: list[Tensor | None]
    seconds: float


class MeasuredRate(NamedTuple):
    """The rate of a run's first step, the lowest of its steps, the loss (nats per token) down to which they may promise to go, and
    what the first step takes anyway."""

    rate: float
    lowest: float
    reachable_nll: float
    first: FirstGradient


def measured_rate(plan: Plan, gradients: Gradients, form: Form) -> MeasuredRate:
    """The rate at which the first step, to first order, takes away the loss, as far as other rows confirm it.

    A share of the embeddings' scale says how far a vector can go, but not how steep the loss is: on a base of 30
    layers and width 576 the step that suits a small base promises 3 to 6 times the whole loss and lands far beyond
    the valley. Dividing the loss by the slope along the optimiser's own step is Polyak's step size (1987; Loizou et
    al. 2021 for batches, with an upper bound as here). It supposes that the loss can fall to zero. That of a label
    can, that of a text cannot: so the step is tried on the rows of the second batch, and halved while it makes their
    loss fall by less than `KEPT_SHARE` of what half the step does. The share of the loss that is left to promise is
    what all steps of the run go by. Costs a few forward passes, and the gradient that the first step takes. The same base, rows and settings
    give the same rate. `form` is what will be learned, at its start; it is not changed.

    This, times the form's `lowest_share`, is the lowest rate of the run, but for `try_last_step`: later steps take more, up to the bound
    `plan.learning_rate`, where their own loss allows it (`Learner.step`), since the slope falls as a prompt is learned. They never take less: a batch's slope
    holds its noise too, and by the end of a deep prompt's run on a large base hardly anything else (figures in
    LOG.md). Of running text the slope falls and the loss does not: `StepLength.share_to_fall` keeps a deep prompt's steps at this rate."""
    tune = plan.recipe.tune.model_copy(update={"weight_decay": 0.0})
    learner = Learner(copy.deepcopy(form), tune, 1.0, plan.steps, plan.lm.device)
    first, second = _first_batches(plan, tune.seed)
    start = [parameter.detach().clone() for parameter in learner.parameters]
    began = time.perf_counter()
    (nll,) = gradients([learner.form], [first])
    seconds = time.perf_counter() - began
    first_gradient = FirstGradient(nll, [parameter.grad for parameter in learner.parameters], seconds)
    fall = learner.promised_fall()
    if not fall > 0 or not nll > 0:  # a flat start, or one that is not finite, which the first step reports
        return MeasuredRate(plan.learning_rate, plan.learning_rate, 0.0, first_gradient)
    promised = nll / fall
    tried = min(plan.learning_rate, promised)
    rate = _confirmed(gradients, learner, start, second, tried)
    share = rate / tried
    lowest = _two_digits(form.lowest_share * rate)
    return MeasuredRate(_two_digits(rate), lowest, (1.0 - share) * nll, first_gradient)


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def try_last_step(learner: Learner, nll_of: Callable[[Plain], float], measured_bound: float) -> None:
    """Doubles the step just taken, and what later ones may take, where other rows say so, or shortens them where it goes too far.

    `nll_of` gives the loss of those rows under a prompt (nats per token), `measured_bound` is the highest rate before any
    doubling. Neither the embeddings' scale nor one gradient knows how far a prompt can go: on some bases twice the bound
    of `plan.learning_rate` learns far more, on others it breaks the run, and a soft prompt before a long question
    may overshoot at the fourth step what the second batch confirmed for the first (figures in LOG.md). A few forward passes see
    which. Below the rate that was measured only a clear rise counts: what lowers the loss of one batch most is shorter
    than what suits a whole run."""
    may_halve = learner.length.highest_rate > measured_bound
    learner.lengthen(_tried_factor(lambda factor: nll_of(learner.moved(factor)), may_halve))


def take_back_last_step(learner: Learner, nll: float, nll_of: Callable[[Plain], float]) -> bool:
    """Takes back most of the step just taken, where it is what lifted the loss of the coming step's rows to `nll`; whether.

    `nll_of` gives the loss of those rows under a prompt (nats per token). A batch may be far above the usual loss since its rows are
    hard, or since the last step led over an edge, from where a run may take a fifth of its steps to return (figures in LOG.md). One
    forward pass tells the two apart: how much of the rise is gone where only a quarter of that step is taken. If it was the step, later
    ones are half as long."""
    learner.length.times_doubted += 1
    shorter = nll_of(learner.moved(LEFT_SHARE))
    rise = nll - learner.length.usual_nll
    # A loss `nll` that is not finite has risen without bound: any finite one recovers it.
    caused = math.isfinite(shorter) and not nll - shorter < RECOVERED_SHARE * rise
    if caused:
        learner.take_back(LEFT_SHARE)
    else:
        learner.moved(1.0)
    return caused


def _tried_factor(nll_at: Callable[[float], float], may_halve: bool) -> float:
    """2, 1, 0.5 or 0.25: how many times as long a step should be; `nll_at` gives the loss after so many times the step."""
    before, after = nll_at(0.0), nll_at(1.0)
    fall = before - after
    # Twice, where the second half of the doubled step still brings `KEPT_SHARE` of what the first does.
    if fall > 0 and before - nll_at(2.0) >= (1.0 + KEPT_SHARE) * fall:
        return 2.0
    rises = not after <= CLEAR_RISE * before + CLEAR_RISE_NATS  # also where it is not finite
    if not rises and not may_halve:
        return 1.0
    half_fall = before - nll_at(0.5)
    if rises:
        return 0.5 if half_fall > 0 else 0.25
    return 0.5 if half_fall > 0 and fall < KEPT_SHARE * half_fall else 1.0


def _first_batches(plan: Plan, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """The rows of the first two steps; the second epoch is ordered only where the first has one step."""
    lengths, size = plan.train.lengths, plan.batch_size
    epochs = (epoch_order(lengths, size, seed=seed, epoch=epoch) for epoch in (0, 1))
    batches = islice(chain.from_iterable(epochs), 2)
    first, second = ([plan.train.encoded[index] for index in batch] for batch in batches)
    return first, second


def _confirmed(
    gradients: Gradients, learner: Learner, start: Sequence[Tensor], rows: list[Encoded], rate: float
) -> float:
    """`rate`, halved until a step from `start` at it makes the loss of `rows` fall by enough.

    The learner has taken that step at rate 1."""
    way = [parameter.detach() - old for parameter, old in zip(learner.parameters, start, strict=True)]

    def loss_at(rate: float) -> float:
        for parameter, old, change in zip(learner.parameters, start, way, strict=True):
            parameter.data.copy_(old + rate * change)
        (nll,) = gradients.losses([learner.snapshot()], [rows])
        return nll

    before, after, tried = loss_at(0.0), loss_at(rate), rate
    for _ in range(MOST_HALVINGS):
        after_half = loss_at(0.5 * tried)
        # A loss that is not finite compares as false and so counts as too far.
        if before - after >= max(0.0, KEPT_SHARE * (before - after_half)):
            return tried
        tried, after = 0.5 * tried, after_half
    # Where no step helps the other rows, they say nothing about how far to go.
    return tried if after < before else rate
