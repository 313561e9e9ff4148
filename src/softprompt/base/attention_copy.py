"""A copy of the base's body with another attention in its layers, over the same weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.packed_weights import packed_body
from softprompt.base.placement import Placed
from softprompt.base.quantised import shared_tensors

Attend = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None, float, int], Tensor]
"""What `states` was given, query, key, value, mask, scaling and the layer's number to the layer's result [B, Q, H, K]."""

Probe = Callable[[FrozenLM], tuple[Tensor, Callable[[], Tensor]]]
"""A base to hidden states of a few tokens by its own attention, and a call that gives them by the other one."""


def body_with_attention(lm: FrozenLM, name: str) -> Any:
    """A copy of the base's body that shares its weights and calls the attention registered under `name`.

    Architectures that have an attention of their own do not call it."""
    body: Any = copy.deepcopy(lm.body, shared_tensors(lm.body))
    config = copy.deepcopy(body.config)
    config._attn_implementation = name
    for module in body.modules():
        if hasattr(module, "config"):
            module.config = config
    return body


def no_mask(*sizes: Any, **options: Any) -> None:
    """Makes no mask, for an attention that has masks of its own."""


@dataclass
class OtherAttention:
    """An attention that all layers of a base call in place of their own, on bases where it gives what theirs gives.

    `name` is the one that transformers knows it by, `attend` a layer's attention, `probe` what it is tried with, and
    `mask` the maker of its mask as transformers' AttentionMaskInterface wants it. Results may differ by `rounding`
    units of the dtype's last place. `suits` says on which bases it is worth trying."""

    name: str
    attend: Attend
    probe: Probe
    suits: Callable[[FrozenLM], bool] = lambda lm: True
    mask: Callable[..., Any] = no_mask
    rounding: int = 16
    _bodies: WeakKeyDictionary[FrozenLM, Any] = field(default_factory=WeakKeyDictionary)
    _own: threading.local = field(default_factory=threading.local)

    def works_on(self, lm: FrozenLM) -> bool:
        """Whether this base can be read so: tried once, on a few tokens, against its own attention.

        Not on a base in parts, whose body is not copied, and not where a layer looks at some columns only (sliding windows,
        chunks), adds a bias by distance (ALiBi), or has an attention of its own."""
        if lm not in self._bodies:
            self._bodies[lm] = None
            if self.suits(lm) and lm.is_whole and sees_everything(lm.config):
                AttentionInterface.register(self.name, self._of_layer)
                AttentionMaskInterface.register(self.name, self.mask)
                self._bodies[lm] = body_with_attention(lm, self.name)
                if not self._is_exact(lm):
                    self._bodies[lm] = None
        return self._bodies[lm] is not None

    def states(self, lm: FrozenLM, placed: Placed, given: Any) -> Tensor:
        """Last hidden states; every layer's attention is handed `given`. Only on a base that it works on."""
        body = self._bodies[lm]
        assert body is not None, f"{self.name}: the base was not asked whether it works there"
        self._own.given = given
        try:
            return lm.states(placed, packed_body(lm, body))
        finally:
            del self._own.given

    def _of_layer(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """One layer's attention, as transformers calls it."""
        demand_softmax_alone(options)
        self._own.calls = getattr(self._own, "calls", 0) + 1
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.attend(
            self._own.given, query, key, value, attention_mask, scaling, module.layer_idx
        ), None

    @torch.inference_mode()
    def _is_exact(self, lm: FrozenLM) -> bool:
        """Whether every layer calls it, and all together give the hidden states that the base's own attention gives."""
        theirs, read = self.probe(lm)
        self._own.calls = 0
        try:
            ours = read().float()
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return False  # an attention that takes or gives something else
        scale = max(1.0, float(theirs.float().abs().max()))
        allowed = self.rounding * torch.finfo(lm.dtype).eps * scale
        return self._own.calls == lm.num_layers and float((ours - theirs.float()).abs().max()) <= allowed


def sees_everything(config: Any) -> bool:
    """Whether every layer attends to all columns before a position, as far as the config says."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        set(kinds) == {"full_attention"} and not window and not getattr(config, "attention_chunk_size", None)
    )


def demand_softmax_alone(options: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where a layer asks for more than a softmax of scaled scores."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"this attention has no {name}")
