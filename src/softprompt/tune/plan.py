"""A recipe settled on its base and data: what `tune` will do, `--dry-run` tells and `preview` shows."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base.compiled import text_state, vectors_state
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Encoded, EncodedSet, encode_all
from softprompt.data.example import Example, Splits
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.data.tokenizer import habits
from softprompt.errors import RecipeError
from softprompt.prompt import init
from softprompt.prompt.reparam import Direct, Form, Plain
from softprompt.tune.optim import automatic_rate
from softprompt.tune.recipe import Recipe

LENGTH = 20  # Lester et al. 2021: little is gained beyond 20 vectors
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
    template = settle_template(recipe, lm)
    deep = recipe.prompt.kind == "deep"

    def encoded(examples: Sequence[Example], base_only: bool, score_first: bool) -> EncodedSet:
        return encode_all(
            template,
            examples,
            lm.tokenizer,
            max_length=data.max_length or lm.context,
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


def settle_template(recipe: Recipe, lm: FrozenLM) -> Template:
    """The recipe's template with the length of every slot."""
    data, prompt = recipe.data, recipe.prompt
    source = data.template or ("{soft}{messages}" if data.messages else "{soft}{text}")
    length = prompt.length
    if length is None and not re.search(r"\{soft:\d+\}", source):
        length = len(_start_ids(lm, prompt.init_text)) if prompt.init_text else LENGTH
    template = Template.parse(source, target=data.target, length=length)
    if prompt.kind == "deep" and not re.match(r"\{soft:\d+\}(?!.*\{soft)", str(template)):
        raise RecipeError(
            f'data.template: found "{template}", but a deep prompt stands before all text. Put its one slot in front.'
        )
    return template


def start(plan: Plan) -> Form:
    """The trained form at its starting values."""
    recipe = plan.recipe
    name = recipe.prompt.init
    if name == "auto":
        name = "text" if recipe.prompt.init_text else "vocabulary"
    generator = torch.Generator().manual_seed(recipe.tune.seed)
    starts: Mapping[str, Callable[[Plan, torch.Generator], Plain]] = (
        DEEP_STARTS if recipe.prompt.kind == "deep" else STARTS
    )
    return Direct(starts[name](plan, generator))


def _random(plan: Plan, generator: torch.Generator) -> Tensor:
    return init.random_at_scale(plan.lm.embedding_VD, plan.template.soft_length, generator)


def _vocabulary(plan: Plan, generator: torch.Generator) -> Tensor:
    rows = init.sampled_vocabulary(
        torch.arange(plan.lm.vocabulary)[:, None].float(),
        plan.template.soft_length,
        generator,
        plan.lm.tokenizer.all_special_ids,
    )
    return plan.lm.embed(rows[:, 0].long().to(plan.lm.device)).float().cpu()


def _text(plan: Plan, generator: torch.Generator) -> Tensor:
    ids = _start_ids(plan.lm, plan.recipe.prompt.init_text or "")
    return init.token_embeddings(_embedded(plan.lm, ids), plan.template.soft_length)


def _labels(plan: Plan, generator: torch.Generator) -> Tensor:
    target = plan.template.target or ""
    counted = Counter(example.fields[target] for example in plan.splits.train)
    vectors = [
        _embedded(plan.lm, _text_ids(plan.lm, " " + label.strip())) for label, _ in counted.most_common()
    ]
    return init.class_labels(vectors, plan.lm.embedding_VD, plan.template.soft_length, generator)


def _read_by_base(
    start: Callable[[Plan, torch.Generator], Tensor],
) -> Callable[[Plan, torch.Generator], Plain]:
    """A deep start: the keys and values that the base holds after reading a shallow one."""
    return lambda plan, generator: vectors_state(plan.lm, start(plan, generator))


def _text_read_by_base(plan: Plan, generator: torch.Generator) -> Plain:
    return text_state(plan.lm, plan.recipe.prompt.init_text or "", plan.template.soft_length)


STARTS: dict[str, Callable[[Plan, torch.Generator], Tensor]] = {
    "random": _random,
    "vocabulary": _vocabulary,
    "text": _text,
    "labels": _labels,
}
DEEP_STARTS: dict[str, Callable[[Plan, torch.Generator], Plain]] = {
    **{name: _read_by_base(vectors) for name, vectors in STARTS.items()},
    "text": _text_read_by_base,
}


def _embedded(lm: FrozenLM, ids: Sequence[int]) -> Tensor:
    return lm.embed(torch.tensor(ids, device=lm.device)).float().cpu()


def _start_ids(lm: FrozenLM, text: str) -> list[int]:
    """The text as the base wants any text to begin: behind a start token (BOS) where its tokenizer puts one."""
    return [*habits(lm.tokenizer).before, *_text_ids(lm, text)]


def _text_ids(lm: FrozenLM, text: str) -> list[int]:
    ids: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RecipeError(f"prompt.init_text: found {text!r}, which has no token. Give some text.")
    return ids


def _batch_size(recipe: Recipe) -> int:
    return BATCH_SIZE if recipe.tune.batch_size == "auto" else recipe.tune.batch_size


def _rate(recipe: Recipe, lm: FrozenLM) -> float:
    if recipe.tune.learning_rate == "auto":
        return automatic_rate(lm.embedding_VD, recipe.tune.optimizer)
    return recipe.tune.learning_rate
