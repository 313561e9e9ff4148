"""The loss of every trained token, faster than the base's own: same signature, same values up to rounding.

`FrozenLM.token_nll` is the exact, plain reference. A FastLoss reads the same batches through a copy of the body that
shares its weights (body.py), keeps the states before a row's first virtual token (context_cache.py) and those that
enter the first layer that learns (cut_states.py), screens large heads with int8 products (kernels/screened_head.py), and
replays small batches on a GPU as CUDA graphs (graphed_body.py). The base itself is only read, so that several losses, runs
and a server can share it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import HeadLoss, token_nll
from softprompt.base.placement import Placed, place, place_input, prefix_cache
from softprompt.base.quantised import demand_gradients
from softprompt.data.batch import Batch
from softprompt.loss.body import learning_body
from softprompt.loss.checkpointing import checkpointed
from softprompt.loss.context_cache import GIGABYTE, ContextCache
from softprompt.loss.cut_states import CutStates, below_detached
from softprompt.loss.graphed_body import GraphedBody, graphed_body
from softprompt.loss.kernels.cut_head import CutHead, cut_head
from softprompt.loss.kernels.screened_head import PackedHead, ScreenedHead, packed
from softprompt.loss.packed_body import PackedBody
from softprompt.prompt.soft_prompt import Plain


class FastLoss:
    """A loss over one base, to call as `FrozenLM.token_nll`.

    `int8_products`: gradients are taken with the body's weights in int8 (losses without a gradient never are).
    `context_bytes`: memory for the states of text before the first virtual token; 0 reads it again every time.
    `recompute`: gradient checkpointing, one layer's memory at a time and a third more time.
    `first_layer`: the first one of which a deep prompt learns (cut_states.py); the gradient below it is zero."""

    def __init__(
        self,
        lm: FrozenLM,
        *,
        int8_products: bool = False,
        context_bytes: int = GIGABYTE,
        recompute: bool = False,
        first_layer: int = 0,
    ) -> None:
        self.lm = lm
        self.int8_products, self.recompute = int8_products, recompute
        self.context_cache = ContextCache(lm, self._read, context_bytes)
        self.first_layer, self.cut_states = first_layer, CutStates(context_bytes)

    def __call__(self, batch: Batch, prompt: Plain | None = None) -> Tensor:
        """Loss in nats of every trained token, float32 [N], in the order of the batch's rows and positions.

        `prompt` is what is learned or judged: (vectors [P, D],), (keys, values) [L, P, H, K] each, or None for the
        untouched base. Differentiable towards it, and towards nothing else."""
        targets_N = batch.ids_BS[:, 1:][batch.trained_BS[:, 1:]].to(self.lm.device)
        return token_nll(self.hidden(batch, prompt), targets_N, self.lm.head, self.head_loss)

    def hidden(self, batch: Batch, prompt: Plain | None = None) -> Tensor:
        """The last hidden states that predict the trained tokens, [N, D], in the order of the losses."""
        batch = batch.to(self.lm.device)
        is_cut = self.first_layer > 0 and prompt is not None and len(prompt) == 2
        if prompt is not None and is_cut:
            prompt = below_detached(prompt, self.first_layer)
        deep = None
        if prompt is not None and len(prompt) == 2:
            prompt = deep = tuple(part.to(self.lm.device) for part in prompt)  # at once, not layer by layer
        split = self.context_cache.split(batch) if prompt is not None and deep is None else None
        if split is None:
            placed = place_input(self.lm, batch, prompt)
        else:
            batch, rest = split
            placed = replace(rest, embeddings_BSD=place_input(self.lm, batch, prompt).embeddings_BSD)
        # The state at s predicts the token at s + 1.
        before_BS = torch.nn.functional.pad(batch.trained_BS[:, 1:], (0, 1))
        if self.graphed_body is not None and torch.is_grad_enabled():
            row_N, position_N = before_BS.nonzero(
                as_tuple=True
            )  # before the pass, which nothing then waits for
            states_BSD = self.graphed_body.states(placed, deep)
            if states_BSD is not None:
                return states_BSD[row_N, position_N]
        if deep is not None:
            placed = replace(placed, past=prefix_cache(self.lm, deep, len(batch.ids_BS)))
        return self._states_at(placed, batch, before_BS, prompt if is_cut else None)

    def __repr__(self) -> str:
        return f"FastLoss({self.lm!r}, int8_products={self.int8_products})"

    def prepare(self) -> None:
        """Builds the fast body now rather than in the first loss."""
        _ = self.body

    def _states_at(self, placed: Placed, batch: Batch, wanted_BS: Tensor, cut: Plain | None) -> Tensor:
        """Last hidden states of the wanted positions, [N, D]: of those alone, where the body can.

        `cut` is a deep prompt whose lower layers are fixed; the body then begins above them, where it can."""
        body = self._current_body
        if isinstance(body, PackedBody) and bool(wanted_BS.any()) and body.takes(placed):
            if cut is None:
                return body.states_at(placed, batch, wanted_BS)
            states_BSD = self.cut_states.of(self.lm, body, batch, cut, self.first_layer)
            placed = replace(placed, embeddings_BSD=states_BSD)
            return body.states_at(placed, batch, wanted_BS, self.first_layer)
        return self.lm.states(placed, body)[wanted_BS]

    def _read(self, placed: Placed) -> Tensor:
        """Last hidden states [B, S, D] by the fast body."""
        return self.lm.states(placed, self._current_body)

    @property
    def _current_body(self) -> Any:
        int8 = self.int8_products and torch.is_grad_enabled()
        return self._int8_body if int8 else self.body

    @cached_property
    def body(self) -> Any:
        return self._checkpointed(_shared(self.lm).body)

    @cached_property
    def graphed_body(self) -> GraphedBody | None:
        """CUDA graphs of the body on a GPU, where starting its kernels takes longer than they do; None elsewhere."""
        return None if self.recompute else graphed_body(self.lm, self.body)

    @cached_property
    def _int8_body(self) -> Any:
        return self._checkpointed(_shared(self.lm).int8_body)

    @cached_property
    def head_loss(self) -> HeadLoss | None:
        """The screened road through a large head on a CPU, cut-cross-entropy on a GPU that has it; None where the plain road
        is as fast."""
        shared = _shared(self.lm)
        return shared.cut_head if shared.head is None else ScreenedHead(shared.head)

    def _checkpointed(self, body: Any) -> Any:
        if not self.recompute:
            return body
        if isinstance(body, PackedBody):
            return body.recomputing(checkpointed(body.body, self.lm.num_layers, self.lm.name))
        return checkpointed(body, self.lm.num_layers, self.lm.name)


class _Shared:
    """Facts that follow from the frozen weights alone, shared by all losses over one base."""

    def __init__(self, lm: FrozenLM) -> None:
        demand_gradients(lm.body, lm.dtype, lm.name)
        self.plain_body = lm.body
        self.body = _proved(lm, learning_body(lm.body))
        self.head: PackedHead | None = packed(lm.head)
        self.cut_head: CutHead | None = cut_head(lm.head)

    @cached_property
    def int8_body(self) -> Any:
        coded = learning_body(self.plain_body, "int8")
        if isinstance(coded, PackedBody) and not isinstance(self.body, PackedBody):
            return coded.body  # packing rows was refused with float products
        return coded


_SHARED: WeakKeyDictionary[FrozenLM, _Shared] = WeakKeyDictionary()


def _shared(lm: FrozenLM) -> _Shared:
    if lm not in _SHARED:
        _SHARED[lm] = _Shared(lm)
    return _SHARED[lm]


def _proved(lm: FrozenLM, fast: Any) -> Any:
    """`fast` where it gives the body's own hidden states for a few tokens, else the body itself."""
    if fast is lm.body:
        return fast
    if isinstance(fast, PackedBody):
        plain = _proved(lm, fast.body)
        return fast if _gives_states_of(lm, fast) and plain is fast.body else plain
    probe = Placed(lm.embed(_probe_ids(lm, 1, 8)), None)
    with torch.no_grad():
        ours, theirs = (lm.states(probe, body).float() for body in (fast, lm.body))
    return fast if _close(lm, ours, theirs) else lm.body


def _gives_states_of(lm: FrozenLM, fast: PackedBody) -> bool:
    """Whether packing two rows of unlike length, with a common beginning, gives the body's own hidden states."""
    ids_BS = _probe_ids(lm, 2, 12)
    ids_BS[1, :4] = ids_BS[0, :4]
    nowhere_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    batch = Batch(ids_BS, torch.full_like(ids_BS, -1), nowhere_BS, torch.tensor([12, 9]), (0, 1))
    placed = place(lm, batch, None)
    wanted_BS = nowhere_BS.clone()
    wanted_BS[0, 4:], wanted_BS[1, 6:9] = True, True
    with torch.no_grad():
        return _close(
            lm,
            fast.states_at(placed, batch, wanted_BS).float(),
            lm.states(placed, lm.body)[wanted_BS].float(),
        )


def _probe_ids(lm: FrozenLM, rows: int, length: int) -> Tensor:
    ids_N = torch.arange(1, rows * length + 1, device=lm.device) * 7 % lm.vocab_size
    return ids_N.view(rows, length)


def _close(lm: FrozenLM, ours: Tensor, theirs: Tensor) -> bool:
    allowed = 16 * torch.finfo(lm.dtype).eps * theirs.abs().max().clamp(min=1.0)
    return bool((ours - theirs).abs().max() <= allowed)
