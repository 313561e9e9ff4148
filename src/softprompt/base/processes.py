"""Processes that work together: each reads a share of a step's rows, and only the prompt's gradient is added up.

Every process holds the base, takes the same steps on the same summed gradient, and so holds the same prompt throughout.
What goes over the network is a gradient as large as the prompt (46 KB for 20 virtual tokens of width 576) and a loss for
each step. Started by `torchrun`, or by any program that has made torch's process group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from softprompt.data.encoded import Encoded
from softprompt.errors import BaseError, RecipeError

Value = TypeVar("Value")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that learn together, by default alone. `shares_rows` is off where each reads every row."""

    rank: int = 0
    count: int = 1
    shares_rows: bool = True

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """This process' rows: every `count`-th in order of length, so that all have about the same work."""
        if self.count == 1 or not self.shares_rows:
            return rows
        return sorted(rows, key=len)[self.rank :: self.count]

    def add_up(self, tensors: Sequence[Tensor], figures: list[float]) -> None:
        """Adds up tensors and figures over all processes, in place; all processes then hold the same bits."""
        if self.count == 1 or not self.shares_rows:
            return
        # One message: float64 keeps the figures as they are, and the sum of gradients does not round.
        message = torch.cat(
            [
                *(tensor.detach().double().cpu().flatten() for tensor in tensors),
                torch.tensor(figures, dtype=torch.float64),
            ]
        )
        with _one_line():
            distributed.all_reduce(message)
        parts = torch.split(message, [*(tensor.numel() for tensor in tensors), len(figures)])
        for tensor, part in zip(tensors, parts, strict=False):
            tensor.copy_(part.view(tensor.shape))
        figures[:] = parts[-1].tolist()

    def same(self, value: Value) -> Value:
        """The first process' value, on all of them."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        with _one_line():
            distributed.broadcast_object_list(box, src=0)
        shared: Value = box[0]
        return shared

    def share_out(
        self, work: Callable[[Sequence[Item]], Sequence[Value]], items: Sequence[Item]
    ) -> list[Value]:
        """What `work` makes of each item, in order: each process works on its share, and all get everything."""
        if self.count == 1 or not self.shares_rows:
            return list(work(items))
        own = items[self.rank :: self.count]
        parts: list[Any] = [None] * self.count
        made = list(work(own)) if own else []
        with _one_line():
            distributed.all_gather_object(parts, made)
        return [parts[index % self.count][index // self.count] for index in range(len(items))]


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Raises BaseError where another process is gone, whose own message says why."""
    try:
        yield
    except RuntimeError as error:
        raise BaseError(
            "Another of the processes that work together has ended; its own message says why. Start all of them again."
        ) from error


def started_processes() -> int:
    """The number of processes that this one was started with; torch is not asked."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def demand_alone(verb: str) -> None:
    """Raises RecipeError where `torchrun` started several processes: each would do all of `verb`, in the same folder."""
    if started_processes() > 1:
        raise RecipeError(
            f"WORLD_SIZE={started_processes()}: `{verb}` runs in one process. Start it without torchrun; `tune` and `evaluate` "
            "take several, and so do `generate` and `serve` with --spread tensor or layers."
        )


def own_gpu() -> int:
    """The GPU of this process among those that were started on the same machine."""
    return int(os.environ.get("LOCAL_RANK", "0") or 0)


def joined(shares_rows: bool = True) -> Processes:
    """This process in torch's process group, which is made first where `torchrun` started several; alone otherwise.

    Raises BaseError where the processes do not find each other."""
    if not distributed.is_available():
        return Processes()
    if not distributed.is_initialized():
        if started_processes() == 1:
            return Processes()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            distributed.init_process_group(backend)
        except (ValueError, RuntimeError) as error:
            raise BaseError(
                f"WORLD_SIZE={started_processes()}: the processes do not find each other ({error}). Start them with "
                "`torchrun --nproc-per-node N -m softprompt tune ...`, or unset WORLD_SIZE to run alone."
            ) from error
    return Processes(distributed.get_rank(), distributed.get_world_size(), shares_rows)
