"""Compaction: the keys and values of a long context, cut down to a few positions without running the base backward.

Attention matching (arXiv 2602.16284): for every layer and key/value head, the P keys that get most attention from sampled
queries stay, and their values are solved for, by ridge least squares, so that attention over the short prefix gives what
attention over all of the context gave. Then, in a few rounds:

- the texts are read behind the short prefix, so that every layer is fitted to the queries that it will get there, which
  differ from those behind the whole context by the errors of all layers below;
- keys and values are fitted together, layer by layer, by descent on the squared error of that layer's attention output.
  The paper's extra bias on a key's score is not part of a key/value state; a key that may move makes up for it.

The base is only read, once behind the context and once a round. On rotary bases the kept keys are turned, so that text
behind the short prefix sees them at the distances of the whole context; with learned positions or ALiBi that is not
possible, and the fit makes up for what it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, batch_cache
from softprompt.base.placement import Placed
from softprompt.base.queries import RecordedQueries
from softprompt.base.rotary import rotary_of, turned_state
from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import Plain

RIDGE = 1e-3  # of the mean square weight that a kept key gets; the pull is towards the key's own value
ROWS_AT_ONCE = 8
ROUNDS, STEPS = 2, 30  # of reading behind the short prefix, and of descent in each (figures in LOG.md)
QUERIES_A_STEP = 1_000
STEP_SHARE, LAST_SHARE = (
    0.05,
    0.05,
)  # of the root mean square of keys or values; what is left of that at the last step


@dataclass(frozen=True)
class Compacted:
    """The short prefix, keys and values [L, P, H, K], and the context positions that its keys come from, [L, H, P].

    `turned` tells whether the keys were turned to the short prefix's distances (rotary bases)."""

    plain: Plain
    places_LHP: Tensor
    turned: bool


@torch.no_grad()
def compact(
    lm: FrozenLM,
    context: State,
    rows: Sequence[Sequence[int]],
    length: int,
    *,
    ridge: float = RIDGE,
    rounds: int = ROUNDS,
) -> Compacted:
    """Cuts `context` down to `length` positions, for texts like `rows` (token ids that follow the context).

    The context's first position is always kept: much attention rests on it (Xiao et al. 2023, attention sinks). With 0
    `rounds` keys stay as they are in the context. Raises PromptError where the context has no more positions than
    `length`, or where there is no row."""
    if not 1 < length < context.length:
        raise PromptError(
            f"The context has {context.length} positions; it can be cut down to 2 to {context.length - 1}, found {length}. "
            "Set fewer virtual tokens, or keep the context as text."
        )
    if not rows:
        raise PromptError(
            "There is no text that follows the context, so nothing tells which keys matter. Give some."
        )
    wanted: list[Tensor] = []  # what attention gives behind the whole context, a layer [H, N, K]
    keys, values, places = [], [], []
    for layer, heard in enumerate(_heard(lm, context, rows)):
        keys_HTK, values_HTK = context.keys[layer].float(), context.values[layer].float()
        wanted.append(heard.output(keys_HTK, values_HTK))
        places_HP = _places(heard, keys_HTK, length)
        kept_HPK = _taken(keys_HTK, places_HP)
        values.append(_solved(heard, kept_HPK, _taken(values_HTK, places_HP), wanted[-1], ridge))
        keys.append(kept_HPK)
        places.append(places_HP)
    short = State(tuple(keys), tuple(values), context.marks[:length])
    rotary = rotary_of(lm)
    if rotary is not None:
        short = turned_state(rotary, short, length - context.length)
    for number in range(rounds):
        short = _fitted(lm, short, rows, wanted, ridge, number)
    plain = tuple(
        torch.stack([layer.transpose(0, 1) for layer in layers]).float().cpu()
        for layers in (short.keys, short.values)
    )
    return Compacted(plain, torch.stack(places).cpu(), rotary is not None)


def moved(lm: FrozenLM, plain: Plain, positions: int) -> Plain:
    """Keys and values [L, P, H, K] so many positions further on, where the base rotates its keys; else as they are."""
    rotary = rotary_of(lm)
    keys_LPHK, values_LPHK = plain
    if rotary is None or positions == 0:
        return plain
    return rotary.turned(keys_LPHK, positions), values_LPHK


@dataclass(frozen=True)
class _Heard:
    """What one layer was asked by texts behind a prefix, N queries in all heads that share a key/value head: the scaled
    queries [H, N, K]; the log-sum of their scores over the texts' own keys [H, N], as if the text began at position 0;
    and what attention over those alone gives [H, N, K]. `slope_HN` is ALiBi's, a score a position."""

    query_HNK: Tensor
    own_log_sum_HN: Tensor
    own_output_HNK: Tensor
    slope_HN: Tensor | None = None

    def weights(self, keys_HPK: Tensor, some: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Attention of `some` queries to a prefix's keys [H, n, P], and to the text's own together [H, n, 1]."""
        scores_HnP = self.query_HNK[:, some] @ keys_HPK.transpose(1, 2)
        own_Hn = self.own_log_sum_HN[:, some]
        if self.slope_HN is not None:  # the text's own keys come after the prefix's
            slope_Hn, length = self.slope_HN[:, some], keys_HPK.shape[1]
            scores_HnP = scores_HnP + slope_Hn[..., None] * torch.arange(length, device=keys_HPK.device)
            own_Hn = own_Hn + slope_Hn * length
        both = torch.cat([scores_HnP, own_Hn[..., None]], -1).softmax(-1)
        return both[..., :-1], both[..., -1:]

    def output(self, keys_HPK: Tensor, values_HPK: Tensor, some: Tensor | slice = slice(None)) -> Tensor:
        """The output of attention for `some` queries over a prefix and the text's own, [H, n, K]."""
        weights_HnP, own_Hn1 = self.weights(keys_HPK, some)
        return weights_HnP @ values_HPK + own_Hn1 * self.own_output_HNK[:, some]


def _places(heard: _Heard, keys_HTK: Tensor, length: int) -> Tensor:
    """The context's positions to keep in every head, [H, P], ascending: the first, and those of most attention.

    Attention is measured by its mean square over all queries: a key that matters much to few texts counts."""
    squares_HT = heard.weights(keys_HTK)[0].square().sum(1)
    squares_HT[:, 0] = math.inf
    return squares_HT.topk(length, dim=1).indices.sort(1).values


def _solved(heard: _Heard, keys_HPK: Tensor, own_HPK: Tensor, wanted_HNK: Tensor, ridge: float) -> Tensor:
    """Values [H, P, K] with which attention over these keys gives what is wanted, pulled towards `own_HPK`."""
    weights_HNP, rest_HN1 = heard.weights(keys_HPK)
    # What the prefix has to add: the wanted output less the text's own part.
    missing_HNK = (wanted_HNK - rest_HN1 * heard.own_output_HNK).double()
    weights_HNP = weights_HNP.double()
    gram_HPP = weights_HNP.transpose(1, 2) @ weights_HNP
    right_HPK = weights_HNP.transpose(1, 2) @ missing_HNK
    # Ridge towards the keys' own values, so that a key which no query looks at keeps its value.
    strength_H = ridge * gram_HPP.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram_HPP += strength_H[:, None, None] * torch.eye(
        keys_HPK.shape[1], dtype=torch.float64, device=gram_HPP.device
    )
    right_HPK += strength_H[:, None, None] * own_HPK.double()
    solved_HPK: Tensor = torch.linalg.solve(gram_HPP, right_HPK)
    return solved_HPK.float()


def _fitted(
    lm: FrozenLM,
    short: State,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[Tensor],
    ridge: float,
    number: int,
) -> State:
    """The short prefix, fitted in every layer to the queries that texts behind it ask now. `number` is the round."""
    keys, values = [], []
    cast = State(
        tuple(layer.to(lm.dtype) for layer in short.keys),
        tuple(layer.to(lm.dtype) for layer in short.values),
        short.marks,
    )
    drawn = torch.Generator().manual_seed(number)
    for layer, heard in enumerate(_heard(lm, cast, rows)):
        keys_HPK, values_HPK = _descended(heard, short.keys[layer], short.values[layer], wanted[layer], drawn)
        keys.append(keys_HPK)
        # The values' part of the problem is linear: its exact solution for the keys that were found.
        values.append(_solved(heard, keys_HPK, values_HPK, wanted[layer], ridge))
    return State(tuple(keys), tuple(values), short.marks)


def _descended(
    heard: _Heard, keys_HPK: Tensor, values_HPK: Tensor, wanted_HNK: Tensor, drawn: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys and values after a descent on the squared error of the layer's attention output, relative to its size.

    The first key, the attention sink's, is kept: it holds most of the attention of every head."""
    first_H1K, rest_HpK = keys_HPK[:, :1], keys_HPK[:, 1:].clone().requires_grad_()
    values_HPK = values_HPK.clone().requires_grad_()
    groups = [
        {"params": [tensor], "lr": STEP_SHARE * float(tensor.detach().square().mean().sqrt())}
        for tensor in (rest_HpK, values_HPK)
    ]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, LAST_SHARE ** (1 / STEPS))
    count = wanted_HNK.shape[1]
    with torch.enable_grad():
        for _ in range(STEPS):
            some = torch.randperm(count, generator=drawn)[:QUERIES_A_STEP].to(wanted_HNK.device)
            output_HnK = heard.output(torch.cat([first_H1K, rest_HpK], 1), values_HPK, some)
            some_HnK = wanted_HNK[:, some]
            error = (output_HnK - some_HnK).square().sum() / some_HnK.square().sum()
            optimiser.zero_grad()
            error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return torch.cat([first_H1K, rest_HpK.detach()], 1), values_HPK.detach()


def _taken(tensor_HTK: Tensor, places_HP: Tensor) -> Tensor:
    return tensor_HTK.gather(1, places_HP[..., None].expand(-1, -1, tensor_HTK.shape[-1]))


def _heard(lm: FrozenLM, prefix: State, rows: Sequence[Sequence[int]]) -> list[_Heard]:
    """Reads texts behind a prefix; for every layer what they asked of it."""
    ordered = sorted(rows, key=len)
    groups = [ordered[first : first + ROWS_AT_ONCE] for first in range(0, len(ordered), ROWS_AT_ONCE)]
    read = [row for group in groups for row in _read(lm, prefix, group)]
    layers = []
    for of_layer in zip(*read, strict=True):
        slopes = [heard.slope_HN for heard in of_layer if heard.slope_HN is not None]
        layers.append(
            _Heard(
                torch.cat([heard.query_HNK for heard in of_layer], 1),
                torch.cat([heard.own_log_sum_HN for heard in of_layer], 1),
                torch.cat([heard.own_output_HNK for heard in of_layer], 1),
                torch.cat(slopes, 1) if slopes else None,
            )
        )
    return layers


def _read(lm: FrozenLM, prefix: State, rows: Sequence[Sequence[int]]) -> list[list[_Heard]]:
    """The same of a few texts, read side by side: a list of layers for each."""
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=lm.device)
    cache, columns = batch_cache([prefix] * len(rows))
    positions_BS = columns + torch.arange(longest, device=lm.device).expand(len(rows), -1)
    lengths_B1 = torch.tensor([[columns + len(row)] for row in rows], device=lm.device)
    mask_BC = (torch.arange(columns + longest, device=lm.device) < lengths_B1).long()
    with RecordedQueries(lm) as queries:
        lm.states(Placed(lm.embed(ids_BS), mask_BC, positions_BS, cache), queries.body)
    layers: list[Any] = list(cache.layers)
    heard: list[list[_Heard]] = []
    for b, row in enumerate(rows):
        of_row = []
        for asked, layer in zip(queries.seen, layers, strict=True):
            heads = layer.keys.shape[1]
            query_HGSK = torch.unflatten(asked.query_BHSK[b, :, : len(row)].float(), 0, (heads, -1))
            keys_HSK, values_HSK = (
                tensor[b, :, columns : columns + len(row)].float() for tensor in (layer.keys, layer.values)
            )
            slopes_HG = None if asked.slopes_H is None else asked.slopes_H.view(heads, -1)
            of_row.append(_heard_by_itself(query_HGSK * asked.scaling, keys_HSK, values_HSK, slopes_HG))
        heard.append(of_row)
    return heard


def _heard_by_itself(
    query_HGSK: Tensor, keys_HSK: Tensor, values_HSK: Tensor, slopes_HG: Tensor | None
) -> _Heard:
    """The part of the output that a text's queries get over its own keys; the prefix's part is added for any prefix later."""
    scores_HGSS = torch.einsum("hgsk,htk->hgst", query_HGSK, keys_HSK)
    slopes_HN = None
    if slopes_HG is not None:
        positions_S = torch.arange(keys_HSK.shape[1], device=keys_HSK.device)
        scores_HGSS = scores_HGSS + slopes_HG[..., None, None] * positions_S
        slopes_HN = slopes_HG[..., None].expand(query_HGSK.shape[:3]).flatten(1, 2)
    later_SS = torch.ones(scores_HGSS.shape[-2:], dtype=torch.bool, device=keys_HSK.device).triu(1)
    scores_HGSS = scores_HGSS.masked_fill(later_SS, -math.inf)
    output_HGSK = torch.einsum("hgst,htk->hgsk", scores_HGSS.softmax(-1), values_HSK)
    return _Heard(
        query_HGSK.flatten(1, 2),
        scores_HGSS.logsumexp(-1).flatten(1, 2),
        output_HGSK.flatten(1, 2),
        slopes_HN,
    )
