"""A task: the template, the rows, how long a row may be and how it ends, settled on a base. Everything that learns or
judges takes its rows from here, so that all of them see the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.data.batch import EncodedSet, End, Layout, Overflow, encode_all, to_judge, to_learn
from softprompt.data.example import Example, Splits
from softprompt.data.preview import Preview, preview
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.data.tokenizer import Tokenizer
from softprompt.errors import RecipeError
from softprompt.tuning.init_from import natural_length
from softprompt.tuning.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """One task on one base. Make one with `task_of`.

    `max_positions` bounds a row, virtual tokens included; None where nothing does (ALiBi). Longer rows are refused, cut
    or left out, as `on_overflow` says, and the same text is cut whoever reads it."""

    template: Template
    splits: Splits
    tokenizer: Tokenizer
    max_positions: int | None
    on_overflow: Overflow
    end: End
    kind: Literal["soft", "deep"] = "soft"
    special_tokens: bool = False

    def to_learn(self, examples: Sequence[Example], *, slots: bool = True) -> EncodedSet:
        """Rows to learn from; without `slots` as a base without a prompt reads them (LoRA, full fine-tuning)."""
        return encode_all(self.layout(slots=slots and self.kind == "soft"), examples, to_learn)

    def to_judge(self, examples: Sequence[Example], *, prompt: bool) -> EncodedSet:
        """Rows to measure the loss on: the same tokens are scored with a prompt and without."""
        return encode_all(self.layout(slots=prompt and self.kind == "soft"), examples, to_judge)

    def preview(self, examples: Sequence[Example], *, show: int = 3) -> Preview:
        """What learning would make of these rows: counts over all, the first `show` token by token."""
        return preview(self.layout(slots=True), examples, show=show)

    def layout(self, *, slots: bool) -> Layout:
        """How a row of this task becomes token ids, with the template's slots or without."""
        return Layout.of(
            self.template,
            self.tokenizer,
            end=self.end,
            special_tokens=self.special_tokens,
            slots=slots,
            max_length=self.max_positions,
            on_overflow=self.on_overflow,
        )


def task_of(recipe: Recipe, base: FrozenLM | Outline, splits: Splits | None = None) -> Task:
    """The task of a recipe on a base, with its weights or without. `splits` stand in for the recipe's data."""
    splits = splits or read_splits(recipe)
    if splits.shape is not None and _unsaid(recipe):
        splits = replace(splits, notes=tuple(dict.fromkeys((*splits.notes, splits.shape.note))))
    bounds = [bound for bound in (recipe.data.max_length, longest_text(base)) if bound is not None]
    return Task(
        template=settle_template(recipe, base, splits),
        splits=splits,
        tokenizer=base.tokenizer,
        max_positions=min(bounds, default=None),
        on_overflow=recipe.data.on_overflow,
        end=recipe.data.end,
        kind=recipe.prompt.kind,
        special_tokens=recipe.data.special_tokens,
    )


def read_splits(recipe: Recipe, rows: Any = None) -> Splits:
    """The rows that the recipe names, or `rows` in memory read as it says."""
    data = recipe.data
    return load_splits(
        data.source if rows is None else rows,
        revision=data.revision,
        config=data.config,
        split=data.split,
        column=data.column,
        fields=data.fields,
        messages=data.messages,
        target=data.target,
        references=data.references,
        limit=data.limit,
        validation=data.validation,
        test=data.test,
        seed=data.seed,
        encoding=data.encoding,
        quoting=data.quoting,
        streaming=data.streaming,
    )


def settle_template(recipe: Recipe, lm: FrozenLM | Outline, splits: Splits | None = None) -> Template:
    """The recipe's template with the length of every slot; without one, that of the rows' known form."""
    data, prompt = recipe.data, recipe.prompt
    source = data.template or ("{soft}{messages}" if data.messages else "{soft}{text}")
    target = data.target
    if splits is not None and splits.shape is not None and _unsaid(recipe):
        source, target = splits.shape.template, splits.shape.target
    length = prompt.length
    if length is None and not re.search(r"\{soft:\d+\}", source):
        length = natural_length(recipe, lm)
    template = Template.parse(source, target=target, length=length)
    if prompt.kind == "deep" and not re.match(r"\{soft:\d+\}(?!.*\{soft)", str(template)):
        raise RecipeError(
            f'data.template: found "{template}", but a deep prompt stands before all text. Put its one slot in front.'
        )
    return template


def _unsaid(recipe: Recipe) -> bool:
    """Whether the recipe leaves it to the rows what is learned of them."""
    return recipe.data.template is None and recipe.data.target is None
