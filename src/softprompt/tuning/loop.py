"""Learning a prompt, on one page: batches, loss through the frozen base, the prompt's gradient, a step."""

from __future__ import annotations

from collections.abc import Callable

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Splits
from softprompt.loss.gradient import Loss
from softprompt.progress.events import Event
from softprompt.progress.shown import shown
from softprompt.prompt.reparam import Form
from softprompt.tuning.joining import joining
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.run import Run
from softprompt.tuning.settle import make_plan


def tune(
    recipe: Recipe,
    *,
    lm: FrozenLM | None = None,
    splits: Splits | None = None,
    loss: Loss | None = None,
    plan: Plan | None = None,
    form: Form | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    progress: bool | None = None,
    resume: bool = False,
) -> TuneResult:
    """Learns a prompt as `recipe` says and saves the best validated one in `recipe.out`.

    `lm` and `splits` replace what the recipe would load, `loss` for FastLoss over the base, `plan` for all that
    the recipe settles, `form` for the start that it names. Held-out loss is measured before the first step too, so the result is never worse there than its start. On Ctrl-C, a loss that is
    not finite or any other failure, the best prompt so far is saved before the exception is raised. With `resume`, a
    run that was killed continues from its last checkpoint, with the same result as if it had not been killed. Raises
    the errors of softprompt.errors. Where `torchrun` started several processes, each reads its share of every step's rows
    and the first one writes. Progress is shown in terminals and notebooks, unless `progress` is False.
    """
    plan = plan or make_plan(recipe, lm=lm, splits=splits, loss=loss)
    with shown(on_event, progress) as tell, joining(plan) as (plan, processes):
        plan.settle_contexts(together=processes.count == 1)
        run = Run(plan, tell, form, processes=processes)
        learner, loss_and_gradient = run.learner, run.gradients
        try:
            run.begin(processes.same(run.newest_checkpoint() if resume else None))
            for rows in run.batches():
                nll = run.take_known_gradient()  # the first step's measured the rate
                if nll is None:
                    (nll,) = loss_and_gradient([learner.form], [rows])  # in pieces that fit into memory
                nll = run.doubt_last_step(rows, nll)  # a step that threw the loss is taken back
                run.add_keep_gradient()
                if not learner.step(nll):  # clipped and scheduled
                    raise run.not_finite(rows, nll)
                run.try_last_step()
                run.record_step(rows, nll)
                if run.validation_is_due:
                    run.validate()
                run.checkpoint()
            return run.save(run.ending)
        except BaseException as error:
            if (
                learner.steps_done
            ):  # else there is nothing worth keeping, and a former prompt in that folder stays
                run.save("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            run.close()
