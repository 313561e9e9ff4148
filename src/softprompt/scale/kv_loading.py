"""The positions of a request that come from a prompt's file of keys and values, and the slots of a paged cache they take.

No vLLM here: vllm_connector puts it to work. Nothing that a request holds may raise in the scheduler, since that would end the
engine with everybody's requests: a request that cannot be served is planned as a load that fails, and fails alone.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import PromptError, WrongBase
from softprompt.export.kv_file import KvHeader, file_of, placeholder_ids, read_header, read_kv

PARAMETER = "softprompt"
POSITIONS = "softprompt_positions"
MAX_HEADERS = 10_000
MAX_BYTES = 10**9  # of keys and values that a worker keeps in memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """Positions `start` to `end` of a prompt go into these slots of the cache; `fault` says why they cannot."""

    digest: str
    start: int
    end: int
    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    fault: str | None = None


@dataclass
class Plan:
    """The number of a request's first positions that come from a file; `fault` says why the request cannot be served."""

    digest: str
    positions: int
    fault: str | None = None


class Scheduling:
    """The scheduler's half: what is to be loaded for which request. It reads headers of files, and no tensors."""

    def __init__(
        self,
        folder: str | Path,
        *,
        block_size: int,
        vocabulary: int,
        shape: tuple[int, int, int],
        base_sha256: str | None,
    ) -> None:
        self.folder = Path(folder)
        self.block_size, self.vocabulary, self.shape, self.base_sha256 = (
            block_size,
            vocabulary,
            shape,
            base_sha256,
        )
        self._headers: OrderedDict[str, tuple[tuple[int, int], KvHeader]] = OrderedDict()
        self._loads: dict[str, Load] = {}

    def matched(
        self,
        params: Mapping[str, Any] | None,
        token_ids: Sequence[int] | None,
        salt: str | None,
        computed: int,
        request_id: str = "",
    ) -> int:
        """Positions that are loaded beyond the first `computed` ones, which the engine has already.

        A request that names no prompt loads nothing. Of one that cannot be served all but the last position are said to
        be loaded: the worker then reports that they were not."""
        plan = self.plan(params, token_ids, salt)
        if plan is None:
            return 0
        if plan.fault is not None:
            log.error("request %s is refused: %s", request_id, plan.fault)
            return max(0, len(token_ids or ()) - 1 - computed)
        return max(0, plan.positions - computed)

    def plan(
        self, params: Mapping[str, Any] | None, token_ids: Sequence[int] | None, salt: str | None
    ) -> Plan | None:
        """The meaning of a request's parameters; None if they name no prompt. Never raises."""
        if not isinstance(params, Mapping) or PARAMETER not in params:
            return None
        digest, positions = params.get(PARAMETER), params.get(POSITIONS)
        try:
            if not isinstance(digest, str) or not isinstance(positions, int) or positions < 0:
                raise PromptError(
                    f"wanted {PARAMETER}: a digest, and {POSITIONS}: a number, in kv_transfer_params"
                )
            header = self.header(digest)
            if positions > header.positions:
                raise PromptError(f"asks for {positions} positions of a prompt of {header.positions}")
            if salt != digest:
                raise PromptError(
                    "its cache_salt is not the prompt's digest, so that cached keys could be mixed up"
                )
            ids = list(token_ids or ())
            if len(ids) <= positions:
                raise PromptError("no token follows the prompt's positions")
            if ids[:positions] != placeholder_ids(digest, positions, self.vocabulary):
                raise PromptError("its first tokens are not the prompt's placeholders")
        except Exception as error:  # whatever it is, the scheduler must live
            return Plan(str(digest)[:80], 0, f"{type(error).__name__}: {error}")
        return Plan(digest, positions)

    def header(self, digest: str) -> KvHeader:
        """The description of a digest's file; the last MAX_HEADERS are kept. Raises PromptError."""
        path = file_of(self.folder, digest)
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
        except OSError:
            stamp = (0, 0)
        kept = self._headers.get(digest)
        if kept is None or kept[0] != stamp:
            header = read_header(path)
            self._demand_base(header)
            self._headers[digest] = kept = (stamp, header)
        self._headers.move_to_end(digest)
        while len(self._headers) > MAX_HEADERS:
            self._headers.popitem(last=False)
        return kept[1]

    def _demand_base(self, header: KvHeader) -> None:
        layers, _, heads, width = header.shape
        if (layers, heads, width) != self.shape:
            raise WrongBase(
                f"{header.name}: its keys and values are of {layers} layers of {heads} heads of {width} numbers, and this base "
                f"has {', '.join(map(str, self.shape))}. Export it for this base."
            )
        if self.base_sha256 is not None and header.base_sha256 != self.base_sha256:
            raise WrongBase(f"{header.name}: was compiled for {header.base}, whose weights are not these.")

    def allocated(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        token_ids: Sequence[int] | None,
        salt: str | None,
        blocks: Sequence[int],
        loaded: int,
    ) -> None:
        """The engine has given a request blocks, `loaded` of whose positions are to be filled in the coming step."""
        plan = self.plan(params, token_ids, salt)
        if plan is None or loaded <= 0:
            return
        end = plan.positions if plan.fault is None else max(loaded, len(token_ids or ()) - 1)
        start = max(0, end - loaded)
        size = self.block_size
        slots = tuple(blocks[at // size] * size + at % size for at in range(start, end))
        touched = tuple(dict.fromkeys(blocks[at // size] for at in range(start, end)))
        self._loads[request_id] = Load(plan.digest, start, end, slots, touched, plan.fault)

    def take(self) -> list[Load]:
        """The loads of the coming step; they are then forgotten."""
        loads, self._loads = list(self._loads.values()), {}
        return loads


@dataclass
class LoadedStates:
    """The worker's half: keys and values of prompts in memory, the most recently used within `max_bytes`.

    Of tensor-parallel workers each keeps the heads that it computes."""

    folder: Path
    max_bytes: int = MAX_BYTES
    rank: int = 0
    ranks: int = 1
    reads: int = 0
    _kept: OrderedDict[str, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, digest: str) -> tuple[Tensor, Tensor]:
        """Keys and values [L, P, H, K]. Raises PromptError and DamagedPrompt."""
        with self._lock:
            if digest not in self._kept:
                _, keys, values = read_kv(file_of(self.folder, digest))
                self.reads += 1
                self._kept[digest] = (
                    own_heads(keys, self.rank, self.ranks),
                    own_heads(values, self.rank, self.ranks),
                )
            self._kept.move_to_end(digest)
            while len(self._kept) > 1 and self.bytes > self.max_bytes:
                self._kept.popitem(last=False)
            return self._kept[digest]

    @property
    def bytes(self) -> int:
        """Memory that is taken now."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._kept.values() for tensor in pair)


def own_heads(tensor_LPHK: Tensor, rank: int, ranks: int) -> Tensor:
    """The heads of one of several workers: a share each, or, where there are fewer heads than workers, one that several have."""
    heads = tensor_LPHK.shape[2]
    if heads >= ranks:
        share = heads // ranks
        return tensor_LPHK[:, :, rank * share : (rank + 1) * share].contiguous()
    head = rank * heads // ranks
    return tensor_LPHK[:, :, head : head + 1].contiguous()
