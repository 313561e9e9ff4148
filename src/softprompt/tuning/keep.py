"""Keeping the bare base's behaviour on general text while a task is learned: a pull towards its predictions there.

A prompt that was learned for one task changes what the base predicts of any text behind it. The KL divergence from the
bare base on general text, added to the task's loss, holds that down (as the penalty of RLHF does: Ziegler et al. 2019).
The text is written by the base itself, so that none has to be given, or comes from a file.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.data.tokenizer import special_tokens_of, tokens
from softprompt.errors import DataError
from softprompt.inference.generate import generate
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients
from softprompt.loss.soft_targets import SoftTargets
from softprompt.prompt.init import FREQUENT
from softprompt.prompt.reparam import Form
from softprompt.tuning.plan import Plan

PASSAGES, PASSAGE_TOKENS, FEWEST_TOKENS = 48, 48, 8
PASSAGES_A_STEP = 2
TOP_K = 20  # the base's likeliest tokens that are kept at each position, beside the rest as one


class Keeper:
    """Adds to a form's gradient the pull towards the bare base on general text, on a few passages a step."""

    def __init__(self, plan: Plan) -> None:
        lm, tune = plan.lm, plan.recipe.tune
        passages = (
            written_passages(lm, tune.seed)
            if tune.keep_text is None
            else read_passages(lm, Path(tune.keep_text))
        )
        rows = [
            Encoded(ids, [-1] * len(ids), [False] + [True] * (len(ids) - 1), number, 0)
            for number, ids in enumerate(passages)
        ]
        fast = FastLoss(lm, recompute=tune.gradient_checkpointing)
        loss = DivergenceLoss(fast, {row.row: _targets(lm, fast, row) for row in rows}, tune.keep)
        length = plan.template.soft_length
        self.rows = [row.behind_slot(length) for row in rows] if plan.recipe.prompt.kind == "soft" else rows
        self.gradients = Gradients(loss, PASSAGES_A_STEP)

    def add_gradient(self, form: Form, step: int) -> float:
        """Adds the gradient of step `step`, which decides the passages. Returns their weighted divergence in nats."""
        first = step * PASSAGES_A_STEP
        rows = [self.rows[(first + n) % len(self.rows)] for n in range(PASSAGES_A_STEP)]
        (divergence,) = self.gradients([form], [rows])
        return divergence


def written_passages(lm: FrozenLM, seed: int) -> list[list[int]]:
    """Passages that the bare base writes at temperature 1, each from a frequent token drawn by `seed`."""
    rng = random.Random(f"keep/{seed}")
    special = {*lm.tokenizer.all_special_ids}
    frequent = [token for token in range(min(FREQUENT, lm.vocab_size)) if token not in special]
    starts = [str(lm.tokenizer.decode([rng.choice(frequent)])) for _ in range(PASSAGES)]
    starts = [text if text.strip() else f"The{text}" for text in starts]
    settings = DecodeSettings(max_new_tokens=PASSAGE_TOKENS, temperature=1.0, seed=seed)
    written = generate(lm, starts, None, settings)
    passages = [
        [*_ids(lm, start), *text.token_ids][:PASSAGE_TOKENS]
        for start, text in zip(starts, written, strict=True)
    ]
    long_enough = [ids for ids in passages if len(ids) >= FEWEST_TOKENS]
    if not long_enough:
        raise DataError(
            f"tune.keep: {lm.name} writes no text of {FEWEST_TOKENS} tokens or more. Give a file of general text with "
            "tune.keep_text."
        )
    return long_enough


def read_passages(lm: FrozenLM, path: Path) -> list[list[int]]:
    """Passages from the paragraphs of a file of running text, spread evenly over it. Raises DataError."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"tune.keep_text: {path} cannot be read ({error}). Give a UTF-8 text file."
        ) from error
    passages = [_ids(lm, paragraph.strip())[:PASSAGE_TOKENS] for paragraph in text.split("\n\n")]
    long_enough = [ids for ids in passages if len(ids) >= FEWEST_TOKENS]
    if not long_enough:
        raise DataError(
            f"tune.keep_text: {path} has no paragraph of {FEWEST_TOKENS} tokens or more. Give a file of running text."
        )
    return long_enough[:: max(1, len(long_enough) // PASSAGES)][:PASSAGES]


def _ids(lm: FrozenLM, text: str) -> list[int]:
    special = special_tokens_of(lm.tokenizer)
    return [*special.before, *tokens(lm.tokenizer, text, special, continues=False)]


@torch.no_grad()
def _targets(lm: FrozenLM, fast: FastLoss, row: Encoded) -> SoftTargets:
    """The bare base's probabilities at every trained token of a passage."""
    return SoftTargets.of(lm.logits(fast.hidden(collate([row]), None)), TOP_K)
