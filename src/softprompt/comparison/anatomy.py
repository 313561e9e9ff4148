"""A learned prompt seen from outside: its norms, and the tokens that its vectors lie near."""

from __future__ import annotations

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.records import Anatomy, Layer, Nearest, Vector
from softprompt.prompt.soft_prompt import DeepPrompt, Prompt

NEAREST = 3
MOST = (0.01, 0.99)  # between these shares of the table's norms lie 98 of 100 tokens


def anatomy(lm: FrozenLM, prompt: Prompt, nearest: int = NEAREST) -> Anatomy:
    """A soft prompt: each vector's norm beside the embedding table's, and its nearest tokens by cosine.

    A deep prompt: the mean norm of keys and values in each layer. Nearest tokens are a hint and no translation
    (Bailey et al. 2023): a vector may do what no token does."""
    if isinstance(prompt, DeepPrompt):
        layers = [
            Layer(float(keys.flatten(1).norm(dim=1).mean()), float(values.flatten(1).norm(dim=1).mean()))
            for keys, values in zip(prompt.keys_LPHK, prompt.values_LPHK, strict=True)
        ]
        return Anatomy("deep", prompt.length, layers=tuple(layers))
    # Cosine and not distance: norms of learned vectors often lie far outside the table's, and would decide alone.
    table_VD = lm.embedding_VD.detach().float().cpu()
    rows_PD = prompt.embeddings_PD
    cosine_PV = (
        torch.nn.functional.normalize(rows_PD, dim=1) @ torch.nn.functional.normalize(table_VD, dim=1).T
    )
    top = cosine_PV.topk(min(nearest, table_VD.shape[0]), dim=1)
    # Quantiles and not extremes: unused tokens keep the norm of their initialisation.
    ordered_V = table_VD.norm(dim=1).sort().values
    low, middle, high = (
        float(ordered_V[int(share * (len(ordered_V) - 1))]) for share in (MOST[0], 0.5, MOST[1])
    )
    vectors = [
        Vector(
            float(rows_PD[row].norm()),
            tuple(
                Nearest(str(lm.tokenizer.decode([int(token)])), round(float(cosine), 4))
                for token, cosine in zip(top.indices[row], top.values[row], strict=True)
            ),
        )
        for row in range(prompt.length)
    ]
    return Anatomy("soft", prompt.length, middle, (low, high), tuple(vectors))
