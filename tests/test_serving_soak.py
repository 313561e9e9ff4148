"""Some 300 requests of every kind at once, while clients vanish, names are switched, keys taken out and the queue is full."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest

from soak import Question, soak
from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.keys import Keys, sha256_of
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_serving import Serving, prompt_of
from tiny_models import tiny_model, tiny_tokenizer

REQUESTS = 300
# A client that vanishes leaves its socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_every_request_gets_its_own_answer_or_an_error_and_memory_stays_flat(tmp_path: Path) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")
    library = Library(tmp_path / "library")
    versions = [prompt_of(lm, seed, "task") for seed in range(3)]
    for prompt in versions:
        save_prompt(prompt, tmp_path / "task")
        library.publish(tmp_path / "task", "task")
    names = [None, *versions]
    keys_file = tmp_path / "keys.yaml"
    entries = [{"name": name, "sha256": sha256_of(name), "rows": 64} for name in ("stays", "goes")]
    keys_file.write_text(json.dumps(entries), encoding="utf-8")
    keys = Keys.load(keys_file)
    rng = random.Random(0)
    solo: dict[tuple[Any, ...], list[str]] = {}

    def answers_alone(version: int, text: str, settings: DecodeSettings) -> list[str]:
        key = (version, text, settings)
        if key not in solo:
            solo[key] = [one.text for one in generate(lm, [text], names[version], settings)]
        return solo[key]

    counted = {"left": 0, "busy": 0, "refused": 0}
    answered: list[tuple[int, Question, list[str]]] = []

    async def vanish(client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            async for _ in stream.aiter_lines():
                pass

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(rng.random() * 3)
        question = Question.drawn(rng, number, ["base", "task", "task", "task@1", "task@2", "task@3"])
        body = question.body
        headers = {"authorization": f"Bearer {rng.choice(['stays', 'stays', 'goes'])}"}
        if rng.random() < 0.25:  # a client that vanishes, at any moment
            long = {**body, "max_tokens": 100, "ignore_eos": True, "stream": True}
            # By anyio: a task that asyncio cancels while httpx closes old connections leaves some of them open.
            with anyio.move_on_after(rng.random() * 0.05):
                await vanish(client, long, headers)
            counted["left"] += 1
            return
        if rng.random() < 0.5:
            answer = await client.post("/v1/completions", json=body, headers=headers)
            if answer.status_code == 200:
                texts = [choice["text"] for choice in answer.json()["choices"]]
        else:
            async with client.stream(
                "POST", "/v1/completions", json={**body, "stream": True}, headers=headers
            ) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            if answer.status_code == 200:
                assert lines[-1] == "data: [DONE]"
                texts = question.texts(lines)
        if answer.status_code == 429:
            counted["busy"] += 1
            return
        if answer.status_code == 401:
            assert headers["authorization"] == "Bearer goes"
            counted["refused"] += 1
            return
        assert answer.status_code == 200, answer.status_code
        digests = ["base", *(entry.digest for entry in library.entries())]
        version = digests.index(answer.headers["x-softprompt-digest"])
        fixed = ("base", "task@1", "task@2", "task@3")
        assert question.model == "task" or version == fixed.index(question.model)
        answered.append((version, question, texts))

    async def change(catalogue: Catalogue) -> None:
        for turn in range(12):
            await asyncio.sleep(0.2)
            library.switch(f"task@{1 + turn % 3}")
            await asyncio.to_thread(catalogue.refresh)

    async def take_a_key_out() -> None:
        """When a third of the requests are over, however fast the machine is."""
        while sum(counted.values()) + len(answered) < REQUESTS / 3:
            await asyncio.sleep(0.01)
        keys_file.write_text(json.dumps(entries[:1]), encoding="utf-8")
        keys.refresh()

    async def everything(url: str, catalogue: Catalogue) -> None:
        limits = httpx.Limits(max_connections=REQUESTS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await asyncio.gather(
                change(catalogue), take_a_key_out(), *(ask(client, number) for number in range(REQUESTS))
            )

    with LocalEngine(lm, max_rows=8, max_waiting=12, read_beside=16) as engine:
        catalogue = Catalogue(engine, library)
        server = Serving(engine, catalogue, keys)
        asyncio.run(everything(server.url, catalogue))
        for _ in range(500):
            if not engine.health()["running"] and not engine.health()["waiting"]:
                break
            asyncio.run(asyncio.sleep(0.01))
        assert engine.health() == {"alive": 1, "running": 0, "waiting": 0, "kv_bytes": 0}
        assert engine.is_idle
        server.close()
    assert sum(counted.values()) + len(answered) == REQUESTS
    # Whether the queue was ever full depends on the machine's speed; a test of its own fills one.
    assert counted["left"], counted
    assert counted["refused"], counted
    assert len(answered) > 10  # on a slow machine most find the queue full
    for version, question, texts in answered:
        assert texts == answers_alone(version, question.text, question.settings), (version, question)


def test_a_server_that_is_killed_loses_no_request_without_an_error(tmp_path: Path) -> None:
    """Some of `python tests/soak.py`: a server in a process of its own, killed with kill -9 and started again."""
    result = soak(tmp_path, requests=120, kills=1)
    assert (result.wrong, result.lost) == ([], [])
    assert result.counted["kills"] == 1
    assert result.counted["answered"] > 10
    assert result.counted["vanished"] > 10


@pytest.mark.timeout(900)  # three processes start, and one starts again
def test_one_of_two_engines_killed_behind_a_gateway_loses_nothing(tmp_path: Path) -> None:
    """Some of `python tests/soak.py --engines 2`: whole answers and streams of the killed engine come from the other one."""
    result = soak(tmp_path, requests=100, kills=1, engines=2)
    assert (result.wrong, result.lost) == ([], [])
    assert result.counted["kills"] == 1
    assert result.counted["cut off with an error by a kill"] == 0
    assert result.counted["answered"] > 15
    assert result.counted["vanished"] > 10
