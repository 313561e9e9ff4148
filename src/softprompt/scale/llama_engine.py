"""llama-server as an engine: before each request a slot is given the prompt's file, and the answer must say that it was used."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import httpx2 as httpx

from softprompt.errors import DataError, MissingExtra
from softprompt.export.kv_file import placeholder_ids, read_slot_header, slot_header_of, slot_of
from softprompt.inference.request import Request
from softprompt.scale.event_lines import lines_of
from softprompt.scale.remote_engine import RemoteEngine, refuse_vectors, sample_seed
from softprompt.serving.engine import EngineFailed, Work

RESTORES = 3  # tries to give a slot its file
NOBODY = "softprompt-nobody"


class LlamaEngine(RemoteEngine):
    """A llama-server behind `url`, whose --slot-save-path is the folder of files. Its slots must be used by nobody else."""

    kind = "llama"

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._slots: asyncio.Queue[int] = asyncio.Queue()
        self._number = 0
        self._beginning = asyncio.Lock()

    def marks_of(self, digest: str) -> tuple[int, ...]:
        """The positions of a prompt's slot file. Raises PromptError where there is none."""
        return read_slot_header(slot_header_of(self.states, digest)).marks

    async def probe(self) -> None:
        """Ask how many slots it has, and whether it restores them."""
        (await self.client.get("/health")).raise_for_status()
        number = int((await self.client.get("/props")).raise_for_status().json()["total_slots"])
        if self.problem is not None:
            answer = await self.client.post("/slots/0?action=restore", json={"filename": NOBODY})
            if answer.status_code == 501:
                raise EngineFailed(
                    "runs without --slot-save-path. Start llama-server with it, on the folder of --states."
                )
        for slot in range(self._number, number):
            self._slots.put_nowait(slot)
        self._number = max(self._number, number)

    def _demand_possible(self, work: Work) -> None:
        super()._demand_possible(work)
        if (
            work.settings.ignore_end
        ):  # llama-server would rather forbid the end token, which is something else
            raise MissingExtra(
                "ignore_eos: not to be had of llama. Ask a `softprompt serve` that holds the base."
            )

    async def tokens(self, digest: str | None, row: Request) -> AsyncGenerator[int, None]:
        """Tokens of a stream. What was begun is read with the text where the answer is greedy; a drawn one is drawn again."""
        refuse_vectors(row)
        is_warm = row.settings.temperature > 0
        expected = list(row.begun) if is_warm else []
        slot = await self._slots.get()
        try:
            async for token in self._streamed(digest, row, slot, is_warm=is_warm):
                if expected:
                    if token != expected.pop(0):
                        raise EngineFailed("llama-server drew another answer than the one that had begun.")
                    continue
                yield token
        finally:
            self._slots.put_nowait(slot)

    async def _streamed(
        self, digest: str | None, row: Request, slot: int, *, is_warm: bool
    ) -> AsyncGenerator[int, None]:
        settings = row.settings
        positions = row.row.state.length if digest is not None else 0
        ids = [*row.given[positions:], *(() if is_warm else row.begun)]
        if digest is not None:
            ids = [*placeholder_ids(digest, positions, self.lm.vocab_size), *ids]
        body = {
            "prompt": ids,
            "id_slot": slot,
            "cache_prompt": digest is not None,
            "n_predict": row.limit - (0 if is_warm else len(row.begun)),
            "temperature": settings.temperature,
            "samplers": ["temperature", "top_k", "top_p", "min_p"],  # in the order of our own engine
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "repeat_penalty": 1.0,
            "seed": sample_seed(row),
            "logit_bias": [[token, amount] for token, amount in settings.logit_bias.items()],
            "stream": True,
            "return_tokens": True,
            "timings_per_token": True,
        }
        async with AsyncExitStack() as open_answers:
            # Whatever begins at the server may empty slots that are idle. So nothing begins between the restoring of this
            # slot and the first event of its answer, by when the slot is read.
            async with self._beginning:
                for attempt in range(RESTORES):
                    if digest is not None:
                        await self._restore(slot, digest)
                    stream = self.client.stream("POST", "/completion", json=body)
                    answer = await open_answers.enter_async_context(stream)
                    if answer.status_code != 200:
                        _refuse(answer.status_code, (await answer.aread()).decode(errors="replace"))
                    events = _events(answer)
                    record = await anext(events, None)
                    if record is None:
                        raise EngineFailed("llama-server's answer has no tokens.")
                    # Without its file a slot reads placeholders as if they were text, and answers all the same.
                    if int((record.get("timings") or {}).get("cache_n", -1)) >= positions:
                        break
                    if attempt + 1 == RESTORES:
                        raise EngineFailed(
                            "llama-server did not use the slot's file: its answer is thrown away."
                        )
                    await open_answers.aclose()
            while record is not None:
                for token in record.get("tokens") or ():
                    yield int(token)
                if record.get("stop"):
                    return
                record = await anext(events, None)
            raise EngineFailed("llama-server's answer stopped before its end.")

    async def _restore(self, slot: int, digest: str) -> None:
        file = slot_of(self.states, digest).name
        answer = await self.client.post(f"/slots/{slot}?action=restore", json={"filename": file})
        if answer.status_code != 200:
            raise EngineFailed(f"llama-server cannot restore {file}: {answer.text[:200]}")


async def _events(answer: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    async for line in lines_of(answer):
        if line.startswith("data: ") and line != "data: [DONE]":
            record: dict[str, Any] = json.loads(line[6:])
            if "error" in record:
                _refuse(int(record["error"].get("code") or 500), str(record["error"].get("message")))
            yield record


def _refuse(status: int, message: str) -> None:
    if status == 400:
        raise DataError(f"llama-server refuses the request: {message[:300]}")
    raise EngineFailed(f"llama-server answered {status}. Its log says more.")
