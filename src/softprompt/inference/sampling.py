"""The next token of every row from its logits, in transformers' order: logit bias, repetition penalty, bad words, temperature,
top-k, top-p and min-p.

Rows may differ in every setting. A row draws from its own generator, so that its neighbours never change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softprompt.inference.settings import DecodeSettings as DecodeSettings


def row_generator(seed: int, sample: int, marks: Sequence[int]) -> torch.Generator:
    """The random numbers of one row: they depend on the seed, on which sample of the row it is, and on its text."""
    digest = hashlib.sha256(f"{seed} {sample} {list(marks)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def biased(logits_BV: Tensor, bias_B: Sequence[Mapping[int, float]]) -> Tensor:
    """Adds to each row's logits the amounts of its own bias, by token id."""
    rows = [b for b, bias in enumerate(bias_B) for _ in bias]
    ids = [token for bias in bias_B for token in bias]
    amounts = [amount for bias in bias_B for amount in bias.values()]
    at = torch.tensor([rows, ids], dtype=torch.int64, device=logits_BV.device)
    return logits_BV.index_put(tuple(at), logits_BV.new_tensor(amounts), accumulate=True)


def without(logits_BV: Tensor, banned_B: Sequence[Sequence[int]]) -> Tensor:
    """Logits with -inf at the tokens that each row must not take next."""
    banned_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for b, banned in enumerate(banned_B):
        banned_BV[b, list(banned)] = True
    return logits_BV.masked_fill(banned_BV, float("-inf"))


def completing(sequences: Sequence[tuple[int, ...]], marks: Sequence[int]) -> list[int]:
    """The last tokens of those sequences that the next token after `marks` would complete."""
    return [
        sequence[-1]
        for sequence in sequences
        if len(sequence) == 1 or tuple(marks[1 - len(sequence) :]) == sequence[:-1]
    ]


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Weighs down the tokens seen so far (Keskar et al. 2019): positive logits divided, negative ones multiplied.

    `seen_BV` marks the tokens that occurred in each row. It is a mask and not a list of ids, since a list needs a
    filler, and every filler is a token of some row."""
    penalty_B1 = penalty_B[:, None]
    return torch.where(
        seen_BV, torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1), logits_BV
    )


def filtered_probabilities(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """Probabilities [B, V] after temperature, top-k (0: off), top-p and min-p; what is left out has probability 0.

    The order, and what a tie does, are those of transformers."""
    logits_BV = _at_temperature(logits_BV, temperature_B)
    most = int(top_k_B.max())
    if most > 0:
        # Every row's k-th best logit is the least that stays: one topk for the largest k serves all rows.
        most = min(most, logits_BV.shape[1])
        best_BK = logits_BV.topk(most, dim=1).values
        last_B1 = best_BK.gather(1, (top_k_B.clamp(1, most) - 1)[:, None])
        logits_BV = logits_BV.masked_fill((logits_BV < last_B1) & (top_k_B > 0)[:, None], float("-inf"))
    if bool((top_p_B < 1).any()):
        # From the least likely up, tokens fall out while their sum is at most 1 - p.
        sorted_BV, order_BV = logits_BV.sort(dim=1)
        out_BV = sorted_BV.softmax(1).cumsum(1) <= (1 - top_p_B)[:, None]
        out_BV[:, -1] = False  # the likeliest token always stays
        out_BV &= (top_p_B < 1)[:, None]
        logits_BV = logits_BV.masked_fill(
            torch.zeros_like(out_BV).scatter(1, order_BV, out_BV), float("-inf")
        )
    probabilities_BV = logits_BV.softmax(1)
    if bool((min_p_B > 0).any()):
        least_B1 = min_p_B[:, None] * probabilities_BV.amax(1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities_BV < least_B1, float("-inf"))
        probabilities_BV = logits_BV.softmax(1)
    return probabilities_BV


def _at_temperature(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Logits divided by the temperature, shifted first where that would overflow: near 0 only the likeliest is left."""
    temperature_B1 = temperature_B.clamp(min=torch.finfo(logits_BV.dtype).tiny)[:, None]
    scaled_BV = logits_BV / temperature_B1
    overflows_B1 = ~scaled_BV.amax(1, keepdim=True).isfinite()
    if not bool(overflows_B1.any()):
        return scaled_BV
    # Probabilities do not change with a shift; the largest becomes 0 and the others fall to -inf.
    shifted_BV = (logits_BV - logits_BV.amax(1, keepdim=True)) / temperature_B1
    return torch.where(overflows_B1, shifted_BV, scaled_BV)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the summed probabilities pass each row's uniform number: ids [B]."""
    sums_BV = probabilities_BV.double().cumsum(1)
    aims_B1 = uniform_B.to(sums_BV.device)[:, None] * sums_BV[:, -1:]
    ids_B = torch.searchsorted(sums_BV, aims_B1, right=True)[:, 0]
    return ids_B.clamp(max=probabilities_BV.shape[1] - 1)
