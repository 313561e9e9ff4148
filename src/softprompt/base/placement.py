"""Puts a prompt into a batch: embeddings, mask and positions move together, and labels follow from the batch's marks.

A shallow prompt takes the soft positions that the batch marks. A deep one goes before the sequence, as keys and values
of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.data.batch import Batch
from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import Plain


@dataclass(frozen=True)
class Placed:
    """Input of the frozen body. The mask is None if every position is real."""

    embeddings_BSD: Tensor
    mask_BS: Tensor | None
    positions_BS: Tensor | None = None
    past: Any = None


class Embeds(Protocol):
    """The part of a base that placing needs."""

    device: torch.device
    dtype: torch.dtype

    def embed(self, ids: Tensor) -> Tensor: ...


def place(lm: Embeds, batch: Batch, prompt: Plain | None) -> Placed:
    """Puts `prompt` into `batch`: vectors [P, D] at its soft positions, keys and values before it, or None."""
    placed = place_input(lm, batch, prompt)
    if prompt is None or len(prompt) == 1:
        return placed
    return replace(placed, past=prefix_cache(lm, prompt, len(batch.ids_BS)))


def place_input(lm: Embeds, batch: Batch, prompt: Plain | None) -> Placed:
    """Like `place`, but the keys and values of a deep prompt are left out; mask and positions allow for them."""
    embeddings_BSD = lm.embed(batch.ids_BS)
    soft_BS = batch.soft_BS >= 0
    mask_BS = padding_mask(batch)
    if prompt is not None and len(prompt) == 1:
        _demand(bool(soft_BS.any()), "a soft prompt was given, but the batch has no slot for it")
        # Not prompt[...]: on many threads its gradient sums in any order, and a run could not be repeated to the bit.
        vectors_MD = torch.nn.functional.embedding(
            batch.soft_BS[soft_BS], prompt[0].to(embeddings_BSD.device)
        ).to(embeddings_BSD.dtype)
        return Placed(embeddings_BSD.index_put((soft_BS,), vectors_MD), mask_BS)
    _demand(not bool(soft_BS.any()), "the batch has soft positions, but no soft prompt was given")
    if prompt is None:
        return Placed(embeddings_BSD, mask_BS)
    # A deep prompt takes no positions of the input: the row attends to its keys and values, so text starts behind them.
    rows, length = batch.ids_BS.shape
    prefix = prompt[0].shape[1]
    if mask_BS is not None:
        mask_BS = torch.cat([mask_BS.new_ones(rows, prefix), mask_BS], 1)
    positions_BS = torch.arange(prefix, prefix + length, device=batch.ids_BS.device).expand(rows, -1)
    return Placed(embeddings_BSD, mask_BS, positions_BS)


def prefix_cache(lm: Embeds, state: Plain, rows: int) -> DynamicCache:
    """Keys and values [L, P, H, K] as a transformers cache over `rows` rows, in the base's dtype, differentiable.

    The cache is made without a config, so that layers with a sliding window keep all of it and mask by index."""
    cache = DynamicCache()
    keys_LPHK, values_LPHK = state
    devices = getattr(lm, "layer_devices", None) or [lm.device] * len(keys_LPHK)
    for layer, (keys_PHK, values_PHK) in enumerate(zip(keys_LPHK, values_LPHK, strict=True)):
        keys, values = (
            state_PHK.to(devices[layer], lm.dtype).transpose(0, 1)[None].expand(rows, -1, -1, -1)
            for state_PHK in (keys_PHK, values_PHK)
        )
        cache.update(keys, values, layer)
    return cache


def padding_mask(batch: Batch) -> Tensor | None:
    """1 at real positions, [B, S]; None if every position is real."""
    lengths: Sequence[int] = batch.lengths_B.tolist()
    width = batch.ids_BS.shape[1]
    if all(length == width for length in lengths):
        return None
    return (torch.arange(width, device=batch.ids_BS.device) < batch.lengths_B[:, None]).long()


def _demand(condition: bool, fault: str) -> None:
    if not condition:
        raise PromptError(f"{fault}. Encode the examples with the template that the prompt was made for.")
