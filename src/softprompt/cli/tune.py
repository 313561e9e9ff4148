"""`softprompt tune`: a recipe, flags, or both, to a prompt on disk."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.preview import show_preview
from softprompt.cli.screen import emit, fact, figure, heading, line, screen, size, to_copy
from softprompt.progress.console import Screen
from softprompt.progress.runs import ShowProgress
from softprompt.tuning.recipe import Recipe

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.tuning.plan import Plan
    from softprompt.tuning.result import TuneResult


EXAMPLE = (
    "softprompt tune --data builtin:messages --target label "
    '--template "{text}{soft:10} {label}" --out runs/mine'
)


@takes(Recipe)
def command(
    recipe: Recipe,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, and how, without training.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was killed, from its last checkpoint.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Learn a soft prompt from a recipe, or from flags alone."""
    console = screen(as_json=as_json)
    if dry_run:
        record = show_plan(console, recipe)
    else:
        result = learn(console, recipe, resume=resume)
        show_result(console, result)
        record = result.to_record()
    if as_json:
        emit(record)


def learn(console: Screen, recipe: Recipe, lm: FrozenLM | None = None, *, resume: bool = False) -> TuneResult:
    """Runs the recipe with its progress on the screen. After Ctrl-C, says what was kept before it continues."""
    asked.demand_paths(recipe)
    from softprompt.tuning.loop import tune

    with ShowProgress(console) as progress:
        try:
            return tune(recipe, lm=lm, on_event=progress, progress=False, resume=resume)
        except KeyboardInterrupt:
            line(console, asked.RESUME)
            if progress.saved is not None:
                best = "best " if progress.judged == "held-out" else ""
                line(console, f"The {best}prompt so far is kept in {progress.saved}.")
            raise


def show_result(console: Screen, result: TuneResult) -> None:
    """Losses before and after, where the prompt lies, and what to do next."""
    heading(console, "result")
    fact(
        console,
        result.loss_name,
        f"{describe_losses(result)}; base alone {figure(result.nll_base)} nats per token",
    )
    if result.warning:
        line(console, result.warning, "bold")
    if result.selected_by != "nll":
        fact(
            console,
            result.selected_by.replace("_", " "),
            f"{figure(result.score_before)} at the start, {figure(result.score_after)} {_kept_at(result)}",
        )
    pace = result.tokens / result.seconds if result.seconds else math.nan
    fact(console, "work", f"{result.tokens:,} tokens in {result.seconds:.0f} s ({pace:,.0f} tokens/s)")
    fact(console, "peak memory", size(result.peak_memory_bytes))
    fact(console, "prompt", f"{result.path} ({size(result.prompt_bytes)} of vectors)")
    where = shlex.quote(result.path)
    base = "" if result.base == "builtin" else f" --base {shlex.quote(result.base)}"
    heading(console, "next")
    to_copy(console, f'softprompt generate{base} --prompt {where} --side-by-side "..."')
    to_copy(console, f"softprompt inspect {where}")


def describe_losses(result: TuneResult) -> str:
    """The loss that a run was judged by, before and after."""
    return (
        f"{figure(result.nll_before)} at the start, {figure(result.nll_after)} {_kept_at(result)} "
        f"({result.best_step} of {result.steps})"
    )


def _kept_at(result: TuneResult) -> str:
    """The step that was kept; without held-out rows none is known to be the best."""
    return "at the best step" if result.judged_on == "validation" else "at the step that is kept"


def show_plan(console: Screen, recipe: Recipe) -> dict[str, Any]:
    """All that a run would do, without its first step."""
    asked.demand_paths(recipe)
    from softprompt.tuning.settle import make_plan

    plan = make_plan(recipe)
    show_base(console, plan.lm)
    heading(console, "what would be trained")
    shown = plan.task.preview(plan.splits.train, show=2)
    show_preview(console, shown)
    heading(console, "how")
    record = planned(plan)
    for name in ("steps", "batch_size", "learning_rate", "trained_tokens", "judged_on"):
        fact(console, name.replace("_", " "), record[name])
    fact(console, "rows", f"{record['examples']} to learn from, {record['validation_examples']} to choose by")
    fact(console, "would write", recipe.out)
    return record


def planned(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "dry_run": True,
        "base": asked.describe_base(plan.lm),
        "template": str(plan.template),
        "virtual_tokens": plan.template.soft_length,
        "examples": len(plan.train.encoded),
        "validation_examples": plan.validation_examples,
        "test_examples": len(plan.splits.test),
        "trained_tokens": plan.trained_tokens,
        "truncated_rows": plan.train.truncated,
        "dropped_rows": plan.train.dropped,
        "judged_on": plan.judged_on,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "path": plan.recipe.out,
    }


def show_base(console: Screen, lm: FrozenLM) -> None:
    """The base: its size, frozen, its dtype and why, its fingerprint."""
    base = asked.describe_base(lm)
    heading(console, f"the base: {base['name']}")
    fact(
        console,
        "size",
        f"{lm.num_parameters:,} weights, all frozen: {lm.num_layers} layers, width {lm.width}",
    )
    fact(console, "vocabulary", f"{lm.vocab_size:,} tokens")
    fact(console, "dtype", f"{base['dtype']} on {base['device']}: {base['dtype_reason']}")
    fact(console, "fingerprint", base["fingerprint"])
