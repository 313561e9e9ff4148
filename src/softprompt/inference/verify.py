"""Bases of an architecture that our tests do not cover prove themselves before they are used."""

from __future__ import annotations

from weakref import WeakSet

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, row_state
from softprompt.errors import BaseError
from softprompt.inference.prefill import PrefillRow, prefill

PROVEN = frozenset(
    [
        "apertus",
        "arcee",
        "biogpt",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "ctrl",
        "dbrx",
        "deepseek_v3",
        "diffllama",
        "ernie4_5",
        "exaone4",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "hyperclovax",
        "jais2",
        "llama",
        "llama4_text",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "mpt",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
    ]
)
"""transformers' model types that docs/exactness.md shows to be exact."""


_VERIFIED: WeakSet[FrozenLM] = WeakSet()


@torch.no_grad()
def demand_exact(lm: FrozenLM) -> None:
    """Raises BaseError unless continuing from kept state, in a batch of unequal rows, gives the model's own logits."""
    if lm.model.config.get_text_config().model_type in PROVEN or lm in _VERIFIED:
        return
    rows, wanted = [], []
    for length, kept in ((7, 4), (4, 1), (5, 0)):
        ids = [(position * 7 + length) % lm.vocab_size for position in range(1, length + 1)]
        wanted.append(lm.model(input_ids=torch.tensor([ids], device=lm.device)).logits[0, -1].float())
        rows.append(PrefillRow(_read(lm, ids[:kept]), tuple(ids)))
    done = prefill(lm, rows)
    for b, row in enumerate(rows):
        found_V = lm.logits(done.hidden_BTD[b, row.rest - 1]).float()
        difference = float((found_V - wanted[b]).abs().max())
        if not difference <= 16 * torch.finfo(lm.dtype).eps * max(float(wanted[b].abs().max()), 1.0):
            raise BaseError(
                f"{lm.name}: {type(lm.model).__name__} gives other logits when it continues from kept state in a batch "
                f"(they differ by {difference:.3g}), so no result could be trusted. Choose another base."
            )
    _VERIFIED.add(lm)


def _read(lm: FrozenLM, ids: list[int]) -> State:
    if not ids:
        return EMPTY
    done = prefill(lm, [PrefillRow(EMPTY, tuple(ids))])
    return row_state(done.cache, 0, *done.span(0), ids)
