"""A preview of what a recipe would learn, token by token, without loading any weights of the base."""

from __future__ import annotations

from softprompt.base.outline import Outline
from softprompt.data.example import Splits
from softprompt.data.preview import Preview
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import task_of


def preview(recipe: Recipe, *, splits: Splits | None = None, show: int = 3) -> Preview:
    """Encodes the training rows as `tune(recipe)` would and counts what comes of them; the first `show` token by token.

    `splits` replace the recipe's data. Raises DataError where no row could be encoded, BaseError for a base that
    is not one."""
    base = Outline.load(
        recipe.base, revision=recipe.base_revision, trust_remote_code=recipe.trust_remote_code
    )
    task = task_of(recipe, base, splits)
    return task.preview(task.splits.train, show=show)
