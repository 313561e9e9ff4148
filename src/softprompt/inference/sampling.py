"""From logits to the next token of every row: repetition penalty, temperature, top-k, top-p, in transformers' order.

Rows may differ in every setting. A row draws from a generator of its own, so that its neighbours never change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.errors import RecipeError


@dataclass(frozen=True)
class DecodeSettings:
    """How to continue a text. The defaults are greedy, up to 100 new tokens.

    `max_new_tokens` bounds what is generated, `max_length` the text in all: input tokens and new ones, virtual tokens
    not counted (transformers' meaning). With both, the smaller one ends it. `temperature` 0 takes the likeliest token.
    `top_k` 0 and `top_p` 1 leave nothing out. `repetition_penalty` weighs down every token of the input text and of
    what was generated (a prompt's vectors have no tokens). `stop` texts end a row and are cut off. `seed`: the same
    row gives the same text, alone or in any batch. `n` texts are drawn for each input, of `best_of` drawn (the
    likeliest per token first). `log_probabilities` records how likely the base found each chosen token.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    n: int = 1
    best_of: int | None = None
    ignore_end: bool = False
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        drawn = self.n if self.best_of is None else self.best_of
        for name, fine, wanted in (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("max_length", self.max_length is None or self.max_length >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("n", self.n >= 1, "at least 1"),
            ("best_of", drawn >= self.n, f"at least n ({self.n})"),
        ):
            if not fine:
                raise RecipeError(f"{name}: found {getattr(self, name)!r}, wanted {wanted}.")
        if drawn > 1 and self.temperature == 0:
            raise RecipeError(
                f"n: found {drawn} texts at temperature 0, which would all be the same. Set a temperature, or n to 1."
            )

    @property
    def drawn(self) -> int:
        """Texts drawn for each input."""
        return self.n if self.best_of is None else self.best_of

    @property
    def rated(self) -> bool:
        """Whether the chosen tokens' log-probabilities are needed."""
        return self.log_probabilities or self.drawn > self.n


def row_generator(seed: int, sample: int, marks: Sequence[int]) -> torch.Generator:
    """The random numbers of one row: they depend on the seed, on which sample of the row it is, and on its text."""
    digest = hashlib.sha256(f"{seed} {sample} {list(marks)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Weigh down the tokens seen so far (Keskar et al. 2019): positive logits divided, negative ones multiplied.

    `seen_BV` marks the tokens that occurred in each row. It is a mask and not a list of ids, since a list needs a
    filler, and every filler is a token of some row."""
    penalty_B1 = penalty_B[:, None]
    return torch.where(
        seen_BV, torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1), logits_BV
    )


def kept(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Probabilities [B, V] after temperature, top-k (0: off) and top-p; what is left out has probability 0."""
    logits_BV = _at_temperature(logits_BV, temperature_B)
    most = int(top_k_B.max())
    if most > 0:
        most = min(most, logits_BV.shape[1])
        best_BK = logits_BV.topk(most, dim=1).values
        last_B1 = best_BK.gather(1, (top_k_B.clamp(1, most) - 1)[:, None])
        logits_BV = logits_BV.masked_fill((logits_BV < last_B1) & (top_k_B > 0)[:, None], float("-inf"))
    if bool((top_p_B < 1).any()):
        sorted_BV, order_BV = logits_BV.sort(dim=1)
        out_BV = sorted_BV.softmax(1).cumsum(1) <= (1 - top_p_B)[:, None]
        out_BV[:, -1] = False  # the likeliest token always stays
        out_BV &= (top_p_B < 1)[:, None]
        logits_BV = logits_BV.masked_fill(
            torch.zeros_like(out_BV).scatter(1, order_BV, out_BV), float("-inf")
        )
    return logits_BV.softmax(1)


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
