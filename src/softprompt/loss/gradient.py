"""The loss of some rows and its gradient at the prompt: all that learning needs of the base.

The gradient is taken at a copy of the plain prompt, in pieces that fit into memory, and goes from there to the trained
form. Several prompts can share a pass: each row of the batch reads its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from softprompt.base.processes import Processes
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded
from softprompt.errors import OutOfMemory
from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain


class Loss(Protocol):
    """The loss in nats of every trained token of a batch under a prompt, float32 [N], differentiable towards it.

    FrozenLM.token_nll and loss.fast.FastLoss are two; a test's fake is a lambda."""

    def __call__(self, batch: Batch, prompt: Plain | None = None) -> Tensor: ...


READ_POSITIONS = (
    16_384  # a GPU reads so many about as fast as a few hundred, since starting kernels costs most
)


def positions_read(device: torch.device) -> int:
    """How many positions a pass without a gradient takes at least, where a batch has fewer; 0 on a CPU."""
    return 0 if device.type == "cpu" else READ_POSITIONS


class Gradients:
    """Losses and gradients by `loss`, at most `rows` rows a forward pass; without a gradient more, up to `read_positions`.

    Where memory runs out, `rows` is halved and `halved(rows)` is called; a pass without a gradient goes down to `rows`. Where several
    `processes` learn together, each reads its share of the rows, and all get the sums."""

    def __init__(
        self,
        loss: Loss,
        rows: int,
        halved: Callable[[int], None] = lambda rows: None,
        processes: Processes | None = None,
        read_positions: int = 0,
    ) -> None:
        self.loss, self.rows, self.halved, self.read_positions = loss, rows, halved, read_positions
        self.processes = processes or Processes()

    def __call__(self, forms: Sequence[Form], rows: Sequence[Sequence[Encoded]]) -> list[float]:
        """Adds to each form's gradient that of the mean loss of its own rows. Mean losses, in nats per trained token.

        Raises OutOfMemory where even one row does not fit."""
        prompts = [form() for form in forms]
        while True:
            leaves, losses = [_leaf(prompt) for prompt in prompts], MeanLosses(rows)
            try:
                for nll_N, piece in self._pieces(leaves, rows, self.rows):
                    losses.weighted_sum(nll_N, piece).backward()  # type: ignore[no-untyped-call]
                    losses.add(nll_N, piece)  # last, since it waits for a GPU
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(rows, error)
        self.processes.add_up([_gradient(tensor) for leaf in leaves for tensor in leaf], losses.sums)
        for prompt, leaf in zip(prompts, leaves, strict=True):
            torch.autograd.backward(prompt, [_gradient(tensor) for tensor in leaf])
        return losses.means()

    def losses(self, prompts: Sequence[Plain], rows: Sequence[Sequence[Encoded]]) -> list[float]:
        """Each prompt's mean loss on its own rows, in nats per trained token; no gradient."""
        while True:
            losses, at_a_time = MeanLosses(rows), self.rows_read(chain.from_iterable(rows))
            try:
                with torch.inference_mode():
                    for nll_N, piece in self._pieces(prompts, rows, at_a_time):
                        losses.add(nll_N, piece)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if at_a_time == self.rows or not _is_out_of_memory(error):
                    raise
                self.read_positions //= 2
                torch.cuda.empty_cache()
        self.processes.add_up([], losses.sums)
        return losses.means()

    def rows_read(self, rows: Iterable[Encoded]) -> int:
        """How many of `rows` a pass without a gradient takes."""
        if not self.read_positions:
            return self.rows
        return max(self.rows, self.read_positions // max(map(len, rows), default=1))

    def _pieces(
        self, prompts: Sequence[Plain], rows: Sequence[Sequence[Encoded]], at_a_time: int
    ) -> Iterator[tuple[Tensor, list[tuple[int, Encoded]]]]:
        """The losses of every token, `at_a_time` rows a pass at most, and those rows with their owners."""
        shares = [self.processes.share(own) for own in rows]
        for prompt, starts, owned in _shared(prompts, shares):
            for first in range(0, len(owned), at_a_time):
                piece = owned[first : first + at_a_time]
                batch = collate([row for _, row in piece])
                if starts:
                    start_B = torch.tensor([starts[r] for r, _ in piece])
                    batch = replace(batch, soft_BS=_shifted(batch.soft_BS, start_B))
                yield self.loss(batch, prompt), piece

    def _halve(self, rows: Sequence[Sequence[Encoded]], error: BaseException) -> None:
        largest = min(self.rows, sum(map(len, rows)))
        if largest == 1:
            longest = max(len(row) for own in rows for row in own)
            raise OutOfMemory(
                f"{longest} positions of one row do not fit into memory. Shorten the text with "
                "data.max_length and data.on_overflow: truncate, or take a smaller base."
            ) from error
        self.rows = math.ceil(largest / 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halved(self.rows)


class MeanLosses:
    """Adds up the losses of each owner's rows, which come in pieces that may mix owners."""

    def __init__(self, rows: Sequence[Sequence[Encoded]]) -> None:
        self.tokens = [sum(row.trained_tokens for row in own) for own in rows]
        self.sums = [0.0] * len(rows)

    def weighted_sum(self, nll_N: Tensor, piece: Sequence[tuple[int, Encoded]]) -> Tensor:
        """The piece's part of the sum of all owners' mean losses, to be differentiated."""
        owners = [r for r, row in piece for _ in range(row.trained_tokens)]
        share_N = torch.tensor([1 / self.tokens[r] for r in owners], device=nll_N.device)
        return (nll_N * share_N).sum()

    def add(self, nll_N: Tensor, piece: Sequence[tuple[int, Encoded]]) -> None:
        """Adds the figures of a piece."""
        counts = [row.trained_tokens for _, row in piece]
        nll_N = nll_N.detach().cpu().double()  # fetched from a GPU at once, not row by row
        for (r, _), own in zip(piece, torch.split(nll_N, counts), strict=True):
            self.sums[r] += float(own.sum())

    def means(self) -> list[float]:
        """Each owner's mean loss, in nats per trained token."""
        return [total / count for total, count in zip(self.sums, self.tokens, strict=True)]


def _shared(
    prompts: Sequence[Plain], rows: Sequence[Sequence[Encoded]]
) -> list[tuple[Plain, list[int], list[tuple[int, Encoded]]]]:
    """The rows that can go through the base together, and the prompt that they read: (prompt, starts, [(owner, row)]).

    `starts` says where in a prompt that several share each owner's part begins; it is empty for a prompt of one owner.
    Rows of similar length come together, so that batches hold little padding."""
    owned = [sorted(((r, row) for row in own), key=_length) for r, own in enumerate(rows)]
    vectors = [prompt[0] for prompt in prompts if len(prompt) == 1]
    if len(prompts) == 1 or len(vectors) < len(prompts):
        # Keys and values come before a whole batch, so deep prompts take a pass each.
        return [(prompt, [], own) for prompt, own in zip(prompts, owned, strict=True)]
    # One long prompt, of which every row reads its owner's part.
    starts = list(accumulate(map(len, vectors[:-1]), initial=0))
    return [((torch.cat(vectors),), starts, sorted(chain.from_iterable(owned), key=_length))]


def _length(owned: tuple[int, Encoded]) -> int:
    return len(owned[1])


def _shifted(soft_BS: Tensor, start_B: Tensor) -> Tensor:
    """The rows of the prompt that virtual positions read, further on by each row's start; tokens keep their -1."""
    return torch.where(soft_BS < 0, soft_BS, soft_BS + start_B[:, None])


def _leaf(prompt: Plain) -> Plain:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in prompt)


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:  # a process without a row of this step
        leaf.grad = torch.zeros_like(leaf)
    return leaf.grad


def _is_out_of_memory(error: BaseException) -> bool:
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in message for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
