"""The body's forward and backward pass on a GPU as CUDA graphs: a step of a small batch starts thousands of kernels, and starting
them one by one from Python takes longer than running them.

Passes over inputs of one shape are recorded once and replayed from then on. Rows are padded to a few lengths, so that
few shapes are met. The first graph of a kind (soft, deep, behind a context) is compared with the plain pass, states and gradients;
where they differ it is not used (CUDA graphs: torch.cuda.make_graphed_callables).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.hardware import free_memory_bytes
from softprompt.base.kv import cache_of
from softprompt.base.placement import Placed, prefix_cache
from softprompt.base.quantised import is_quantised
from softprompt.prompt.soft_prompt import Plain

Pass = Callable[..., Tensor]
"""Input tensors to the last hidden states [B, S, D]."""

Capture = Callable[[Pass, tuple[Tensor, ...], int], Pass]
"""A pass, inputs like those to come and a number of warm-ups to the same pass, recorded."""

# Lengths are rounded up to a multiple of this, those above 64 to a quarter of the next power of two.
SHORTEST_STEP = 16
# Multiply-adds of one layer's weights and all positions (weights of the base x positions / layers) up to which starting
# the kernels of a layer, about a millisecond, takes longer than an H100 computes.
MOST_WORK = 1e11
MOST_GRAPHS = 64
# Numbers a position, layer and unit of width that a backward pass reads (Korthikanti et al. 2022).
ACTIVATIONS = 17
MEMORY_SHARE = 0.25  # of the free memory that one graph's activations may take


class GraphedBody:
    """Hidden states of one base's body by CUDA graphs, where these pay; `capture` records a pass."""

    def __init__(self, lm: FrozenLM, body: Any, capture: Capture | None = None) -> None:
        self.lm, self.body = lm, body
        self.capture = CudaCapture() if capture is None else capture
        self._graphs: dict[Any, Pass | None] = {}
        self._compared: set[tuple[bool, int]] = set()
        self._in_use: Callable[[], object] = lambda: None

    @property
    def number(self) -> int:
        """Graphs that are replayed; shapes that could not be recorded do not count."""
        return sum(graph is not None for graph in self._graphs.values())

    def states(self, placed: Placed, deep: Plain | None = None) -> Tensor | None:
        """Last hidden states [B, T, D], differentiable, of a batch that is placed without the deep prompt `deep`; those from
        the batch's length on are of padding.

        None where the plain pass has to be taken: a shape that does not pay or could not be recorded, a graph whose
        last pass still waits for its backward pass, or nothing that is learned."""
        context = [] if placed.past is None else _stacked(placed.past)
        past = [*(deep or ()), *context]
        columns = deep[0].shape[1] if deep else context[0].shape[3] if context else 0
        rows, length = placed.embeddings_BSD.shape[:2]
        whole = self._padded_length(length, columns)
        if not self._pays(rows * whole) or self._in_use() is not None:
            return None
        inputs = (*_padded(placed, whole, columns), *past)
        if not any(tensor.requires_grad for tensor in inputs):
            return None
        run = _pass(self.lm, self.body, has_positions=placed.positions_BS is not None, is_deep=bool(deep))
        shape = (
            bool(deep),
            *((tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in inputs),
        )
        if shape not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                return None
            self._graphs[shape] = self._recorded(run, inputs, kind=(bool(deep), len(inputs)))
        graph = self._graphs[shape]
        return None if graph is None else self._until_backward(graph(*inputs))

    def _padded_length(self, length: int, columns: int) -> int:
        step = max(SHORTEST_STEP, 2 ** ((length - 1).bit_length() - 2))
        whole = -(-length // step) * step
        most = self.lm.max_positions
        return whole if most is None or whole + columns <= most else length

    def _pays(self, positions: int) -> bool:
        return self.lm.num_parameters * positions <= MOST_WORK * self.lm.num_layers

    def _recorded(self, run: Pass, inputs: Sequence[Tensor], kind: tuple[bool, int]) -> Pass | None:
        """The pass as a graph, None where it cannot be recorded. Until one of its kind gave what the plain pass gives, each is compared."""
        rows, length, width = inputs[0].shape
        activations = ACTIVATIONS * self.lm.dtype.itemsize * rows * length * width * self.lm.num_layers
        if activations > MEMORY_SHARE * free_memory_bytes(self.lm.device):
            return None
        samples = _leaves(inputs)
        with torch.no_grad():
            samples[1][-1, -1] = 0  # so that warming up meets a mask, as recording does
        try:
            is_known = kind in self._compared
            graph = self.capture(run, samples, 1 if is_known else 2)
            if not is_known and not self._gives_the_same(graph, run, inputs):
                return None
            self._compared.add(kind)
            return graph
        except RuntimeError:  # a body that asks the GPU for a number half-way, or too little memory
            return None

    def _gives_the_same(self, graph: Pass, run: Pass, inputs: Sequence[Tensor]) -> bool:
        ours, theirs = (_states_and_slopes(each, _leaves(inputs)) for each in (graph, run))
        allowed = 16 * torch.finfo(self.lm.dtype).eps
        return all(
            bool((mine.float() - other.float()).norm() <= allowed * other.float().norm())
            for mine, other in zip(ours, theirs, strict=True)
        )

    def _until_backward(self, states_BSD: Tensor) -> Tensor:
        """Marks the graphs as in use until the backward pass has come, or can come no more.

        All graphs share their memory: what one keeps for its backward pass, another's forward pass would overwrite."""
        use = _Use()
        self._in_use = weakref.ref(use)

        def free(
            gradient_BSD: Tensor, use: _Use = use
        ) -> None:  # the hook keeps `use` as long as the autograd graph is kept
            self._in_use = lambda: None

        states_BSD.register_hook(free)  # type: ignore[no-untyped-call]
        return states_BSD


class CudaCapture:
    """Records passes as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass, samples: tuple[Tensor, ...], warmups: int) -> Pass:
        stream = torch.cuda.current_stream()
        try:
            with warnings.catch_warnings():  # of gradients that come on another stream, as recording has it
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
                graph: Any = torch.cuda.make_graphed_callables(
                    run, samples, num_warmup_iters=warmups, allow_unused_input=True, pool=self.pool
                )
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails does not leave its own
        recorded: Pass = graph
        return recorded


class _Use:
    """Lives from a forward pass to its backward pass."""


def graphed_body(lm: FrozenLM, body: Any) -> GraphedBody | None:
    """A GraphedBody where the base lies whole on one GPU; None elsewhere."""
    if lm.device.type != "cuda" or not lm.is_whole or is_quantised(lm.model):
        return None
    return GraphedBody(lm, body)


def _pass(lm: FrozenLM, body: Any, *, has_positions: bool, is_deep: bool) -> Pass:
    """The body's pass over plain tensors: embeddings, mask, positions where there are any, then keys and values."""

    def run(embeddings_BSD: Tensor, mask_BT: Tensor, *more: Tensor) -> Tensor:
        positions_BS = more[0] if has_positions else None
        past: Any = None
        if keys_and_values := more[has_positions:]:
            rows = len(embeddings_BSD)
            past = prefix_cache(lm, keys_and_values, rows) if is_deep else cache_of(*keys_and_values)
        return lm.states(Placed(embeddings_BSD, mask_BT, positions_BS, past), body)

    return run


def _padded(placed: Placed, length: int, columns: int) -> tuple[Tensor, ...]:
    """Embeddings, mask and positions of rows padded on the right to `length`, behind `columns` of keys and values."""
    embeddings_BSD = placed.embeddings_BSD
    rows, own, _ = embeddings_BSD.shape
    mask_BT = placed.mask_BS
    if mask_BT is None:
        mask_BT = torch.ones(rows, columns + own, dtype=torch.int64, device=embeddings_BSD.device)
    behind = length - own
    inputs = [functional.pad(embeddings_BSD, (0, 0, 0, behind)), functional.pad(mask_BT, (0, behind))]
    if placed.positions_BS is not None:
        last_B1 = placed.positions_BS[:, -1:]
        inputs.append(torch.cat([placed.positions_BS, last_B1.expand(-1, behind)], 1))
    return tuple(inputs)


def _stacked(past: Any) -> list[Tensor]:
    """Keys and values of a cache, [L, B, H, C, K] each."""
    return [torch.stack([getattr(layer, part) for layer in past.layers]) for part in ("keys", "values")]


def _leaves(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)


def _states_and_slopes(run: Pass, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The states and, of half the sum of their squares, the gradient of every input that takes one."""
    with torch.enable_grad():
        states_BSD = run(*inputs)
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        slopes = torch.autograd.grad(states_BSD, learned, states_BSD.detach().clone())
        return [states_BSD.detach().clone(), *(slope.clone() for slope in slopes)]
