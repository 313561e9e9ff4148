"""How far each optimiser step goes: the learning rate between a lowest and a highest one, times the schedule."""

from __future__ import annotations

import copy
import math
from typing import Any

from softprompt.tuning.optim import rate_factor
from softprompt.tuning.recipe import TuneSettings

LOWERED_BY, MOST_LOWERED = 3.0, 4  # down to an 81st
REGROWTH_SHARE = 0.1  # of a run's steps, in which the highest rate doubles after a return
LEARNED_SHARE = 0.2  # of what batches have left to fall: one that has less takes the shortest step
MEMORY = 0.8  # of the mean of batches' losses; about five steps
DOUBTED_RISE, DOUBTED_RISE_NATS = 2.0, 0.5  # of the usual loss: a batch above that doubts the last step
MOST_DOUBTS_SHARE = 0.1  # of a run's steps
LEAST_SEEN = 8  # batches before which nothing is said of how their loss falls


class StepLength:
    """The rates that a run's steps may take, and what changes them; knows no prompt and no gradient.

    All rates are before the schedule. Where `highest_rate` is above `learning_rate`, a step takes the rate between the two at
    which it promises to take its loss down to `reachable_nll` (nats per token), or the lower one where its batch is learned
    already. Where it may not promise the whole loss (`promises_all`), as a deep prompt's on running text, it promises no more
    than what another as many steps as so far would take away. Each return to a former prompt lowers both (`lower`). `tried_steps` are
    those whose length other rows judge, counted from the start or the last return on (`rate.try_last_step`); later ones are
    doubted where a batch's loss is far above `usual_nll` (`rate.take_back_last_step`)."""

    def __init__(self, learning_rate: float, settings: TuneSettings, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.learning_rate = self.highest_rate = learning_rate
        self.reachable_nll = 0.0
        self.promises_all = True
        self.summed_nlls = [0.0]  # of all batches up to each since the last return
        self.tried_steps: tuple[int, ...] = ()
        self.times_lowered = 0
        self.returned_at = 0  # steps that had been done at the last return
        self.usual_nll = math.nan  # mean loss of the last batches, nats per token
        self.times_doubted = self.times_taken_back = 0
        self.highest_taken = 0.0  # of all steps since the last return
        # Up to which `highest_rate` rises again after a return; 0 where steps are not measured.
        self.regrown_rate = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether each step's own loss says how far it goes."""
        return self.highest_rate > self.learning_rate

    def scheduled_share(self, step: int) -> float:
        """The schedule's factor of step number `step`; the first is 1."""
        return rate_factor(self.settings.schedule, step, self.steps, self.settings.warmup_share)

    def is_tried(self, step: int) -> bool:
        """Whether the length of step number `step` is tried on other rows."""
        return step - self.returned_at in self.tried_steps

    def measured(self, nll: float, slope: float) -> float:
        """The rate of a step: where it promises to take the loss `nll` down to `reachable_nll`, within the two bounds.

        `slope` is by how much that loss falls, to first order, for a unit of rate."""
        # Momentum may point uphill for one batch, which says nothing about how far to go. Nor does a batch that is learned
        # already: next to nothing is left to fall along next to no slope, and the quotient of the two is noise.
        gap = nll - self.reachable_nll
        is_learned = gap < LEARNED_SHARE * (self.usual_nll - self.reachable_nll)
        if not self.promises_all:
            gap = min(gap, nll * self.share_to_fall)
        wanted = gap / slope if slope > 0 and not is_learned else self.learning_rate
        return min(self.highest_rate, max(self.learning_rate, wanted))

    @property
    def share_to_fall(self) -> float:
        """What another as many steps as so far may take away of the loss, as a share of it: what the second half of them took
        away from the mean loss of the quarter before. 0 to 1; 1 while too few batches were seen."""
        seen = len(self.summed_nlls) - 1
        if seen < LEAST_SEEN:
            return 1.0
        quarter, half = seen // 4, seen // 2
        earlier = (self.summed_nlls[half] - self.summed_nlls[quarter]) / (half - quarter)
        late = (self.summed_nlls[seen] - self.summed_nlls[half]) / (seen - half)
        return min(1.0, max(0.0, (earlier - late) / late)) if late > 0 else 0.0

    def note_taken(self, rate: float, nll: float) -> None:
        """Notes the rate that a step took, and the loss of its batch. After a return the highest rate rises again, a little
        with each."""
        self.highest_taken = max(self.highest_taken, rate)
        self.summed_nlls.append(self.summed_nlls[-1] + nll)
        self.usual_nll = nll if math.isnan(self.usual_nll) else MEMORY * self.usual_nll + (1 - MEMORY) * nll
        # Not after the last return that there may be: nothing would catch a rate that rises too far again.
        if 0 < self.times_lowered < MOST_LOWERED and self.highest_rate < self.regrown_rate:
            doublings = 1 / (REGROWTH_SHARE * self.steps * self.times_lowered)
            self.highest_rate = min(self.regrown_rate, self.highest_rate * 2**doublings)

    def lengthen(self, factor: float) -> None:
        """Makes all later steps `factor` times as long.

        Where they may not promise the whole loss, longer ones only as far as it falls: what helps the first few steps of such
        a run is noise to the last ones."""
        self.highest_rate *= factor
        if factor < 1 or self.promises_all:
            self.learning_rate *= factor

    def is_doubted(self, steps_done: int, nll: float) -> bool:
        """Whether the loss `nll` of the batch after `steps_done` steps is so high that the last step may have caused it.

        Only in runs whose first steps were tried, and after those."""
        is_due = bool(self.tried_steps) and steps_done - self.returned_at > max(self.tried_steps)
        may_doubt = (
            self.times_doubted < MOST_DOUBTS_SHARE * self.steps and self.times_taken_back < MOST_LOWERED
        )
        return is_due and may_doubt and not nll <= DOUBTED_RISE * self.usual_nll + DOUBTED_RISE_NATS

    def halve(self) -> None:
        """What follows a step that was taken back: all later ones are half as long."""
        self.lengthen(0.5)
        self.regrown_rate *= 0.5
        self.times_taken_back += 1

    @property
    def can_lower(self) -> bool:
        """Whether one more return may follow."""
        return self.times_lowered < MOST_LOWERED

    def lower(self, steps_done: int) -> None:
        """What follows a return after `steps_done` steps: a third of the rate.

        Where steps are measured, none takes more than a third of the highest rate that led here: where text is learned, most of the
        loss cannot be taken away, and steps that promise all of it go too far. What was too far at the start need not be so later: the highest
        rate doubles in a tenth of the steps (slower after each further return) until it is what it was, and the first steps from here
        are tried as those of the run were."""
        if not self.times_lowered and self.is_measured:
            self.regrown_rate = self.highest_rate
        self.learning_rate /= LOWERED_BY
        self.highest_rate = max(self.learning_rate, self.highest_taken / LOWERED_BY)
        self.highest_taken, self.usual_nll, self.summed_nlls = 0.0, math.nan, [0.0]
        self.returned_at = steps_done
        self.times_lowered += 1

    def state(self) -> dict[str, Any]:
        """Plain numbers and a list of them, all that another process needs to continue."""
        return {name: copy.copy(getattr(self, name)) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a former `state()`, also of versions that did not measure steps."""
        self.learning_rate = self.highest_rate = state["learning_rate"]
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))


_STATE = (
    "learning_rate",
    "times_lowered",
    "highest_rate",
    "highest_taken",
    "returned_at",
    "regrown_rate",
    "reachable_nll",
    "usual_nll",
    "times_doubted",
    "times_taken_back",
    "summed_nlls",
)
