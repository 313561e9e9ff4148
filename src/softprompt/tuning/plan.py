"""A recipe settled on its base and data: what `tune` will do, with nothing left to derive."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import EncodedSet, epoch_order
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example, Splits
from softprompt.data.labels import are_labels
from softprompt.data.template import Template
from softprompt.loss.context_cache import GIGABYTE, Context, KeepsContexts, context_bytes, contexts_of
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.gradient import Loss
from softprompt.tuning.measuring import measurements
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import Task

LOOKED_AT = 2_000  # rows that say whether targets are labels


@dataclass(frozen=True)
class Plan:
    """Everything settled: nothing is `auto` any more, but that an automatic `learning_rate` is an upper bound, below
    which the run takes what its first gradient (`measured_rate`) and each step's say, and which its second and fourth
    step may move (`try_last_step`).

    `train` are the rows that the steps come to, `learned_from`, as tokens.
    `held_out` are the rows that choose the best step, or as many of them as are soon measured, each scored on the same tokens with a prompt and, as
    `held_out_base`, without one. They are validation rows, or the training rows if there are none."""

    recipe: Recipe
    lm: FrozenLM
    loss: Loss
    task: Task
    train: EncodedSet
    learned_from: Sequence[Example]
    held_out: Sequence[Encoded]
    held_out_base: Sequence[Encoded]
    judged_on: str
    learning_rate: float
    batch_size: int
    steps: int
    not_measured: int = 0
    """Rows that could choose the best step too, but are left out to save time."""
    start_scale: float = 1.0
    """By how much the vectors that `init: scaled` starts from are larger than the table's."""

    @property
    def template(self) -> Template:
        """The task's template, with the length of every slot."""
        return self.task.template

    @property
    def splits(self) -> Splits:
        """The task's rows."""
        return self.task.splits

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train.encoded) / self.batch_size)

    @property
    def validation_examples(self) -> int:
        """How many rows choose the best step; 0 where none are held out."""
        return len(self.held_out) if self.judged_on == "validation" else 0

    @property
    def valid_every_steps(self) -> int:
        """Steps between two measurements of the held-out loss: without a setting, a tenth to a half of all steps."""
        times = measurements(len(self.held_out), self.steps * self.batch_size)
        return self.recipe.tune.valid_every_steps or math.ceil(self.steps / times)

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts in one epoch."""
        return sum(row.trained_tokens for row in self.train.encoded)

    @cached_property
    def loss_falls_to_zero(self) -> bool:
        """Whether what is learned can be said with certainty, as labels can, or a teacher's own
        probabilities. Most of the loss of running text stays."""
        if isinstance(self.loss, DivergenceLoss):
            return True
        targets = Counter(
            tuple(token for token, trained in zip(row.ids, row.trained, strict=True) if trained)
            for row in islice(self.train.encoded, LOOKED_AT)
        )
        return are_labels(targets.values())

    @property
    def steps_promise_all(self) -> bool:
        """Whether a step may promise to take its whole loss away. Of running text that is too much for a deep prompt; a soft one's steps are
        bounded by the embeddings' scale, and as long as that allows they learn more (figures in LOG.md)."""
        return self.recipe.prompt.kind == "soft" or self.loss_falls_to_zero

    @cached_property
    def text_tokens(self) -> int:
        """Tokens of text read in one epoch, virtual ones not counted."""
        return sum(slot < 0 for row in self.train.encoded for slot in row.soft)

    def settle_contexts(self, *, together: bool) -> None:
        """Says how the loss reads text before the first virtual token from now on: that of the rows of a batch together, or
        each row's by itself, as where other runs or processes have other batches."""
        if isinstance(self.loss, KeepsContexts):
            cache = self.loss.context_cache
            if together:
                cache.read_together(self._context_groups())
            else:
                cache.read_alone()

    def _context_groups(self) -> Iterator[set[Context]]:
        """Of the held-out rows, which every validation reads, and of each batch of the first epoch."""
        yield contexts_of(self.held_out)
        encoded, lengths = self.train.encoded, self.train.lengths
        for batch in epoch_order(lengths, self.batch_size, seed=self.recipe.tune.seed, epoch=0):
            yield contexts_of(encoded[index] for index in batch)

    def rows_sha256(self) -> str:
        """Digest of every row that is learned from or judged by, as encoded."""
        digest = hashlib.sha256()  # of the rows as one JSON list, written row by row
        for number, row in enumerate(chain(self.train.encoded, self.held_out)):
            digest.update((", " if number else "[").encode())
            digest.update(json.dumps((row.ids, row.soft, row.trained)).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def remarks(self) -> list[str]:
        """Sentences about the data for the user."""
        train = self.train
        sentences = list(self.splits.notes)
        if train.truncated:
            sentences.append(f"{train.truncated} texts were cut, by {train.cut_tokens} tokens in all.")
        if train.dropped:
            sentences.append(f"{train.dropped} rows were left out because they are too long.")
        sentences += train.remarks
        contexts = contexts_of(chain(self.train.encoded, self.held_out))
        budget = self.recipe.tune.context_cache_gigabytes
        if contexts and budget:
            need = context_bytes(self.lm, contexts)
            sentences.append(
                f"Text before the soft prompt is read once and kept: {len(contexts)} contexts, "
                f"{need / GIGABYTE:.2g} GB of at most {budget:.2g} GB "
                "(tune.context_cache_gigabytes)."
            )
        if self.judged_on == "training":
            sentences.append("Nothing is held out: losses before and after are those of the training rows.")
        if len(self.learned_from) < len(self.splits.train):
            sentences.append(
                f"{len(self.learned_from):,} of {len(self.splits.train):,} rows are learned from, drawn by tune.seed: "
                f"{self.steps:,} steps take no more."
            )
        if self.not_measured:
            rows = len(self.held_out)
            ask = " Set data.validation to measure all." if self.judged_on == "validation" else ""
            sentences.append(
                f"Loss is measured on {rows:,} of {rows + self.not_measured:,} {self.judged_on} rows: with all of them, "
                f"measuring would take longer than learning.{ask}"
            )
        return sentences
