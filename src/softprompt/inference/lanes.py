"""Running batches by length: a long row does not make short ones compute its columns.

A step of a running batch computes as many columns for every row as its longest row has. So a row joins the batch where
it costs least, and a new batch, a lane, is opened where that costs less than the padding would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import OutOfMemory
from softprompt.inference.request import Request
from softprompt.inference.running_batch import Running

# What one more lane costs a step, in columns of keys and values: some 50 ms of a small base on a CPU in bfloat16, at 0.01
# ms a row and column. On a GPU a step costs about the same whatever it holds.
LANE_COST_CPU, LANE_COST_GPU = 5_000, 50_000
MAX_LANES = 4


@dataclass
class _Shape:
    """Rows of a lane, its columns, and the columns that its rows need."""

    rows: int
    columns: int
    needed: int

    @property
    def padding(self) -> int:
        """Columns that a step computes for nothing."""
        return self.rows * self.columns - self.needed

    def join(self, columns: int) -> _Shape:
        """The lane with one more row."""
        return _Shape(self.rows + 1, max(self.columns, columns), self.needed + columns)

    def cost_of(self, columns: int) -> int:
        """Columns that a step computes more when a row of that length joins."""
        return (self.rows + 1) * max(self.columns, columns) - self.rows * self.columns


class Lanes:
    """Rows that are being continued, at most `max_rows` of them, in at most `memory_bytes` of key/value state.

    It is used as a running batch is: `join` what `fits`, then `advance` until nothing is left; `cancel` any row in
    between. A row's result does not depend on which rows run beside it.
    `lane_cost` is what one more lane costs a step, in columns; without it, what it costs on this kind of device.
    """

    def __init__(
        self,
        lm: FrozenLM,
        *,
        max_rows: int = 16,
        memory_bytes: int | None = None,
        lane_cost: int | None = None,
    ) -> None:
        self.lm = lm
        self.max_rows = max_rows
        self.memory_bytes = memory_bytes
        self._lanes: list[Running] = []
        if lane_cost is None:
            lane_cost = LANE_COST_CPU if torch.device(lm.device).type == "cpu" else LANE_COST_GPU
        self.lane_cost = lane_cost

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes)

    @property
    def sizes(self) -> list[int]:
        """The number of rows in each lane."""
        return [len(lane) for lane in self._lanes]

    @property
    def requests(self) -> list[Request]:
        """The requests that are running."""
        return [request for lane in self._lanes for request in lane.requests]

    @property
    def bytes(self) -> int:
        """Memory that the running rows' keys and values take, free columns included."""
        return sum(lane.bytes for lane in self._lanes)

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether `requests` can join now."""
        if len(self) + len(requests) > self.max_rows:
            return False
        if self.memory_bytes is None:
            return True
        plan = self._plan(requests)
        lanes_by_id = dict(zip(map(id, self._lanes), self._lanes, strict=True))
        untouched = sum(lane.buffer_bytes_for([]) for lane in self._lanes if id(lane) not in plan)
        joined = sum(
            (lanes_by_id.get(lane) or Running(self.lm)).buffer_bytes_for(joining)
            for lane, joining in plan.items()
        )
        return untouched + joined <= self.memory_bytes

    def demand_possible(self, request: Request) -> None:
        """Raises OutOfMemory for a row that would not fit even alone."""
        if self.memory_bytes is None:
            return
        needed = Running(self.lm).buffer_bytes_for([request])
        if needed > self.memory_bytes:
            raise OutOfMemory(
                f"One row of {request.total} positions takes {needed:,} bytes of key/value state, and the limit is "
                f"{self.memory_bytes:,}. Lower max_new_tokens, shorten the text, or raise the limit."
            )

    def join(self, requests: Sequence[Request]) -> list[Request]:
        """Reads the rows' texts and chooses their first tokens; returns those done, or failed (`failure`)."""
        done: list[Request] = []
        lanes = {id(lane): lane for lane in self._lanes}
        for key, joining in self._plan(requests).items():
            if key not in lanes:
                self._lanes.append(Running(self.lm, max_rows=self.max_rows))
            done += (lanes.get(key) or self._lanes[-1]).join(joining)
        self._close_empty()
        return done

    def advance(self) -> list[Request]:
        """One token for every row; returns the requests that are done, or failed (`failure`), and have left."""
        done = [request for lane in self._lanes for request in lane.advance()]
        self._close_empty()
        return done

    def cancel(self, request: Request) -> None:
        """Lets a row leave now; a row that is done is left alone."""
        for lane in self._lanes:
            lane.cancel(request)
        self._close_empty()

    def _close_empty(self) -> None:
        self._lanes = [lane for lane in self._lanes if len(lane)]

    def _plan(self, requests: Sequence[Request]) -> dict[int, list[Request]]:
        """The requests that join each lane, short ones first; a key that is no lane's id means a new lane."""
        shapes = {
            id(lane): _Shape(len(lane), max(totals, default=0), sum(totals))
            for lane in self._lanes
            for totals in [[request.columns for request in lane.requests]]
        }
        plan: dict[int, list[Request]] = {}
        for request in sorted(requests, key=lambda request: request.columns):
            total = request.columns
            key = min(shapes, key=lambda key: shapes[key].cost_of(total), default=-1)
            shape = shapes.get(key, _Shape(0, 0, 0))
            # All the padding counts, and not this row's alone: many short rows beside a long one add up.
            padding = shape.join(total).padding
            adds = padding - shape.padding > total // 2
            if adds and padding > self.lane_cost and len(shapes) < MAX_LANES:
                key = -1 - len(shapes)
                shape = _Shape(0, 0, 0)
            shapes[key] = shape.join(total)
            plan.setdefault(key, []).append(request)
        return plan
