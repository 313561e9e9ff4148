"""A recipe settled on its base and data: what `tune` will do, `--dry-run` tells and `preview` shows."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.base.compiled import vectors_state
from softprompt.base.context_cache import GIGABYTE, context_bytes, contexts_of
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.limits import longest_text
from softprompt.base.outline import Outline
from softprompt.data.batch import Encoded, EncodedSet, encode_all
from softprompt.data.example import Example, Splits
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.errors import RecipeError
from softprompt.prompt.reparam import as_rows
from softprompt.tune.optim import RATE_PER_RMS, automatic_rate
from softprompt.tune.recipe import Recipe
from softprompt.tune.starts import frequent_vectors, natural_length

BATCH_SIZE = 8


@dataclass(frozen=True)
class Plan:
    """Everything settled: nothing is `auto` any more.

    `held_out` are the rows that choose the best step, each scored on the same tokens with a prompt and, as
    `held_out_base`, without one. They are validation rows, or the training rows where there are none."""

    recipe: Recipe
    lm: FrozenLM
    splits: Splits
    template: Template
    train: EncodedSet
    held_out: Sequence[Encoded]
    held_out_base: Sequence[Encoded]
    judged_on: str
    learning_rate: float
    batch_size: int
    steps: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train.encoded) / self.batch_size)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts in one epoch."""
        return sum(row.trained_tokens for row in self.train.encoded)

    @property
    def text_tokens(self) -> int:
        """Tokens of text read in one epoch, virtual ones not counted."""
        return sum(place < 0 for row in self.train.encoded for place in row.soft)

    def rows_sha256(self) -> str:
        """Digest of every row that is learned from or judged by, as encoded."""
        rows = [(one.ids, one.soft, one.trained) for one in (*self.train.encoded, *self.held_out)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def remarks(self) -> list[str]:
        """What the one who waits should know of the data, in sentences."""
        train = self.train
        said = list(self.splits.notes)
        if train.truncated:
            said.append(f"{train.truncated} texts were cut, by {train.cut_tokens} tokens in all.")
        if train.dropped:
            said.append(f"{train.dropped} rows were left out because they are too long.")
        contexts = contexts_of([*self.train.encoded, *self.held_out])
        if contexts and self.lm.contexts.budget_bytes:
            need = context_bytes(self.lm, contexts)
            said.append(
                f"Text before the soft prompt is read once and kept: {len(contexts)} contexts, "
                f"{need / GIGABYTE:.2g} GB of at most {self.lm.contexts.budget_bytes / GIGABYTE:.2g} GB "
                "(tune.context_cache_gigabytes)."
            )
        if self.judged_on == "training":
            said.append("Nothing is held out: losses before and after are those of the training rows.")
        return said


def make_plan(recipe: Recipe, *, lm: FrozenLM | None = None, splits: Splits | None = None) -> Plan:
    """Load what is not in hand, encode every row, and settle all that is `auto`."""
    data = recipe.data
    splits = splits or read_splits(recipe)
    lm = lm or FrozenLM.load(
        recipe.base,
        revision=recipe.base_revision,
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    lm.int8 = recipe.tune.int8
    lm.prepare()
    lm.contexts.budget_bytes = round(recipe.tune.context_cache_gigabytes * GIGABYTE)
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
