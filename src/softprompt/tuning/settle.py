"""A Plan from a recipe: loads what is missing, encodes the rows, and derives everything that is `auto`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from softprompt.base.from_settings import base_of
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Splits
from softprompt.data.held_out import Draw
from softprompt.errors import RecipeError
from softprompt.inference.compiled import vectors_state
from softprompt.loss.context_cache import GIGABYTE
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Loss
from softprompt.prompt.reparam import as_rows
from softprompt.settings.base_settings import BaseSettings
from softprompt.tuning.measuring import MOST, rows_measured
from softprompt.tuning.optim import RATE_PER_RMS, automatic_rate
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.starts import frequent_vectors, start_scale
from softprompt.tuning.task import naming_rows, read_splits, task_of

BATCH_SIZE = 8


def make_plan(
    recipe: Recipe, *, lm: FrozenLM | None = None, splits: Splits | None = None, loss: Loss | None = None
) -> Plan:
    """Loads what is missing, encodes every row, and settles all that is `auto`. `loss` may be shared by plans of one
    base and equal settings of it."""
    splits = splits or read_splits(recipe)
    lm = lm or load_base(recipe)
    if lm.head.shard is not None and recipe.prompt.kind == "deep":
        raise RecipeError(
            "spread is tensor, where each process has its own heads, and prompt.kind is deep, whose keys and values are of "
            "all heads. Set spread to layers."
        )
    task = task_of(recipe, lm, splits)
    learned_from = _learned_from(recipe, splits.train)
    train = task.to_learn(learned_from)
    steps_per_epoch = math.ceil(len(train.encoded) / settled_batch_size(recipe))
    steps = recipe.tune.epochs * steps_per_epoch
    steps = min(steps, recipe.tune.max_steps or steps)
    judged = _judged(recipe, splits, learned=steps * settled_batch_size(recipe))
    with naming_rows("validation" if splits.validation else "training"):
        held_out = task.to_judge(judged, prompt=True).encoded
        held_out_base = task.to_judge(judged, prompt=False).encoded
    task.check_judged(splits.test, "test")  # else it would be refused after all that learning
    scale = start_scale(recipe, lm)
    return Plan(
        recipe=recipe,
        lm=lm,
        loss=loss or fast_loss(recipe, lm),
        task=task,
        train=train,
        learned_from=learned_from,
        held_out=held_out,
        held_out_base=held_out_base,
        judged_on="validation" if splits.validation else "training",
        learning_rate=settled_rate(recipe, lm, scale),
        start_scale=scale,
        batch_size=settled_batch_size(recipe),
        steps=steps,
        not_measured=len(splits.validation or splits.train) - len(judged),
    )


def _learned_from(recipe: Recipe, rows: Sequence[Example]) -> Sequence[Example]:
    """The rows that the run's steps take, drawn by its seed where they are a part of the first epoch; the others need not be
    tokenised."""
    tune = recipe.tune
    count = (tune.max_steps or math.inf) * settled_batch_size(recipe)
    # Which rows are dropped is known of tokenised ones alone.
    if count >= len(rows) or recipe.data.on_overflow == "drop":
        return rows
    return Draw(rows, tune.seed).take(int(count), "limit")


def _judged(recipe: Recipe, splits: Splits, *, learned: int) -> Sequence[Example]:
    """The rows that choose the best step of a run that learns from `learned` rows: all validation rows that were asked for.

    Of those that the source brings, or of the training rows where none are held out, as many as are soon measured."""
    if splits.validation and recipe.data.validation is not None:
        return splits.validation
    rows, times = (splits.validation, MOST) if splits.validation else (splits.train, 1)
    count = rows_measured(len(rows), learned, times=times)
    if count == len(rows):
        return rows
    return Draw(rows, recipe.data.seed).take_by_label(count, recipe.data.target)


def load_base(recipe: BaseSettings) -> FrozenLM:
    """The base as the recipe names it."""
    return base_of(recipe)


def fast_loss(recipe: Recipe, lm: FrozenLM) -> FastLoss:
    """The loss that a recipe's settings ask for."""
    tune = recipe.tune
    return FastLoss(
        lm,
        int8_products=tune.int8_products,
        context_bytes=round(tune.context_cache_gigabytes * GIGABYTE),
        recompute=tune.gradient_checkpointing,
        first_layer=recipe.prompt.first_layer(lm.num_layers),
    )


def settled_batch_size(recipe: Recipe) -> int:
    """Rows a step."""
    return BATCH_SIZE if recipe.tune.batch_size == "auto" else recipe.tune.batch_size


def settled_rate(recipe: Recipe, lm: FrozenLM, start_scale: float = 1.0) -> float:
    """The learning rate, or what bounds an automatic one where a start is `start_scale` times as large as the table's vectors."""
    if isinstance(recipe.tune.learning_rate, str):  # auto, or the middle of what `find` tries
        scale = frequent_vectors(lm)
        if recipe.prompt.kind == "deep":
            spread = torch.linspace(0, len(scale) - 1, min(64, len(scale))).long()
            scale = as_rows(vectors_state(lm, scale[spread]))
        return automatic_rate(scale, start_scale * RATE_PER_RMS[recipe.tune.optimizer][recipe.prompt.kind])
    return recipe.tune.learning_rate
