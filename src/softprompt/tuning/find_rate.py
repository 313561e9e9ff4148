"""A learning rate found by trying: five rates side by side through a small run each, judged on held-out rows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from softprompt.data.batch import epoch_order
from softprompt.loss.gradient import Gradients
from softprompt.tuning.learner import Learner, prepare_each
from softprompt.tuning.plan import Plan
from softprompt.tuning.starts import start

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the measured rate
SHARE, FEWEST, MOST = 0.1, 5, 50  # steps of each small run, as a share of the run's own
JUDGED_ROWS = 64


@dataclass(frozen=True)
class Found:
    """The rate with the lowest held-out loss (nats per token), all that were tried, and what it cost."""

    rate: float
    tried: tuple[tuple[float, float], ...]
    steps: int
    seconds: float

    def __str__(self) -> str:
        losses = ", ".join(f"{rate:.2g}: {nll:.4f}" for rate, nll in self.tried)
        return (
            f"Learning rate {self.rate:.2g}, found in {len(self.tried)} x {self.steps} steps and {self.seconds:.1f} s "
            f"(held-out loss by rate: {losses})."
        )


def find_rate(plan: Plan, gradients: Gradients, middle: float) -> Found:
    """Runs five rates around `middle` through a whole schedule of a tenth of the steps (5 to 50), on the same rows in the same passes."""
    began = time.perf_counter()
    tune = plan.recipe.tune
    steps = min(plan.steps, max(FEWEST, min(MOST, round(SHARE * plan.steps))))
    rates = [float(f"{factor * middle:.2g}") for factor in FACTORS]
    learners = [Learner(start(plan), tune, rate, steps, plan.lm.device) for rate in rates]
    broken: set[int] = set()
    for step in range(steps):
        epoch, batch = divmod(step, plan.steps_per_epoch)
        order = epoch_order(plan.train.lengths, plan.batch_size, seed=tune.seed, epoch=epoch)
        rows = [plan.train.encoded[index] for index in order[batch]]
        going = [number for number in range(len(rates)) if number not in broken]
        losses = gradients([learners[number].form for number in going], [rows] * len(going))
        prepare_each([learners[number] for number in going], losses)
        broken |= {
            number for number, nll in zip(going, losses, strict=True) if not learners[number].step(nll)
        }
    judged = list(plan.held_out)[:JUDGED_ROWS]
    nlls = gradients.losses([learner.snapshot() for learner in learners], [judged] * len(rates))
    tried = tuple(
        (rate, math.inf if number in broken or not math.isfinite(nll) else nll)
        for number, (rate, nll) in enumerate(zip(rates, nlls, strict=True))
    )
    rate = min(tried, key=lambda pair: pair[1])[0]
    return Found(rate, tried, steps, time.perf_counter() - began)
