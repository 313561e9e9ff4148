"""A gateway before two servers in processes of their own: a killed engine loses nothing and changes no answer."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from engine_processes import Front, Process, free_port
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.scale.followed import FollowedChoices
from softprompt.scale.gateway import Asked, Gateway
from softprompt.scale.peer import Peer
from softprompt.scale.server import make_gateway
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.keys import Keys, sha256_of
from softprompt.serving.settings import ServeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_begun import deep_of
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

REQUESTS = 50
TEXTS = ["a", "The quick brown fox", "Tweet: my order never came", "I want you to act as a logistician."]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a library of prompts for it: soft (two versions) and deep."""
    folder = tmp_path_factory.mktemp("house")
    tiny_model("Llama", max_position_embeddings=512).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    lm = base_of(folder)
    for prompt in prompts_of(lm).values():
        save_prompt(prompt, folder / "runs" / prompt.name)
        Library(folder / "library").publish(folder / "runs" / prompt.name, prompt.name)
    save_prompt(prompt_of(lm, 8, "soft"), folder / "runs" / "soft")
    Library(folder / "library").publish(folder / "runs" / "soft", "soft", current=False)
    return folder


def base_of(house: Path) -> FrozenLM:
    return FrozenLM.load(str(house / "base"), dtype="float32")


def prompts_of(lm: FrozenLM) -> dict[str, Any]:
    return {"soft": prompt_of(lm, 1, "soft"), "deep": deep_of(lm)}


def started(house: Path, name: str, port: int | None = None) -> Process:
    arguments = ["serve", "--base", str(house / "base"), "--dtype", "float32"]
    return Process([*arguments, "--library", str(house / "library")], house / f"{name}.log", port)


@pytest.fixture(scope="module")
def engines(house: Path) -> Iterator[list[Process]]:
    running: list[Process] = []
    yield running
    for engine in running:
        engine.kill()


@pytest.fixture
def two(house: Path, engines: list[Process]) -> list[Process]:
    """Two servers that work; those that a test before killed are replaced."""
    engines[:] = [engine for engine in engines if engine.process.poll() is None]
    engines += [started(house, f"engine-{number}") for number in range(len(engines), 2)]
    for engine in engines:
        engine.wait_ready()
    return list(engines)


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[int, str]:
    """The texts of a stream's choices; AssertionError for an error among its events."""
    texts: dict[int, str] = {}
    ended: set[int] = set()
    is_done = False
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            assert not (line and is_done)
            is_done = is_done or line == "data: [DONE]"
            if not line or is_done:
                continue
            record = json.loads(line[6:])
            assert "error" not in record, record
            for choice in record["choices"]:
                words = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                assert choice["index"] not in ended  # nothing comes after its end
                texts[choice["index"]] = texts.get(choice["index"], "") + words
                if choice["finish_reason"] is not None:
                    ended.add(choice["index"])
    assert is_done
    assert ended == set(texts)
    return texts


def test_names_are_resolved_before_anything_is_asked_and_errors_are_openais(
    house: Path, two: list[Process], tmp_path: Path
) -> None:
    key_file = tmp_path / "keys.yaml"
    key_file.write_text(
        json.dumps(
            [
                {"name": "all", "sha256": sha256_of("all"), "admin": True, "rows": 3},
                {"name": "some", "sha256": sha256_of("some"), "models": ["deep"]},
            ]
        )
    )
    front = Front([two[0].url, two[1].url], Keys.load(key_file), patience_seconds=0.5)

    def post(path: str, key: str = "all", **body: Any) -> httpx.Response:
        return httpx.post(front.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def listed(key: str) -> list[str]:
        headers = {"authorization": f"Bearer {key}"}
        return [each["id"] for each in httpx.get(front.url + "/v1/models", headers=headers).json()["data"]]

    assert listed("all") == ["base", "deep@1", "deep", "soft@1", "soft", "soft@2"]
    assert listed("some") == ["deep@1", "deep"]
    unknown = post("/v1/completions", model="sofd", prompt="a")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert post("/v1/completions", "some", model="soft", prompt="a").status_code == 404
    assert post("/v1/completions", "nobody", model="soft", prompt="a").status_code == 401
    crowd = post("/v1/completions", model="soft", prompt=["a", "b"], n=2, temperature=1.0, max_tokens=1)
    assert crowd.status_code == 200  # of four choices three run at once
    refused = post("/v1/completions", model="soft", prompt="a", temperature=9)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert post("/v1/completions", model=3).json()["error"]["type"] == "invalid_request_error"
    bare = httpx.post(front.url + "/v1/completions", content=b"[", headers={"authorization": "Bearer all"})
    assert (bare.status_code, bare.json()["error"]["message"]) == (400, "body: wanted JSON.")
    assert httpx.get(front.url + "/nothing").json()["error"]["code"] == "404"
    scored = post("/v1/softprompt/score", input="a", continuations=["b"], models=["soft", "base"]).json()
    assert [each["model"] for each in scored["data"]] == ["soft", "base"]
    assert post("/tokenize", prompt="a fox").json()["count"] > 0
    columns = [{"model": "soft", "prompt": "a"}, {"model": "base", "prompt": "a"}]
    compared = post("/v1/softprompt/compare", columns=columns, max_tokens=3)
    assert compared.text.rstrip().endswith("data: [DONE]")
    assert "error" not in compared.text
    front.close()


def test_without_an_engine_the_answer_is_503(house: Path) -> None:
    front = Front([f"http://127.0.0.1:{free_port()}"], patience_seconds=0.2)
    gone = httpx.post(front.url + "/v1/completions", json={"model": "soft", "prompt": "a"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "no_engine")
    assert gone.headers["retry-after"] == "1"
    assert httpx.get(front.url + "/ready").status_code == 503
    front.close()


def test_the_command_is_a_gateway_that_ends_in_order(house: Path, two: list[Process]) -> None:
    front = Process(["serve", "--engine", ",".join(engine.url for engine in two)], house / "front.log")
    front.wait_ready()
    answer = httpx.post(
        f"{front.url}/v1/completions", json={"model": "soft", "prompt": "a", "max_tokens": 2}, timeout=60
    )
    assert answer.status_code == 200
    assert front.end() == 0


def test_an_engine_that_hangs_is_given_up_and_used_again_when_it_answers(
    house: Path, two: list[Process]
) -> None:
    """A stopped process (SIGSTOP) keeps its connections open and sends nothing more."""
    front = Front([engine.url for engine in two], lost_after_seconds=1.0, patience_seconds=200.0)
    body = {"model": "deep", "prompt": TEXTS[2], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    settings = DecodeSettings(max_new_tokens=200, ignore_end=True)
    lm = base_of(house)
    (wanted,) = generate(lm, [TEXTS[2]], prompts_of(lm)["deep"], settings)

    async def hang() -> list[dict[int, str]]:
        async with httpx.AsyncClient(base_url=front.url, timeout=250) as client:
            streams = [asyncio.create_task(streamed(client, "/v1/completions", body)) for _ in range(4)]
            while front.gateway.peers[0].running < 2:
                await asyncio.sleep(0.01)
            two[0].process.send_signal(signal.SIGSTOP)
            return list(await asyncio.gather(*streams))

    assert asyncio.run(hang()) == [{0: wanted.text}] * 4
    assert not front.gateway.peers[0].is_ready
    two[0].process.send_signal(signal.SIGCONT)
    for _ in range(1000):
        if front.gateway.peers[0].is_ready:
            break
        time.sleep(0.05)
    assert front.gateway.peers[0].is_ready
    front.close()


def test_an_engine_killed_under_load_loses_no_request_and_changes_no_answer(
    house: Path, two: list[Process]
) -> None:
    lm = base_of(house)
    prompts: dict[str, Any] = {"base": None, **prompts_of(lm)}
    front = Front([engine.url for engine in two])
    rng = random.Random(0)
    answered: list[tuple[str, str, DecodeSettings, list[str]]] = []
    killed = asyncio.Event()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(rng.random())
        warm = number % 2 == 0
        settings = DecodeSettings(
            max_new_tokens=rng.choice([1, 40, 150]),
            temperature=1.0 if warm else 0.0,
            seed=number,
            n=rng.choice([1, 2]) if warm else 1,
            ignore_end=True,
            repetition_penalty=rng.choice([1.0, 1.3]),
        )
        model, text = rng.choice(list(prompts)), rng.choice(TEXTS)
        body: dict[str, Any] = {
            "model": model,
            "prompt": text,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "n": settings.n,
            "ignore_eos": True,
            "repetition_penalty": settings.repetition_penalty,
        }
        if number % 3:
            texts = await streamed(client, "/v1/completions", body)
            answered.append((model, text, settings, [texts.get(index, "") for index in range(settings.n)]))
            return
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        answered.append((model, text, settings, [choice["text"] for choice in answer.json()["choices"]]))

    async def kill() -> None:
        while front.gateway.peers[0].running < 5 or len(answered) < 5:
            await asyncio.sleep(0.01)
        two[0].kill()
        killed.set()

    async def everything() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=front.url, timeout=200, limits=limits) as client:
            await asyncio.gather(kill(), *(ask(client, number) for number in range(REQUESTS)))

    asyncio.run(everything())
    assert killed.is_set()
    assert len(answered) == REQUESTS
    assert front.count("retries", reason="broken") >= 5
    assert front.count("resumed_streams") >= 1
    assert front.count("cut_streams") == 0
    for model, text, settings, texts in answered:
        wanted = [row.text for row in generate(lm, [text], prompts[model], settings)]
        assert texts == wanted, (model, text, settings)
    front.close()


def test_streams_of_every_shape_go_on_at_the_other_engine(house: Path, two: list[Process]) -> None:
    """The engine with the streams is killed after some of each; the openai client sees one whole answer."""
    front = Front([two[0].url])
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
    common: dict[str, Any] = {"model": "soft@1", "temperature": 0.8, "seed": 5}
    more = {"ignore_eos": True}
    chat: dict[str, Any] = {**common, "messages": [{"role": "user", "content": TEXTS[1]}], "max_tokens": 400}
    plain: dict[str, Any] = {**common, "prompt": TEXTS[:2], "max_tokens": 300, "n": 2}

    whole_chat = client.chat.completions.create(**chat, extra_body=more, logprobs=True)
    whole_plain = client.completions.create(**plain, extra_body=more)
    answer: dict[str, Any] = {"model": "soft@1", "input": TEXTS[1], "store": False, "max_output_tokens": 400}
    whole_response = client.responses.create(**answer, temperature=0.8, extra_body={**more, "seed": 5})

    streams = [
        client.chat.completions.create(**chat, extra_body=more, stream=True, logprobs=True),
        client.chat.completions.create(**chat, extra_body=more, stream=True),
        client.completions.create(
            **plain, extra_body=more, stream=True, stream_options={"include_usage": True}
        ),
        client.responses.create(**answer, temperature=0.8, extra_body={**more, "seed": 5}, stream=True),
    ]
    heads = [[next(stream) for _ in range(6)] for stream in streams]
    front.gateway.peers.append(type(front.gateway.peers[0])(two[1].url))
    two[0].kill()
    rated, chatted, completed, responded = (
        [*head, *stream] for head, stream in zip(heads, streams, strict=True)
    )
    for chunks in (rated, chatted):
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
            whole_chat.choices[0].message.content
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == [
            "assistant"
        ]
        assert {chunk.model for chunk in chunks} == {"soft@1"}
    (last,) = [chunk for chunk in rated if chunk.choices[0].logprobs]
    assert last.choices[0].logprobs.content is not None
    assert len(last.choices[0].logprobs.content) == len(whole_chat.choices[0].logprobs.content)
    texts = ["" for _ in whole_plain.choices]
    for chunk in completed:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert not hasattr(choice, "token_ids")  # that nobody asked for
    assert texts == [choice.text for choice in whole_plain.choices]
    assert completed[-1].usage.completion_tokens == whole_plain.usage.completion_tokens
    assert completed[-1].usage.prompt_tokens == whole_plain.usage.prompt_tokens
    assert [event.sequence_number for event in responded] == list(range(len(responded)))
    assert responded[-1].response.output_text == whole_response.output_text
    assert len({event.item_id for event in responded if hasattr(event, "item_id")}) == 1
    assert front.count("resumed_streams") == 4
    client.close()
    front.close()


def test_what_serve_refuses_of_a_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--engine", "localhost:1"], "wanted http://HOST:PORT"),
        (["--engine", "http://a:1,http://a:1"], "is given twice"),
        (["--engine", "http://a:1", "--base", "builtin"], "the engines hold base and prompts"),
        (["--engine", "http://a:1", "--host", "0.0.0.0"], "--keys"),
    ):
        assert main(["serve", *arguments]) == 2
        assert words in capsys.readouterr().err


def event(text: str, token: int, end: str | None = None) -> str:
    choice = {"index": 0, "text": text, "token_ids": [token] if text else [], "finish_reason": end}
    record = {"id": "cmpl-1", "created": 1, "model": "base", "choices": [choice]}
    return f"data: {json.dumps(record)}\n\n"


def engine_that(*answers: tuple[int, str]) -> Peer:
    """An engine of one base that gives one answer after the other: a status, and events or nothing."""
    coming = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(200)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base", "root": "one base"}]})
        status, events = next(coming)
        if status == 200:
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=events)
        return httpx.Response(status, json={"error": {"message": "full", "type": "x", "code": "queue_full"}})

    return Peer("http://engine", transport=httpx.MockTransport(answer))


def answered_by(*peers: Peer, patience: float = 20.0) -> str:
    """What a client gets of a stream, all events after each other."""
    asked = Asked("/v1/completions", {"model": "base", "prompt": "a", "stream": True}, {})

    async def ask() -> str:
        gateway = Gateway(peers, GatewaySettings(engine=("http://x",), patience_seconds=patience))
        await gateway.look()
        followed = FollowedChoices("base", 1, tells_ids=False, rated=False)
        parts = [part async for part in gateway.streamed(asked, followed)]
        return "".join(part.decode() for part in parts if isinstance(part, bytes)) or str(parts)

    return asyncio.run(ask())


def test_a_stream_that_has_begun_waits_out_the_full_queue_of_the_engine_that_is_left() -> None:
    """Its client cannot ask again, unlike one that has nothing yet, who gets the 429."""
    begun, rest = event("one ", 1) + event("two ", 2), event("three", 3) + event("", 0, "stop")
    dies = engine_that((200, begun), *[(503, "")] * 100)
    # The second engine reads the tokens that there are, but the last one, and gives the answer's text from its start.
    full = engine_that(*[(429, "")] * 3, (200, begun + rest + "data: [DONE]\n\n"))
    text = answered_by(dies, full)
    assert [json.loads(line[6:])["choices"][0]["text"] for line in text.split("\n\n")[:3]] == [
        "one ",
        "two ",
        "three",
    ]
    assert text.endswith("data: [DONE]\n\n")
    assert "error" not in text
    assert "status=429" in answered_by(engine_that(*[(429, "")] * 100))


def test_a_request_that_comes_while_no_engine_is_ready_waits_for_one() -> None:
    """Its name is looked up when one is there: before, nobody knows what it means."""
    looks = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        if request.url.path == "/ready":
            looks += 1
            return httpx.Response(200 if looks > 8 else 503)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base", "root": "one base"}]})
        return httpx.Response(200, json={"model": "base", "choices": []})

    peer = Peer("http://engine", transport=httpx.MockTransport(answer))
    front = Front.of(Gateway([peer], GatewaySettings(engine=("http://x",), patience_seconds=60)))

    def ask(model: str) -> httpx.Response:
        return httpx.post(front.url + "/v1/completions", json={"model": model, "prompt": "a"}, timeout=60)

    assert not peer.is_ready
    with ThreadPoolExecutor() as clients:
        known, unknown = clients.submit(ask, "base"), clients.submit(ask, "other")
        listed = clients.submit(httpx.get, front.url + "/v1/models", timeout=60)
        assert known.result().status_code == 200
        assert unknown.result().json()["error"]["code"] == "model_not_found"
        assert [model["id"] for model in listed.result().json()["data"]] == ["base"]
    front.close()


def test_a_gateway_that_ends_waits_for_a_request_that_is_with_no_engine() -> None:
    """Its engine has died, and it is about to be put to another one."""
    front = GatewaySettings(engine=(f"http://127.0.0.1:{free_port()}",))
    server = make_gateway(ServeSettings(grace_seconds=60), front)
    lease = server.app.state.rows.take("anyone", 1)
    with ThreadPoolExecutor() as threads:
        ending = threads.submit(server.drain)
        with pytest.raises(TimeoutError):
            ending.result(0.3)
        lease.end()
        ending.result(60)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    front = Front.of(Gateway([engine_that()], GatewaySettings(engine=("http://x",))))
    where = urlsplit(front.url)
    with socket.create_connection((where.hostname or "", where.port or 0)) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    for _ in range(3000):
        if front.count("request_rejected", reason="client_gone"):
            break
        time.sleep(0.02)
    assert front.count("request_rejected", reason="client_gone") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    front.close()
