"""An engine of others behind our server: it chooses tokens, and everything around them is ours.

Inputs are laid out here, and text, stop texts and endings are made of the tokens here, by the code that does so for our own
engine. So an answer differs from our engine's only where the two engines' numbers choose another token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

from softprompt.base.outline import Outline
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.errors import MissingExtra, PromptError
from softprompt.inference.compiled import CompiledPrompt
from softprompt.inference.detokenize import TextStream
from softprompt.inference.request import Request, request
from softprompt.inference.score import RatedToken
from softprompt.prompt.soft_prompt import Prompt
from softprompt.scale.engine_client import engine_client
from softprompt.scale.remote_base import laid_out_only, remote_base
from softprompt.serving.engine import (
    Answer,
    EngineFailed,
    Finished,
    Piece,
    PromptGone,
    Room,
    Work,
)

PROBE_SECONDS = 10.0

log = logging.getLogger(__name__)


class RemoteEngine(ABC):
    """The common part of other projects' engines; a subclass says how one kind of them gives tokens."""

    kind: str

    def __init__(self, url: str, base: Outline, dtype: str, states: str | Path) -> None:
        self.url = url.rstrip("/")
        self.lm = remote_base(base, dtype)
        self.states = Path(states)
        self._fingerprint = base.fingerprint
        self._prompts: dict[str | None, CompiledPrompt] = {
            None: laid_out_only(self.lm, None, (), self._fingerprint)
        }
        self._running: dict[int, asyncio.Task[None]] = {}
        self.problem: str | None = "has not been asked yet"
        self.client = engine_client(self.url)

    @abstractmethod
    def marks_of(self, digest: str) -> tuple[int, ...]:
        """The positions of a prompt that this engine can load. Raises PromptError where it cannot."""

    @abstractmethod
    async def probe(self) -> None:
        """Ask whether the engine works and can take prompts. Raises EngineFailed and httpx's errors where not."""

    @abstractmethod
    def tokens(self, digest: str | None, row: Request) -> AsyncGenerator[int, None]:
        """The tokens that come after those of `row`: at most as many as it may have, an end token included.

        Raises EngineFailed, and DataError for what the engine refuses."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered: what the last probe found."""
        return self.problem is None

    @property
    def prompts(self) -> frozenset[str]:
        """Digests of the prompts that requests may name."""
        return frozenset(digest for digest in self._prompts if digest is not None)

    async def look(self) -> None:
        """Probe the engine."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.probe()
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, EngineFailed) as error:
            problem = str(error) or type(error).__name__
            if problem != self.problem:
                log.warning("%s: %s", self.url, problem)
            self.problem = problem
            return
        self.problem = None

    async def close(self) -> None:
        """Close its connections."""
        await self.client.aclose()

    def load(self, prompt: Prompt, digest: str) -> None:
        """Lets requests name a prompt. Raises PromptError where its file is missing, or not of this base."""
        self._prompts[digest] = laid_out_only(self.lm, prompt, self.marks_of(digest), self._fingerprint)

    def unload(self, digest: str) -> None:
        """Holds a prompt no longer; requests that have arrived keep it."""
        self._prompts.pop(digest, None)

    async def submit(self, work: Work) -> AsyncIterator[Answer]:
        """The answer as it comes; samples of one text run side by side."""
        rows = self._rows(work)
        answers: asyncio.Queue[Answer | BaseException | None] = asyncio.Queue()

        async def follow(row: Request) -> None:
            try:
                async for answer in self._answer(work.digest, row):
                    answers.put_nowait(answer)
            except asyncio.CancelledError:
                answers.put_nowait(self._finished(row, "cancelled"))
                raise
            except httpx.HTTPError as error:
                self.problem = str(error) or type(error).__name__
                answers.put_nowait(EngineFailed("The engine failed while it answered. Try again."))
            except Exception as error:
                answers.put_nowait(error)
            answers.put_nowait(None)

        tasks = [asyncio.create_task(follow(row)) for row in rows]
        group = asyncio.gather(*tasks, return_exceptions=True)
        self._running[id(work)] = asyncio.ensure_future(_whole(group))
        left = len(tasks)
        try:
            while left:
                answer = await answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                if answer is None:
                    left -= 1
                    continue
                yield answer
                left -= isinstance(answer, Finished) and answer.reason == "cancelled"
        finally:
            self._running.pop(id(work), None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def cancel(self, work: Work) -> None:
        """Ends a work that was submitted; its stream ends with what there is."""
        task = self._running.get(id(work))
        if task is not None:
            task.cancel()

    async def score(
        self,
        digest: str | None,
        given: str | Example | Sequence[int],
        continuation: str | None = None,
        top: int = 0,
        end: End = "never",
    ) -> list[RatedToken]:
        """Not to be had: an engine that rates its prompt reads placeholders as if they were text, and keeps what comes of it.

        Raises MissingExtra."""
        raise MissingExtra(
            f"echo and scores are not to be had of {self.kind}. Ask a `softprompt serve` that holds the base."
        )

    def room(self) -> Room:
        """The room for requests now: its own queue has no limit that is known here."""
        return Room(rows=1_000_000, requests=1_000_000)

    def health(self) -> dict[str, int]:
        """Whether it works (`alive`), and rows running."""
        return {"alive": int(self.is_alive), "running": len(self._running), "waiting": 0, "kv_bytes": 0}

    def _rows(self, work: Work) -> list[Request]:
        if work.digest not in self._prompts:
            raise PromptGone("The model was removed a moment ago.")
        self._demand_possible(work)
        prompt = self._prompts[work.digest]
        return [
            request(
                self.lm,
                prompt,
                work.given,
                work.settings,
                sample=sample,
                begun=work.begun[sample] if work.begun else (),
            )
            for sample in range(work.settings.drawn)
        ]

    def _demand_possible(self, work: Work) -> None:
        """Raises MissingExtra for what this engine would do differently, or not at all."""
        settings = work.settings
        reason = (
            "log-probabilities"
            if work.top or settings.rated
            else "response_format, regex, choice and penalties"
            if work.steer is not None
            else "repetition_penalty"  # it would weigh down placeholders
            if settings.repetition_penalty != 1.0
            else "bad_words"
            if settings.bad_words
            else None
        )
        if reason is not None:
            raise MissingExtra(
                f"{reason}: not to be had of {self.kind}. Ask a `softprompt serve` that holds the base."
            )

    async def _answer(self, digest: str | None, row: Request) -> AsyncIterator[Answer]:
        """One sample: pieces as soon as they are certain, then its end. It mirrors what a running batch does."""
        pieces: list[str] = []
        text = TextStream(
            self.lm.tokenizer,
            row.known_ids,
            (*row.settings.stop, *row.ending.stop),
            pieces.append,
            ending=row.ending.text,
        )
        sent, reason = 0, "length"
        for token in row.begun:
            text.add(token)
        source = self.tokens(digest, row)
        try:
            async for token in source:
                row.token_ids.append(token)
                is_end = token in row.ending.ids or text.add(token)
                if pieces:
                    yield Piece(row.sample, "".join(pieces), tuple(row.token_ids[sent:]))
                    sent = len(row.token_ids)
                    pieces.clear()
                if is_end:
                    reason = "stop"
                    break
                if len(row.token_ids) >= row.limit:
                    break
        finally:
            await source.aclose()
        row.text = text.finish()
        if pieces:
            yield Piece(row.sample, "".join(pieces), tuple(row.token_ids[sent:]))
        yield self._finished(row, reason)

    def _finished(self, row: Request, reason: str) -> Finished:
        virtual = sum(mark < 0 for mark in row.given)
        text = row.text or str(self.lm.tokenizer.decode(row.token_ids, skip_special_tokens=True))
        return Finished(
            row.sample,
            text if reason == "cancelled" else row.text,
            reason,
            tuple(row.token_ids),
            (),
            len(row.given) - virtual,
            virtual,
        )


async def _whole(group: Any) -> None:
    await group


def sample_seed(row: Request) -> int:
    """A seed for one sample of a request, below 2**31."""
    digest = hashlib.sha256(f"{row.settings.seed} {row.sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def refuse_vectors(row: Request) -> None:
    """Raises PromptError for a row that has vectors behind the positions that an engine loads."""
    if any(mark < 0 for mark in row.given[row.row.state.length :]):
        raise PromptError(
            "This text joins with the prompt's own, so that its vectors would have to be computed. Change its start."
        )
