"""A Llama-type body that reads packed rows: no padding, and what all rows begin with only once.

A batch of rows of unlike lengths wastes products on padding, and rows that begin with the same virtual tokens (a soft
prompt in front) compute the same states once a row. Here the positions of a batch are packed into one list [N, D]: the
common beginning, then what is left of each row. The last layer computes queries and MLP only for positions whose state is
read. Results equal those of the plain body up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.base.placement import Placed
from softprompt.data.batch import Batch
from softprompt.loss.kernels.grouped_attention import (
    Attending,
    Padded,
    Positions,
    empty_columns,
)
from softprompt.loss.kernels.llama_layer import Layer, layer_output
from softprompt.loss.kernels.rms_norm import Norm, normed

MOST_SCORES = 2**26  # of one layer, row and group of heads; beyond, torch's own attention takes less memory


@dataclass(frozen=True)
class _Packing:
    """The positions of a batch that are read, in their order: indices into the flat batch [B * S].

    The first `shared` of `source_N` are the common beginning, taken from row 0. `packed_BR` gives for the rest of each
    row its packed positions, repeating the row's last one where it is shorter; `is_real_BR` marks the others."""

    source_N: Tensor
    shared: int
    packed_BR: Tensor
    is_real_BR: Tensor


class PackedBody(nn.Module):
    """The fast body of a base of Llama-type layers on a CPU; called like `body`, which answers then.

    `windows` holds each layer's sliding window, None where it sees everything."""

    def __init__(
        self,
        body: Any,
        layers: Sequence[Layer],
        windows: Sequence[int | None],
        norm: Norm,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.layers, self.windows, self.norm = body, tuple(layers), tuple(windows), norm
        self.recompute = recompute

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Hidden states and cache of padded rows, by the body itself."""
        return self.body(*inputs, **named)

    def recomputing(self, body: Any) -> PackedBody:
        """The same, keeping only each layer's input for the backward pass; `body` does so for padded rows."""
        return PackedBody(body, self.layers, self.windows, self.norm, recompute=True)

    def takes(self, placed: Placed) -> bool:
        """Whether this batch is short enough to hold scores of whole rows."""
        length = placed.embeddings_BSD.shape[1]
        return self.layers[0].heads.group * length * (length + _past_length(placed)) <= MOST_SCORES

    def states_at(self, placed: Placed, batch: Batch, wanted_BS: Tensor, first: int = 0) -> Tensor:
        """Last hidden states of the wanted positions [M, D], in the order of rows and positions.

        Layers below `first` are not read: what stands for embeddings are the states that enter it (`states_entering`)."""
        # Padding is never computed, and a beginning that all rows share is computed once: the rows are packed into one list.
        packing = packed(batch, wanted_BS, share=_past_length(placed) == 0)
        hidden_ND, full = self._begin(placed, packing)
        # Where the wanted states lie among the packed ones.
        wanted_BR = wanted_BS[:, packing.shared :]
        wanted_M = packing.packed_BR[wanted_BR]
        last = len(self.layers) - 1
        for index in range(first, len(self.layers)):
            positions = full[self.windows[index]]
            # The last layer is only needed where a label is: its queries and its MLP run at the wanted positions alone.
            if index == last:
                only = _only(positions.blocks[-1], wanted_BR)
                positions = replace(positions, blocks=(only,), kept=wanted_M)
            hidden_ND = self._layer(index, hidden_ND, placed, positions)
        return normed(hidden_ND, self.norm)

    def states_entering(self, layer: int, placed: Placed, batch: Batch) -> Tensor:
        """The hidden states [S, D] of the batch's one row that enter layer `layer`."""
        packing = packed(batch, torch.ones_like(batch.trained_BS), share=False)
        hidden_ND, full = self._begin(placed, packing)
        for index in range(layer):
            hidden_ND = self._layer(index, hidden_ND, placed, full[self.windows[index]])
        return hidden_ND

    def _begin(self, placed: Placed, packing: _Packing) -> tuple[Tensor, dict[int | None, Positions]]:
        """The packed input [N, D], and by sliding window how its positions attend."""
        rows, length, width = placed.embeddings_BSD.shape
        past = _past_length(placed)
        hidden_ND = placed.embeddings_BSD.reshape(rows * length, width).index_select(0, packing.source_N)
        # Rotary angles come from the body itself, which knows about every scaling of positions.
        positions_BS = placed.positions_BS
        if positions_BS is None:
            positions_BS = torch.arange(past, past + length).expand(rows, -1)
        positions_N = positions_BS.reshape(-1)[packing.source_N]
        with torch.no_grad():
            cos_1NK, sin_1NK = self.body.rotary_emb(hidden_ND[None].float(), positions_N[None])
        return hidden_ND, {
            window: Positions(cos_1NK[0], sin_1NK[0], _attending(packing, placed, past, window))
            for window in set(self.windows)
        }

    def _layer(self, index: int, hidden_ND: Tensor, placed: Placed, positions: Positions) -> Tensor:
        keys = values = None
        if _past_length(placed):
            keys, values = placed.past.layers[index].keys, placed.past.layers[index].values
        return layer_output(hidden_ND, keys, values, self.layers[index], positions, self.recompute)


def _past_length(placed: Placed) -> int:
    return 0 if placed.past is None else int(placed.past.get_seq_length())


def packed(batch: Batch, wanted_BS: Tensor, share: bool) -> _Packing:
    rows, length = batch.ids_BS.shape
    shared = _common_beginning(batch, wanted_BS) if share else 0
    rest_B1 = (batch.lengths_B - shared)[:, None]
    place_R = torch.arange(length - shared)[None]
    is_real_BR = place_R < rest_B1
    source_BR = shared + place_R + length * torch.arange(rows)[:, None]
    source_N = torch.cat([torch.arange(shared), source_BR[is_real_BR]])
    # Packed position of each row's first own position, then counting on; padding repeats the row's last one.
    first_B1 = shared + rest_B1.cumsum(0) - rest_B1
    packed_BR = first_B1 + torch.minimum(place_R, rest_B1 - 1)
    return _Packing(source_N, shared, packed_BR, is_real_BR)


def _common_beginning(batch: Batch, wanted_BS: Tensor) -> int:
    """The number of positions that begin all rows alike, up to the first whose state is read by the head."""
    if len(batch.ids_BS) == 1:
        return 0
    same_S = ((batch.ids_BS == batch.ids_BS[:1]) & (batch.soft_BS == batch.soft_BS[:1]) & ~wanted_BS).all(0)
    shortest = int(batch.lengths_B.min())
    return int(same_S[: shortest - 1].int().cumprod(0).sum())


def _attending(packing: _Packing, placed: Placed, past: int, window: int | None) -> tuple[Attending, ...]:
    """The common beginning attends to itself, then the rows to the past, the common beginning and themselves."""
    shared, length = packing.shared, packing.packed_BR.shape[1]
    before = past + shared
    # Columns in the order that keys are laid out: the past, the common beginning, the row itself, then empty ones.
    behind = empty_columns(before + length)
    column_T = torch.arange(before + length + behind)
    query_Q = torch.arange(before, before + length)
    bias_1QT = _bias(query_Q, column_T, window)[None]
    if (
        past and placed.mask_BS is not None
    ):  # kept contexts are right-aligned: columns to their left are empty
        empty_BC = placed.mask_BS[:, :past] == 0
        if bool(empty_BC.any()):
            bias_1QT = bias_1QT.repeat(len(empty_BC), 1, 1)
            bias_1QT[:, :, :past].masked_fill_(empty_BC[:, None], -torch.inf)
    padded = Padded(packing.packed_BR, packing.is_real_BR.view(-1).nonzero()[:, 0], shared)
    rows = Attending(padded, padded, bias_1QT, shared, behind, causal=True)
    if not shared:
        return (rows,)
    own_P, behind = torch.arange(shared), empty_columns(shared)
    alone = Padded(own_P[None], own_P)
    bias_1PT = _bias(own_P, torch.arange(shared + behind), window)[None]
    return Attending(alone, alone, bias_1PT, behind=behind, causal=True), rows


def _bias(query_Q: Tensor, column_T: Tensor, window: int | None) -> Tensor:
    """0 where a query sees a column, -inf elsewhere, [Q, T]: causal, within the sliding window."""
    distance_QT = query_Q[:, None] - column_T[None]
    seen_QT = distance_QT >= 0
    if window is not None:
        seen_QT &= distance_QT < window
    return torch.zeros(seen_QT.shape).masked_fill_(~seen_QT, -torch.inf)


def _only(rows: Attending, wanted_BR: Tensor) -> Attending:
    """The same block with the wanted queries alone; these are packed in the order of rows."""
    counts_B1 = wanted_BR.sum(1, keepdim=True)
    most = int(counts_B1.max())
    place_1Q = torch.arange(most)[None]
    is_query_BQ = place_1Q < counts_B1
    query_at_BQ = counts_B1.cumsum(0) - counts_B1 + torch.minimum(place_1Q, (counts_B1 - 1).clamp(min=0))
    query_at_BQ = query_at_BQ.clamp(max=int(counts_B1.sum()) - 1)  # rows without a wanted state
    # Each query keeps its line of the bias; a query that fills up takes the line of column 0 of its own row.
    order_BR = torch.argsort(wanted_BR.int(), dim=1, descending=True, stable=True)[:, :most]
    bias_BQT = rows.bias_BQT.expand(len(order_BR), -1, -1)
    bias_BQT = bias_BQT.gather(1, order_BR[:, :, None].expand(-1, -1, bias_BQT.shape[2]))
    queries = Padded(query_at_BQ, is_query_BQ.view(-1).nonzero()[:, 0])
    return Attending(queries, rows.keys, bias_BQT, rows.shared, rows.behind)
