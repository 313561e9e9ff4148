"""The queries of every layer's attention, as the base forms them when it reads a text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from softprompt.base.attention_copy import body_with_attention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import BaseError


@dataclass(frozen=True)
class Queries:
    """The queries of one layer: [B, H, S, K], rotated where the base rotates; the factor of their scores; and the
    slope of each head where scores grow with a key's position (ALiBi, Press et al. 2022), [H]."""

    query_BHSK: Tensor
    scaling: float
    slopes_H: Tensor | None = None


class RecordedQueries:
    """A context in which `body` is a copy of the base's body that shares its weights and records every layer's queries."""

    def __init__(self, lm: FrozenLM) -> None:
        _register()
        self.body: Any = body_with_attention(lm, _CAPTURE)
        self.seen: list[Queries] = []
        self.layers, self.name = lm.num_layers, lm.name
        for module in self.body.modules():
            if isinstance(module, BloomAttention):  # has its own attention, which cannot be exchanged
                module.query_key_value.register_forward_hook(self._bloom(module))

    def __enter__(self) -> RecordedQueries:
        _own.record = self.seen.append
        return self

    def __exit__(self, *error: Any) -> None:
        del _own.record
        if error[0] is None and len(self.seen) != self.layers:
            raise BaseError(
                f"{self.name}: its attention cannot be looked into, so a context cannot be cut down to the keys that matter. "
                "Give a text that is as short as the prompt, or distil with --init first."
            )

    def _bloom(self, attention: Any) -> Callable[..., None]:
        def record(module: Any, inputs: Any, fused: Tensor) -> None:
            query, _, _ = attention._reshape(fused)
            # transformers gives the slopes as a row of biases: that of position 1 is the slope itself.
            ones = torch.ones(1, 2, device=fused.device)
            slopes_H = build_alibi_tensor(ones, attention.num_heads, torch.float32)[:, 0, 1]
            self.seen.append(Queries(query, float(attention.inv_norm_factor), slopes_H))

        return record


_CAPTURE = "softprompt_queries"
_own = threading.local()


def _register() -> None:
    AttentionInterface.register(_CAPTURE, _recorded)
    AttentionMaskInterface.register(_CAPTURE, eager_mask)


def _recorded(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Plain attention, as transformers' eager one, that keeps its queries."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    record: Callable[[Queries], None] = _own.record
    record(Queries(query, scaling))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.float().softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None
