"""vLLM as an engine: a stock server that was started with softprompt.scale.vllm_connector."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from softprompt.errors import DataError
from softprompt.export.kv_file import file_of, placeholder_ids, read_header
from softprompt.inference.request import Request
from softprompt.scale.event_lines import lines_of
from softprompt.scale.kv_loading import PARAMETER, POSITIONS
from softprompt.scale.remote_engine import RemoteEngine, refuse_vectors, sample_seed
from softprompt.serving.engine import EngineFailed

NOBODY = "0" * 64  # a digest that no prompt has


class VllmEngine(RemoteEngine):
    """A vLLM server behind `url`, with the folder of files that its connector reads."""

    kind = "vllm"
    model: str | None = None

    def marks_of(self, digest: str) -> tuple[int, ...]:
        """The positions of a prompt's file. Raises PromptError where there is none."""
        return read_header(file_of(self.states, digest)).marks

    async def probe(self) -> None:
        """Ask for its model, and, when it was not well before, whether its connector is there.

        Without one it would read placeholders as if they were text and answer nonsense. So it is asked for a prompt that
        does not exist, which only a server without connector answers."""
        listed = (await self.client.get("/v1/models")).raise_for_status().json()["data"]
        name, longest = str(listed[0]["id"]), listed[0].get("max_model_len")
        if self.problem is not None or name != self.model:
            self.model = None
            body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 1, **_about(NOBODY, 1)}
            answer = await self.client.post("/v1/completions", json=body)
            if answer.status_code < 500:
                raise EngineFailed(
                    "runs without softprompt.scale.vllm_connector, or refuses token ids. Start it with --kv-transfer-config as docs/serving.md says."
                )
        self.model, self.longest = name, longest

    async def tokens(self, digest: str | None, row: Request) -> AsyncGenerator[int, None]:
        """Tokens of a stream. What was begun is read with the text where the answer is greedy; a drawn one is drawn again
        from its start, since vLLM's draws cannot be skipped, and must begin alike."""
        refuse_vectors(row)
        settings = row.settings
        is_warm = settings.temperature > 0
        positions = row.row.state.length if digest is not None else 0
        ids = [*row.given[positions:], *(() if is_warm else row.begun)]
        if digest is not None:
            ids = [*placeholder_ids(digest, positions, self.lm.vocab_size), *ids]
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": row.limit - (0 if is_warm else len(row.begun)),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            "seed": sample_seed(row),
            "logit_bias": {str(token): amount for token, amount in settings.logit_bias.items()} or None,
            "ignore_eos": True,  # where an answer ends is known here, also for prompts that learned another end
            "stop_token_ids": sorted(row.ending.ids),
            "stream": True,
            "return_token_ids": True,
            **({} if digest is None else _about(digest, positions)),
        }
        expected = list(row.begun) if is_warm else []
        async with aclosing(self._streamed(body)) as stream:
            async for token in stream:
                if expected:
                    if token != expected.pop(0):
                        raise EngineFailed("vLLM drew another answer than the one that had begun.")
                    continue
                yield token

    async def _streamed(self, body: dict[str, Any]) -> AsyncGenerator[int, None]:
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                _raise(answer.status_code, (await answer.aread()).decode(errors="replace"))
            is_over = False
            async for line in lines_of(answer):
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    break
                if not line.startswith("data: "):
                    continue
                record = json.loads(data)
                if "error" in record:
                    _raise(int(record["error"].get("code") or 500), str(record["error"].get("message")))
                for choice in record["choices"]:
                    for token in choice.get("token_ids") or ():
                        yield int(token)
                    is_over = is_over or choice.get("finish_reason") is not None
                    if choice.get("finish_reason") in ("error", "abort"):
                        raise EngineFailed("vLLM ended the answer with an error.")
            if not is_over:
                raise EngineFailed("vLLM's answer stopped before its end.")


def _about(digest: str, positions: int) -> dict[str, Any]:
    return {"cache_salt": digest, "kv_transfer_params": {PARAMETER: digest, POSITIONS: positions}}


def _raise(status: int, message: str) -> None:
    if 400 <= status < 500 and status not in (404, 408, 429):
        raise DataError(f"vLLM refuses the request: {message[:300]}")
    raise EngineFailed(f"vLLM answered {status}. Its log says more.")
