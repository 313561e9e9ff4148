"""The learning rate that suits a base and its rows: measured from one gradient, before the first step."""

from __future__ import annotations

import copy

from softprompt.data.batch import epoch_order
from softprompt.loss.gradient import Gradients
from softprompt.prompt.reparam import Form
from softprompt.tuning.learner import Learner
from softprompt.tuning.plan import Plan

PROMISED_SHARE = 1.0  # of the loss: what the first step may promise to take away (figures in LOG.md)


def measured_rate(plan: Plan, gradients: Gradients, form: Form) -> float:
    """The rate at which the first step, to first order, takes away the whole loss, or `plan.learning_rate` if lower.

    A share of the embeddings' scale says how far a vector can go, but not how steep the loss is: on a base of 30
    layers and width 576 the step that suits a small base promises 3 to 6 times the whole loss and lands far beyond
    the valley. Dividing the loss by the slope along the optimiser's own step is Polyak's step size (1987; Loizou et
    al. 2021 for batches, with an upper bound as here). Costs one gradient of the first batch. The same base, rows and
    settings give the same rate. `form` is what will be learned, at its start; it is not changed.

    This is the lowest rate of the run: later steps take more, up to the bound, where their own loss allows it
    (`Learner.step`), since the slope falls as a prompt is learned. They never take less: a batch's slope holds its noise
    too, and by the end of a deep prompt's run on a large base hardly anything else (figures in LOG.md)."""
    tune = plan.recipe.tune.model_copy(update={"weight_decay": 0.0})
    learner = Learner(copy.deepcopy(form), tune, 1.0, plan.steps)
    order = epoch_order(plan.train.lengths, plan.batch_size, seed=tune.seed, epoch=0)
    (nll,) = gradients([learner.form], [[plan.train.encoded[index] for index in order[0]]])
    fall = learner.promised_fall()
    if not fall > 0 or not nll > 0:  # a flat start, or one that is not finite, which the first step reports
        return plan.learning_rate
    return min(plan.learning_rate, float(f"{PROMISED_SHARE * nll / fall:.1e}"))
