"""Starting points of a soft prompt: one function each, all returning float32 [P, D].

In short runs the start decides more than any other setting: in PEFT's own method comparison (Llama-3.2-3B, GSM8K),
prompt tuning is right in 0.234 of all answers from random vectors and in 0.343 from sampled vocabulary. Every start
here has the embedding table's own scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.errors import RecipeError

FREQUENT = 5_000  # Lester et al. 2021, 3.2: byte-pair ids are roughly sorted by frequency


def random_at_scale(embedding_VD: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and standard deviation of each column of the table.

    PEFT draws from N(0, 1), tens of times the scale of a language model's table (peft#2816)."""
    table_VD = _rows(embedding_VD, FREQUENT)
    noise_PD = torch.randn(length, table_VD.shape[1], generator=generator)
    return table_VD.mean(0) + noise_PD * table_VD.std(0)


def sampled_vocabulary(
    embedding_VD: Tensor, length: int, generator: torch.Generator, leave_out: Sequence[int] = ()
) -> Tensor:
    """Copies `length` different rows of the table, drawn from its first 5,000 without `leave_out` (special tokens).

    Lester et al. 2021, 3.2."""
    banned = set(leave_out)
    candidates = [
        row for row in range(min(FREQUENT + len(banned), embedding_VD.shape[0])) if row not in banned
    ]
    if len(candidates) < length:
        raise RecipeError(
            f"prompt.length: found {length}, but the base has {len(candidates)} tokens to sample from. "
            "Take a shorter prompt, or prompt.init: random."
        )
    order = torch.randperm(len(candidates), generator=generator)[:length]
    return embedding_VD[torch.tensor(candidates)[order]].float().cpu()


def token_embeddings(embeddings_TD: Tensor, length: int | None = None) -> Tensor:
    """The embeddings of a text, repeated or cut at the end to `length` rows (as they are, if None).

    At exactly the text's own length, the first step is the engineered prompt itself."""
    embeddings_TD = embeddings_TD.detach().float().cpu()
    if not len(embeddings_TD):
        raise RecipeError("prompt.init_text: found no token in it, wanted some text.")
    if length is None:
        return embeddings_TD.clone()
    return embeddings_TD[torch.arange(length) % len(embeddings_TD)].clone()


def class_labels(
    label_embeddings: Sequence[Tensor], embedding_VD: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """One row a label (the mean of its tokens' embeddings), the rest filled from the frequent vocabulary.

    Lester et al. 2021, 3.2."""
    if not label_embeddings:
        raise RecipeError("prompt.init is labels, but the training rows have no label. Name data.target.")
    rows = torch.stack([label_TD.detach().float().cpu().mean(0) for label_TD in label_embeddings])[:length]
    if len(rows) < length:
        rows = torch.cat([rows, sampled_vocabulary(embedding_VD, length - len(rows), generator)])
    return rows


def resized(rows_PX: Tensor, length: int) -> Tensor:
    """The rows of another prompt, repeated or cut at the end to `length` (transfer: Vu et al. 2022)."""
    rows_PX = rows_PX.detach().float().cpu()
    return rows_PX[torch.arange(length) % len(rows_PX)].clone()


def mean(prompts: Sequence[Tensor], length: int) -> Tensor:
    """The mean of several prompts, each brought to `length` rows first."""
    return torch.stack([resized(rows_PX, length) for rows_PX in prompts]).mean(0)


def concatenation(prompts: Sequence[Tensor], length: int) -> Tensor:
    """The rows of several prompts one after another, repeated or cut to `length`."""
    return resized(torch.cat([rows_PX.detach().float().cpu() for rows_PX in prompts]), length)


def _rows(embedding_VD: Tensor, count: int) -> Tensor:
    return embedding_VD[:count].float().cpu()
