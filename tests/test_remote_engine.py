"""vLLM behind our server: a double of its HTTP API that computes with our own model and the exported files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine_processes import Front
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State
from softprompt.errors import RecipeError
from softprompt.export.kv_file import file_of, placeholder_ids, read_kv
from softprompt.export.states import save_kv
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.request import GREEDY, request
from softprompt.inference.running_batch import Running
from softprompt.inference.settings import DecodeSettings
from softprompt.scale.event_lines import lines_of
from softprompt.scale.server import GatewayServer, addresses, make_gateway
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.settings import ServeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_begun import deep_of
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a", "The quick brown fox", "Tweet: my order never came"]


class VllmDouble:
    """What a vLLM server with our connector does, for the requests that the gateway makes of it. `dies_after` tokens it cuts
    a stream; without `has_connector` it ignores the parameters, as stock vLLM does."""

    def __init__(self, lm: FrozenLM, states: Path) -> None:
        self.lm, self.states = lm, states
        self.has_connector = True
        self.dies_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()

        @self.app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": "base", "max_model_len": 128}]}

        @self.app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            params = body.get("kv_transfer_params")
            if self.has_connector and params and not file_of(states, params["softprompt"]).exists():
                return JSONResponse({"error": {"message": "internal", "code": 500}}, 500)
            if not body.get("stream"):
                return JSONResponse({"choices": [{"text": "x"}]})
            self.bodies.append(body)
            return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        for number, token in enumerate(self.tokens(body)):
            if number == self.dies_after:
                raise RuntimeError("dies")
            is_last = token in body["stop_token_ids"] or number + 1 == body["max_tokens"]
            choice = {
                "index": 0,
                "text": "?\u2028\x85\x0c",  # as the real one does; clients that take these for line ends see half an event
                "token_ids": [token],
                "finish_reason": "stop" if is_last else None,
            }
            yield f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()
            await asyncio.sleep(0)
            if is_last:
                break
        yield b"data: [DONE]\n\n"

    def tokens(self, body: dict[str, Any]) -> Iterator[int]:
        """Greedy or seeded tokens after the prompt's ids, of which the first positions come from a file."""
        ids, params = body["prompt"], body.get("kv_transfer_params")
        compiled = compile_prompt(self.lm, None)
        if params is not None and self.has_connector:
            header, keys, values = read_kv(file_of(self.states, params["softprompt"]))
            count = params["softprompt_positions"]
            assert body["cache_salt"] == header.digest
            assert ids[:count] == placeholder_ids(header.digest, count, self.lm.vocab_size)
            heads = [tuple(layer.transpose(0, 1) for layer in tensor) for tensor in (keys, values)]
            marks = tuple(ids[:count])
            from dataclasses import replace

            compiled = replace(compiled, state=State(*heads, (*marks, *header.marks[count:])).first(count))
        row = request(
            self.lm,
            compiled,
            ids,
            GREEDY.model_copy(
                update={
                    "max_new_tokens": body["max_tokens"],
                    "ignore_end": True,
                    "temperature": body["temperature"],
                    "seed": body["seed"],
                }
            ),
        )
        batch = Running(self.lm)
        done = batch.admit([row])
        sent = 0
        while True:
            yield from row.token_ids[sent:]
            sent = len(row.token_ids)
            if done:
                return
            done = batch.step()


class Listening:
    """An application on loopback, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        import threading
        import time

        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


class House:
    """A base, a library with a soft and a deep prompt, their files, and two doubles of vLLM."""

    def __init__(self, folder: Path) -> None:
        tiny_model("Llama").save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        self.folder = folder
        self.lm = FrozenLM.load(str(folder / "base"), dtype="float32")
        self.prompts: dict[str, Any] = {
            "base": None,
            "soft": prompt_of(self.lm, 1, "soft", "Be brief. {soft:4}{text} Answer:"),
            "deep": deep_of(self.lm),
        }
        for name in ("soft", "deep"):
            save_prompt(self.prompts[name], folder / "runs" / name)
            Library(folder / "library").publish(folder / "runs" / name, name)
            save_kv(self.lm, self.prompts[name], folder / "states")
        self.doubles = [VllmDouble(self.lm, folder / "states") for _ in range(2)]
        self.listening = [Listening(double.app) for double in self.doubles]

    def gateway(self, **settings: Any) -> GatewayServer:
        serve = ServeSettings(
            base=str(self.folder / "base"), library=str(self.folder / "library"), dtype="float32"
        )
        engines = tuple(f"vllm={listening.url}" for listening in self.listening)
        front = GatewaySettings(
            engine=engines, states=str(self.folder / "states"), **{"patience_seconds": 3.0, **settings}
        )
        return make_gateway(serve, front)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("vllm"))
    yield house
    for listening in house.listening:
        listening.close()


@pytest.fixture
def front(house: House) -> Iterator[Front]:
    for double in house.doubles:
        double.has_connector, double.dies_after = True, None
        double.bodies.clear()
    front = Front.of(house.gateway().gateway)
    yield front
    front.close()


def post(front: Front, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(front.url + path, json=body, timeout=60)


def streamed(front: Front, **body: Any) -> str:
    answer = post(front, stream=True, **body)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_every_prompt_gives_through_vllm_what_generation_alone_gives(house: House, front: Front) -> None:
    names = [each["id"] for each in httpx.get(front.url + "/v1/models").json()["data"]]
    assert names == ["base", "deep@1", "deep", "soft@1", "soft"]
    for name, prompt in house.prompts.items():
        answer = post(front, model=name, prompt=TEXTS, max_tokens=12, temperature=0)
        wanted = generate(house.lm, TEXTS, prompt, DecodeSettings(max_new_tokens=12))
        assert [choice["text"] for choice in answer.json()["choices"]] == [row.text for row in wanted]
        assert answer.headers["x-softprompt-digest"] == (
            front.gateway.find(name).digest if name != "base" else "base"  # type: ignore[union-attr]
        )
        usage = answer.json()["usage"]
        assert usage["softprompt_virtual_tokens"] == (0 if prompt is None else 4 * len(TEXTS))


def test_stop_texts_samples_and_chats_work_as_at_our_own_engine(house: House, front: Front) -> None:
    (whole,) = generate(house.lm, [TEXTS[1]], house.prompts["soft"], DecodeSettings(max_new_tokens=14))
    stop = whole.text[3:6]
    answer = post(front, model="soft", prompt=TEXTS[1], max_tokens=14, temperature=0, stop=stop).json()
    assert answer["choices"][0]["text"] == whole.text[: whole.text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    seeded: dict[str, Any] = {"model": "soft", "prompt": "a", "max_tokens": 8, "temperature": 1.0, "seed": 4}
    several = [post(front, **seeded, n=2).json()["choices"] for _ in range(2)]
    assert [each["text"] for each in several[0]] == [each["text"] for each in several[1]]
    assert several[0][0]["text"] != several[0][1]["text"]
    turns = [{"role": "user", "content": TEXTS[1]}]
    chat = post(front, "/v1/chat/completions", model="soft", messages=turns, max_tokens=14, temperature=0)
    assert chat.json()["choices"][0]["message"]["content"] == whole.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_goes_on_at_another_vllm(house: House, front: Front, temperature: float) -> None:
    body = {"model": "deep", "prompt": TEXTS[2], "max_tokens": 30, "temperature": temperature, "seed": 9}
    body["ignore_eos"] = True
    wanted = post(front, **body).json()["choices"][0]["text"]
    for double in house.doubles:
        double.bodies.clear()
    house.doubles[0].dies_after = 12
    assert streamed(front, **body) == wanted
    (first,), (second,) = (double.bodies for double in house.doubles)
    read = len(second["prompt"]) - len(first["prompt"])
    # A greedy answer is read with the text; one that was drawn is drawn again, since vLLM's draws cannot be skipped.
    assert read == (11 if temperature == 0 else 0)


@pytest.mark.parametrize(
    "more",
    [
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"logprobs": 2},
        {"choice": ["a", "b"]},
        {"repetition_penalty": 1.5},
    ],
)
def test_what_vllm_would_do_wrong_is_refused_before_it_is_asked(
    house: House, front: Front, more: dict[str, Any]
) -> None:
    answer = post(front, **{"model": "soft", "prompt": "a", "max_tokens": 4, **more})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported")
    assert not any(double.bodies for double in house.doubles)


def test_a_vllm_without_the_connector_is_not_used(house: House) -> None:
    """It would read placeholders as if they were text, and answer."""
    for double in house.doubles:
        double.has_connector = False
    front = Front.of(house.gateway(patience_seconds=0.2).gateway)
    assert httpx.get(front.url + "/ready").status_code == 503
    assert post(front, model="soft", prompt="a").status_code == 503
    front.close()


def test_a_prompt_is_served_as_soon_as_its_file_is_there(house: House, front: Front) -> None:
    late = prompt_of(house.lm, 5, "late")
    save_prompt(late, house.folder / "runs" / "late")
    Library(house.folder / "library").publish(house.folder / "runs" / "late", "late")
    asyncio.run(asyncio.sleep(2.5))
    assert post(front, model="late", prompt="a", max_tokens=2).status_code == 404
    save_kv(house.lm, late, house.folder / "states")
    for _ in range(200):
        answer = post(front, model="late", prompt=TEXTS[1], max_tokens=9, temperature=0)
        if answer.status_code == 200:
            break
        asyncio.run(asyncio.sleep(0.1))
    (wanted,) = generate(house.lm, [TEXTS[1]], late, DecodeSettings(max_new_tokens=9))
    assert answer.json()["choices"][0]["text"] == wanted.text


def test_addresses_tell_the_kind_of_engine() -> None:
    assert addresses(["http://a:1, vllm=http://b:2/", "http://c"]) == [
        ("softprompt", "http://a:1"),
        ("vllm", "http://b:2"),
        ("softprompt", "http://c"),
    ]
    for wrong in ("other=http://a:1", "vllm=a:1", "http://a:1/v1"):
        with pytest.raises(RecipeError, match="wanted http"):
            addresses([wrong])


def test_lines_end_at_newlines_alone_wherever_the_stream_is_cut() -> None:
    text = 'data: {"text": "a\u2028b\x85c\x0cd é"}\r\n\ndata: [DONE]'
    content = text.encode()

    async def read(size: int) -> list[str]:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), size):
                yield content[start : start + size]

        response = httpx.Response(200, content=pieces())
        return [line async for line in lines_of(response)]

    for size in (1, 3, 1000):
        assert asyncio.run(read(size)) == ['data: {"text": "a\u2028b\x85c\x0cd é"}', "", "data: [DONE]"]
