"""What a learned prompt looks like from outside: its norms, and the tokens its vectors lie near."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.prompt.soft_prompt import DeepPrompt, Prompt

NEAREST = 3


def anatomy(lm: FrozenLM, prompt: Prompt) -> dict[str, Any]:
    """Plain data. A soft prompt: each vector's norm beside the embedding table's, and its nearest tokens by cosine.

    A deep prompt: the mean norm of keys and values in each layer. Nearest tokens are a hint and no translation
    (Bailey et al. 2023): a vector may do what no token does."""
    if isinstance(prompt, DeepPrompt):
        return {
            "kind": "deep",
            "length": prompt.length,
            "layers": [
                {
                    "keys": float(keys.flatten(1).norm(dim=1).mean()),
                    "values": float(values.flatten(1).norm(dim=1).mean()),
                }
                for keys, values in zip(prompt.keys_LPHK, prompt.values_LPHK, strict=True)
            ],
        }
    table_VD = lm.embedding_VD.detach().float().cpu()
    norms_V = table_VD.norm(dim=1)
    rows_PD = prompt.embeddings_PD
    cosine_PV = (
        torch.nn.functional.normalize(rows_PD, dim=1) @ torch.nn.functional.normalize(table_VD, dim=1).T
    )
    top = cosine_PV.topk(min(NEAREST, table_VD.shape[0]), dim=1)
    ordered_V = norms_V.sort().values
    low, middle, high = (float(ordered_V[int(share * (len(ordered_V) - 1))]) for share in (0.01, 0.5, 0.99))
    return {
        "kind": "soft",
        "length": prompt.length,
        "table_norm_median": middle,
        "table_norm_range": [low, high],
        "vectors": [
            {
                "norm": float(rows_PD[row].norm()),
                "nearest": [
                    {"token": str(lm.tokenizer.decode([int(token)])), "cosine": round(float(cosine), 3)}
                    for token, cosine in zip(top.indices[row], top.values[row], strict=True)
                ],
            }
            for row in range(prompt.length)
        ],
    }
