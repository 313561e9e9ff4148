"""A running batch: rows with different prompts join, step together, and leave when they are done.

All generation runs in this loop: `generate` fills it from a list, a server from its requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, row_state
from softprompt.base.packed_weights import logits
from softprompt.base.placement import Placed
from softprompt.base.shared_prefix import PrefixGroup, hidden_in_parts, prefix_groups
from softprompt.base.step_attention import can_step, hidden_of_step
from softprompt.errors import NotFinite, OutOfMemory
from softprompt.inference.detokenize import TextStream
from softprompt.inference.prefill import Prefilled, PrefillRow, like_lengths, prefill, prefill_groups
from softprompt.inference.request import FinishReason, Request
from softprompt.inference.running_cache import RunningCache, blank_columns, room
from softprompt.inference.sampling import (
    biased,
    draw,
    filtered_probabilities,
    penalised,
    row_generator,
    without,
)

SHRINKS_BELOW = 4  # buffers are replaced where they are this many times what the rows need
KEPT_BYTES = 64 * 2**20  # of an empty batch's buffers: the next rows would make them again


class Running:
    """Rows that are being continued, at most `max_rows` of them, in at most `memory_bytes` of key/value state.

    `admit` what `fits`, then `step` until nothing is left; `cancel` any row in between. A row's result does not
    depend on which rows run beside it, nor on when it joined.
    """

    def __init__(self, lm: FrozenLM, *, max_rows: int = 16, memory_bytes: int | None = None) -> None:
        self.lm = lm
        self.max_rows = max_rows
        self.memory_bytes = memory_bytes
        self._slots: list[_Slot] = []
        self._steps_whole = can_step(lm)
        blank = 0 if self._steps_whole else blank_columns(lm)
        self._cache = RunningCache(lm.device, blank=blank, follows=self._steps_whole)
        self._ids_B = torch.zeros(0, dtype=torch.int64, device=lm.device)
        self._positions_B = torch.zeros(0, dtype=torch.int64, device=lm.device)
        # Which tokens occurred in each row; no columns while no row has a repetition penalty.
        self._seen_BV = torch.zeros(0, 0, dtype=torch.bool, device=lm.device)
        self._step_settings = _StepSettings.of([], lm.device)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def requests(self) -> list[Request]:
        """The requests that are running."""
        return [slot.request for slot in self._slots]

    @property
    def bytes(self) -> int:
        """Memory that the running rows' keys and values take, free columns included."""
        return self._cache.bytes

    def bytes_for(self, requests: Sequence[Request]) -> int:
        """Memory that keys and values take at most once `requests` run beside the rows that are running.

        It counts every row at its full length, and the copy that exists while texts are being read."""
        everyone = [*self.requests, *requests]
        columns = room(max((request.columns for request in everyone), default=0))
        read = max((request.own_marks for request in requests), default=0)
        return (len(everyone) * columns + len(requests) * read) * position_bytes(self.lm)

    def buffer_bytes_for(self, requests: Sequence[Request]) -> int:
        """Like `bytes_for`, of the buffers that there would be: they do not shrink when rows join."""
        rows, columns = self._cache.mask.shape
        everyone = [*self.requests, *requests]
        rows = max(rows, len(everyone))
        columns = max(columns, room(max((request.columns for request in everyone), default=0)))
        read = max((request.own_marks for request in requests), default=0)
        return (rows * columns + len(requests) * read) * position_bytes(self.lm)

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether `requests` can join now.

        Raises OutOfMemory for a request that would not fit even alone.
        """
        if len(self._slots) + len(requests) > self.max_rows:
            return False
        if self.memory_bytes is None or self.bytes_for(requests) <= self.memory_bytes:
            return True
        if not self._slots and len(requests) == 1:
            raise OutOfMemory(
                f"One row of {requests[0].total} positions takes {self.bytes_for(requests):,} bytes of key/value "
                f"state, and the limit is {self.memory_bytes:,}. Lower max_new_tokens or raise the limit."
            )
        return False

    def admit(self, requests: Sequence[Request]) -> list[Request]:
        """Reads the rows' texts, those of like length in one pass, and chooses their first tokens; returns those done.

        Raises NotFinite where a row's numbers are not finite; that row has left, and the others may continue."""
        return _demand_finite(self.join(requests))

    def step(self) -> list[Request]:
        """One token for every row; returns the requests that are done with it and have left. Raises as `admit` does."""
        return _demand_finite(self.advance())

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> list[Request]:
        """Like `admit`, but a row that is not finite is returned with the others, its `failure` set."""
        if not requests:
            return []
        started = len(self._slots)
        self._reserve(requests)
        hidden: list[Tensor] = []
        rows = list({id(request.row): request.row for request in requests}.values())
        for done in prefill_groups(self.lm, like_lengths(self.lm, rows)):
            for b, row in enumerate(done.rows):
                for request in requests:
                    if request.row is row:
                        self._join(request, done, b)
                        hidden.append(done.hidden_BTD[b, row.rest - 1])
        self._step_settings = _StepSettings.of(self.requests, self.lm.device)
        return self._chosen(logits(self.lm, torch.stack(hidden)), started)

    def _join(self, request: Request, done: Prefilled, row: int) -> None:
        b = len(self._slots)
        self._cache.join(done.cache, row, *done.span(row))
        self._slots.append(self._slot(request))
        self._positions_B[b] = len(request.row.marks)
        if request.settings.repetition_penalty != 1.0:
            self._seen_BV[b] = False  # another row may have had this index before
            self._seen_BV[b, [*request.known_ids, *request.begun]] = True

    @torch.inference_mode()
    def advance(self) -> list[Request]:
        """Like `step`, but a row that is not finite is returned with the others, its `failure` set."""
        rows = len(self._slots)
        if not rows:
            return []
        mask_BS = self._cache.open_column()
        embeddings_B1D = self.lm.embed(self._ids_B[:rows, None])
        placed = Placed(embeddings_B1D, mask_BS, self._positions_B[:rows, None], self._cache)
        prefixes = self._step_settings.prefixes
        if self._steps_whole:
            real_BC = self._cache.mask[:rows]
            hidden_B1D = hidden_of_step(self.lm, placed, self._cache.buffers, real_BC, prefixes)
        else:
            hidden_B1D = hidden_in_parts(self.lm, placed, prefixes)
        self._cache.advance()
        self._positions_B[:rows] += 1
        return self._chosen(logits(self.lm, hidden_B1D[:, -1]), 0)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Removes a row now. Its text so far stays in the request; a row that is done is left alone."""
        row = next((b for b, slot in enumerate(self._slots) if slot.request is request), None)
        if row is not None:
            self._retire(row, "cancelled")
            self._shrink()
            self._step_settings = _StepSettings.of(self.requests, self.lm.device)

    def _chosen(self, logits_BV: Tensor, start: int) -> list[Request]:
        """Chooses the next tokens of the rows from `start` on, and retires those that are done."""
        step = self._step_settings
        # argmax alone needs no float32
        if step.penalises or step.biases or step.rated or step.warm or step.steered:
            logits_BV = logits_BV.float()
        # Log-probabilities are reported of the base's own distribution, before anything below changes it.
        raw_BV = logits_BV
        requests = [slot.request for slot in self._slots[start:]]
        if step.biases:
            logits_BV = biased(logits_BV, [request.settings.logit_bias for request in requests])
        if step.penalises:
            logits_BV = penalised(logits_BV, self._seen_BV[start : len(self._slots)], step.penalty_B[start:])
        if step.bans:
            logits_BV = without(logits_BV, [request.banned_next for request in requests])
        steered = [b for b in step.steered if b >= start]
        if steered:
            logits_BV = logits_BV.clone()  # the raw ones are rated
        for b in steered:
            request = self._slots[b].request
            assert request.steering is not None
            try:
                logits_BV[b - start] = request.steering.steered(logits_BV[b - start], request.token_ids)
            except Exception as error:  # of this row alone
                request.failure = error
        # Not argmax, which takes four times as long in bfloat16 on a CPU. Of equal logits both take the first one, and a NaN
        # is the largest, so that a row is finite where its largest logit is.
        largest_B, ids_B = logits_BV.max(1)
        finite_B = largest_B.isfinite()
        warm = [b for b in step.warm if b >= start]
        if warm:
            local = [b - start for b in warm]
            probabilities_BV = filtered_probabilities(
                logits_BV[local],
                *(each[warm] for each in (step.temperature_B, step.top_k_B, step.top_p_B, step.min_p_B)),
            )
            uniform_B = torch.cat(
                [torch.rand(1, generator=self._slots[b].generator, dtype=torch.float64) for b in warm]
            )
            ids_B[local] = draw(probabilities_BV, uniform_B)
        # Kept on the device too, as the next step's input.
        self._ids_B[start : len(self._slots)] = ids_B
        ids: list[int] = ids_B.tolist()
        broken = [b for b, finite in enumerate(finite_B.tolist(), start=start) if not finite]
        if step.rated:
            sums_B = raw_BV.logsumexp(1)
            chosen_B = raw_BV.gather(1, ids_B[:, None])[:, 0] - sums_B
            for row, (slot, value) in enumerate(zip(self._slots[start:], chosen_B.tolist(), strict=True)):
                if slot.request.settings.rated:
                    slot.request.log_probabilities.append(value)
                if slot.request.top:
                    slot.request.likeliest.append(_likeliest(raw_BV[row] - sums_B[row], slot.request.top))
        finished: list[tuple[int, FinishReason]] = []
        for b, token in enumerate(ids, start=start):
            request = self._slots[b].request
            if b in broken and request.failure is None:
                request.failure = _not_finite(self.lm, request)
            if request.failure is not None:  # the other rows have their tokens and may go on
                finished.append((b, "cancelled"))
                continue
            request.token_ids.append(token)
            reason = self._reason(self._slots[b], token)
            if reason is not None:
                finished.append((b, reason))
            elif request.settings.repetition_penalty != 1.0:
                self._seen_BV[b, token] = True
        # From the last row down: the last row takes the place of one that leaves, and must not have left before it.
        done = [self._retire(b, reason) for b, reason in reversed(finished)]
        if done:
            self._shrink()
            self._step_settings = _StepSettings.of(self.requests, self.lm.device)
        return done[::-1]

    def _reason(self, slot: _Slot, token: int) -> FinishReason | None:
        request = slot.request
        if token in request.ending.ids:
            return "stop"
        if slot.text is not None and slot.text.add(token):
            return "stop"
        if request.steering is not None and request.steering.is_complete(request.token_ids):
            return "stop"
        return "length" if len(request.token_ids) >= request.limit else None

    def _retire(self, b: int, reason: FinishReason) -> Request:
        slot = self._slots[b]
        request = slot.request
        if slot.text is None:
            slot.text = self._text_stream(request)
            slot.text.ids += request.token_ids
        request.text = slot.text.finish()
        request.finish_reason = reason
        if request.keep_state:
            request.state = self._cache.state(
                b, (*request.given, *request.token_ids)[: self._cache.length(b)]
            )
        self._cache.leave(b)
        last = self._slots.pop()
        if last is not slot:
            self._slots[b] = last
            for tensor in (self._ids_B, self._positions_B, self._seen_BV):
                tensor[b] = tensor[len(self._slots)]
        return request

    def _slot(self, request: Request) -> _Slot:
        slot = _Slot(request)
        # Text is only followed as it comes where something waits for it.
        if request.settings.stop or request.ending.stop or request.on_text:
            slot.text = self._text_stream(request)
            for token in request.begun:
                slot.text.add(token)
        if request.settings.temperature > 0:
            slot.generator = row_generator(request.settings.seed, request.sample, request.given)
            for _ in request.begun:  # each of these tokens took a draw
                torch.rand(1, generator=slot.generator, dtype=torch.float64)
        return slot

    def _text_stream(self, request: Request) -> TextStream:
        return TextStream(
            self.lm.tokenizer,
            request.known_ids,
            (*request.settings.stop, *request.ending.stop),
            request.on_text,
            ending=request.ending.text,
        )

    def _shrink(self) -> None:
        """Gives back most of the buffers where the rows that are left need less than a quarter of them."""
        rows, columns = self._cache.mask.shape
        if not self._slots:
            if self._cache.bytes > KEPT_BYTES:
                self._cache.clear()
            return
        needed = room(max(slot.request.columns for slot in self._slots))
        if len(self._slots) * needed * SHRINKS_BELOW < rows * columns:
            self._cache.reserve(len(self._slots), needed, exactly=True)

    def _reserve(self, requests: Sequence[Request]) -> None:
        everyone = [*self.requests, *requests]
        rows, columns = len(everyone), room(max(request.columns for request in everyone))
        longest = max(request.own_marks for request in requests)
        # Buffers only grow, unless the widest and the most rows there ever were would together pass the limit.
        both = max(rows, self._cache.mask.shape[0]) * max(columns, self._cache.mask.shape[1])
        exactly = self.memory_bytes is not None and both * position_bytes(self.lm) > self.memory_bytes
        self._cache.reserve(rows, columns, longest, exactly=exactly)
        rows = max(rows, len(self._ids_B))
        penalises = any(request.settings.repetition_penalty != 1.0 for request in requests)
        width = self.lm.vocab_size if penalises else self._seen_BV.shape[1]
        self._ids_B = _grown(self._ids_B, (rows,))
        self._positions_B = _grown(self._positions_B, (rows,))
        self._seen_BV = _grown(self._seen_BV, (rows, width))


@dataclass
class _Slot:
    """A running row: its request, the text so far where someone follows it, and its random numbers."""

    request: Request
    text: TextStream | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class _StepSettings:
    """The rows' settings as tensors; they change only when a row joins or leaves."""

    penalises: bool
    biases: bool
    bans: bool
    rated: bool
    warm: list[int]
    steered: list[int]
    prefixes: list[PrefixGroup]
    penalty_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> _StepSettings:
        every = [request.settings for request in requests]
        return cls(
            any(settings.repetition_penalty != 1.0 for settings in every),
            any(settings.logit_bias for settings in every),
            any(settings.bad_words for settings in every),
            any(request.settings.rated or request.top for request in requests),
            [b for b, settings in enumerate(every) if settings.temperature > 0],
            [b for b, request in enumerate(requests) if request.steering is not None],
            prefix_groups([request.row.shared for request in requests], device),
            torch.tensor([settings.repetition_penalty for settings in every], device=device),
            torch.tensor([settings.temperature for settings in every], device=device),
            torch.tensor([settings.top_k for settings in every], device=device, dtype=torch.int64),
            torch.tensor([settings.top_p for settings in every], device=device),
            torch.tensor([settings.min_p for settings in every], device=device),
        )


def _demand_finite(done: list[Request]) -> list[Request]:
    for request in done:
        if request.failure is not None:
            raise request.failure
    return done


def _likeliest(log_probabilities_V: Tensor, top: int) -> list[tuple[int, float]]:
    best = log_probabilities_V.topk(min(top, len(log_probabilities_V)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _not_finite(lm: FrozenLM, row: Request) -> NotFinite:
    text = str(lm.tokenizer.decode(row.known_ids, skip_special_tokens=True))
    return NotFinite(
        f'The row "{text if len(text) <= 60 else text[:57] + "..."}" has logits that are not finite at its new token {len(row.token_ids) + 1}: its prompt '
        f"overflows {lm.name}, or a weight of the base is NaN. Load the base with dtype float32, or use another prompt."
    )


def position_bytes(lm: FrozenLM) -> int:
    """Memory of one position's keys and values in all layers, measured once for a base."""
    if lm not in _POSITION_BYTES:
        with torch.inference_mode():
            done = prefill(lm, [PrefillRow(EMPTY, (1 % lm.vocab_size,))])
        _POSITION_BYTES[lm] = row_state(done.cache, 0, 0, 1, (1,)).bytes
    return _POSITION_BYTES[lm]


_POSITION_BYTES: WeakKeyDictionary[FrozenLM, int] = WeakKeyDictionary()


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    grown = tensor.new_zeros(shape)
    grown[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return grown
