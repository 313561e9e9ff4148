"""From a recipe to a Plan: loads what is not in hand, encodes the rows, and derives everything that is `auto`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.data.batch import EncodedSet, encode_all
from softprompt.data.example import Example, Splits
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.errors import RecipeError
from softprompt.inference.compiled import vectors_state
from softprompt.loss.context_cache import GIGABYTE
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Loss
from softprompt.prompt.reparam import as_rows
from softprompt.tuning.optim import RATE_PER_RMS, automatic_rate
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.starts import frequent_vectors, natural_length

BATCH_SIZE = 8


def make_plan(
    recipe: Recipe, *, lm: FrozenLM | None = None, splits: Splits | None = None, loss: Loss | None = None
) -> Plan:
    """Load what is not in hand, encode every row, and settle all that is `auto`. `loss` may be shared by plans of one
    base and equal settings of it."""
    data = recipe.data
    splits = splits or read_splits(recipe)
    lm = lm or FrozenLM.load(
        recipe.base,
        revision=recipe.base_revision,
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    loss = loss or fast_loss(recipe, lm)
    template = settle_template(recipe, lm)
    deep = recipe.prompt.kind == "deep"

    def encoded(examples: Sequence[Example], base_only: bool, score_first: bool) -> EncodedSet:
        return encode_all(
            template,
            examples,
            lm.tokenizer,
            max_length=room(recipe, lm),
            on_overflow=data.on_overflow,
            end=data.end,
            base_only=base_only or deep,
            score_first=score_first,
        )

    judged = splits.validation or splits.train
    train = encoded(splits.train, False, True)
    steps_per_epoch = math.ceil(len(train.encoded) / _batch_size(recipe))
    steps = recipe.tune.epochs * steps_per_epoch
    return Plan(
        recipe=recipe,
        lm=lm,
        loss=loss,
        splits=splits,
        template=template,
        train=train,
        held_out=encoded(judged, False, False).encoded,
        held_out_base=encoded(judged, True, False).encoded,
        judged_on="validation" if splits.validation else "training",
        learning_rate=_rate(recipe, lm),
        batch_size=_batch_size(recipe),
        steps=min(steps, recipe.tune.max_steps or steps),
    )


def fast_loss(recipe: Recipe, lm: FrozenLM) -> FastLoss:
    """The loss that a recipe's settings ask for."""
    tune = recipe.tune
    return FastLoss(
        lm,
        int8_products=tune.int8,
        context_bytes=round(tune.context_cache_gigabytes * GIGABYTE),
        recompute=tune.gradient_checkpointing,
    )


def room(recipe: Recipe, lm: FrozenLM | Outline) -> int | None:
    """Longest row in positions, virtual ones included: what the recipe says, within what the base reads exactly."""
    bounds = [bound for bound in (recipe.data.max_length, longest_text(lm)) if bound is not None]
    return min(bounds, default=None)


def read_splits(recipe: Recipe) -> Splits:
    """The rows that the recipe names."""
    data = recipe.data
    return load_splits(
        data.source,
        revision=data.revision,
        config=data.config,
        split=data.split,
        column=data.column,
        fields=data.fields,
        messages=data.messages,
        target=data.target,
        limit=data.limit,
        validation=data.validation,
        test=data.test,
        seed=data.seed,
        encoding=data.encoding,
        streaming=data.streaming,
    )


def settle_template(recipe: Recipe, lm: FrozenLM | Outline) -> Template:
    """The recipe's template with the length of every slot."""
    data, prompt = recipe.data, recipe.prompt
    source = data.template or ("{soft}{messages}" if data.messages else "{soft}{text}")
    length = prompt.length
    if length is None and not re.search(r"\{soft:\d+\}", source):
        length = natural_length(recipe, lm)
    template = Template.parse(source, target=data.target, length=length)
    if prompt.kind == "deep" and not re.match(r"\{soft:\d+\}(?!.*\{soft)", str(template)):
        raise RecipeError(
            f'data.template: found "{template}", but a deep prompt stands before all text. Put its one slot in front.'
        )
    return template


def _batch_size(recipe: Recipe) -> int:
    return BATCH_SIZE if recipe.tune.batch_size == "auto" else recipe.tune.batch_size


def _rate(recipe: Recipe, lm: FrozenLM) -> float:
    if isinstance(recipe.tune.learning_rate, str):  # auto, or the middle of what `find` tries
        scale = frequent_vectors(lm)
        if recipe.prompt.kind == "deep":
            spread = torch.linspace(0, len(scale) - 1, min(64, len(scale))).long()
            scale = as_rows(vectors_state(lm, scale[spread]))
        return automatic_rate(scale, RATE_PER_RMS[recipe.tune.optimizer][recipe.prompt.kind])
    return recipe.tune.learning_rate
