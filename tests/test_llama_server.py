"""llama-server's slot files, by hand and through a real server where there is one, and what the gateway checks of it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine_processes import Front, free_port
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.errors import DamagedPrompt, PromptError, WrongBase
from softprompt.export.kv_file import (
    placeholder_ids,
    read_slot_header,
    slot_header_of,
    slot_of,
    write_slot_header,
)
from softprompt.export.llama_slot import flat, is_paired, read_pattern
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.scale.server import make_gateway
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.settings import ServeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library, digest_of
from test_begun import deep_of
from test_gguf_base import write
from test_remote_engine import Listening
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a", "The quick brown fox", "Tweet: my order never came", "nobody answers!"]


def slot_file(keys: list[torch.Tensor], values: list[torch.Tensor], *, transposed: bool, half: bool) -> bytes:
    """A file as llama.cpp's llama_kv_cache::state_write lays it out, for layers [P, N] of one sequence."""
    kind, dtype = (1, torch.float16) if half else (0, torch.float32)
    positions, width = keys[0].shape
    size = 2 if half else 4
    parts = [struct.pack("<IIII", 0x67677371, 2, 2, 5), struct.pack("<I", 6)]
    parts += [struct.pack("<II", 2, 0), struct.pack("<I", positions)]  # an empty stream, and ours
    parts += [struct.pack("<III", position, 1, 0) for position in range(positions)]
    parts.append(struct.pack("<II", int(transposed), len(keys)))
    for layer in keys:
        parts += [struct.pack("<IQ", kind, width * size), layer.to(dtype).numpy().tobytes()]
    for layer in values:
        if transposed:
            parts += [
                struct.pack("<III", kind, size, width),
                layer.T.contiguous().to(dtype).numpy().tobytes(),
            ]
        else:
            parts += [struct.pack("<IQ", kind, width * size), layer.to(dtype).numpy().tobytes()]
    return b"".join(parts)


def layers(seed: int, number: int = 2, positions: int = 3, width: int = 8) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(positions, width, generator=drawn).half().float() for _ in range(number)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_servers_file_is_filled_with_other_numbers_and_nothing_else_changes(
    transposed: bool, half: bool
) -> None:
    old, new = (layers(0), layers(1)), (layers(2), layers(3))
    pattern = read_pattern(slot_file(*old, transposed=transposed, half=half), 3)
    assert torch.equal(pattern.layer(pattern.keys[1]), old[0][1])
    assert torch.equal(pattern.layer(pattern.values[0], transposed=transposed), old[1][0])
    assert pattern.filled(*new) == slot_file(*new, transposed=transposed, half=half)


def test_a_file_of_another_kind_is_refused() -> None:
    good = slot_file(layers(0), layers(1), transposed=False, half=False)
    for content, positions, words in (
        (b"gguf" + good[4:], 3, "no slot file"),
        (good[:90], 3, "ends before|no keys"),
        (good[:-1], 3, "no keys"),
        (good, 4, "holds 3 positions"),
        (good.replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 8, 32)), 3, "type 8"),
    ):
        with pytest.raises(PromptError, match=words):
            read_pattern(content, positions)
    with pytest.raises(WrongBase, match="bytes a layer"):
        read_pattern(good, 3).filled(layers(0, width=6), layers(1, width=6))


def test_the_halves_of_a_head_are_interleaved_where_the_server_rotates_pairs() -> None:
    """By hand: a head of 4 numbers 0 1 2 3 has the halves 01 and 23, and so the pairs 0 2 and 1 3."""
    heads = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0, 7.0]]])  # two heads, one position
    assert flat(heads, paired=False).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert flat(heads, paired=True).tolist() == [[0, 2, 1, 3, 4, 6, 5, 7]]
    keys, values = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for paired in (False, True):
        content = slot_file(
            [flat(keys, paired=paired)] * 2, [flat(values, paired=False)] * 2, transposed=True, half=False
        )
        assert is_paired(read_pattern(content, 3), keys, values, "tiny") == paired
    with pytest.raises(WrongBase, match="computes other keys"):
        is_paired(read_pattern(content, 3), keys.flip(1), values, "tiny")
    with pytest.raises(WrongBase, match="computes other keys"):
        is_paired(read_pattern(content, 3), keys, values.flip(1), "tiny")
    with pytest.raises(WrongBase, match="is not that of"):
        is_paired(read_pattern(content, 3), keys[:1], values[:1], "tiny")


class LlamaDouble:
    """llama-server's slots: an answer says how much of the slot it used. It answers in any case, as the real one does."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.loses = 0  # restorings that are lost
        self.restores_slots = True
        self.asked: list[tuple[int, str | None]] = []
        self.app = FastAPI()

        @self.app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @self.app.get("/props")
        async def props() -> dict[str, int]:
            return {"total_slots": 2}

        @self.app.post("/slots/{slot}")
        async def restore(slot: int, request: Request) -> Response:
            if not self.restores_slots:
                return JSONResponse({"error": {"code": 501}}, 501)
            name = (await request.json())["filename"]
            if "nobody" in name:
                return JSONResponse({"error": {"code": 400}}, 400)
            if self.loses:
                self.loses -= 1
                self.held.pop(slot, None)
            else:
                self.held[slot] = name
            return JSONResponse({"n_restored": 4})

        @self.app.post("/completion")
        async def completion(request: Request) -> Response:
            body = await request.json()
            name = self.held.pop(body["id_slot"], None)
            self.asked.append((body["id_slot"], name))
            return StreamingResponse(events(body, name), media_type="text/event-stream")

        async def events(body: dict[str, Any], name: str | None) -> AsyncIterator[bytes]:
            used = 4 if name is not None else 0
            for number in range(body["n_predict"]):
                record = {
                    "tokens": [70 if name is None else 71],
                    "content": "?\u2028\x85",  # no line ends
                    "stop": number + 1 == body["n_predict"],
                    "timings": {"cache_n": used},
                }
                yield f"data: {json.dumps(record, ensure_ascii=False)}\n\n".encode()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("Llama", intermediate_size=64, tie_word_embeddings=False).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    lm = FrozenLM.load(str(folder / "base"), dtype="float32")
    for prompt in prompts_of(lm):
        save_prompt(prompt, folder / "runs" / prompt.name)
        Library(folder / "library").publish(folder / "runs" / prompt.name, prompt.name)
    return folder


def prompts_of(lm: FrozenLM) -> list[Any]:
    return [
        prompt_of(lm, 1, "soft"),
        prompt_of(lm, 2, "other", "Be brief. {soft:4}{text} Answer:"),
        deep_of(lm),
    ]


def gateway(house: Path, url: str, states: Path, **settings: Any) -> Front:
    serve = ServeSettings(base=str(house / "base"), library=str(house / "library"), dtype="float32")
    front = GatewaySettings(
        engine=(f"llama={url}",), states=str(states), **{"patience_seconds": 1.0, **settings}
    )
    return Front.of(make_gateway(serve, front).gateway)


def test_an_answer_that_did_not_use_the_slots_file_is_thrown_away(house: Path, tmp_path: Path) -> None:
    lm = FrozenLM.load(str(house / "base"), dtype="float32")
    prompt = prompts_of(lm)[0]
    digest = digest_of(prompt)
    about = {"name": "soft", "kind": "soft", "dtype": "float32", "base": "b", "base_sha256": "s"}
    header = {"digest": digest, "marks": [-1, -2, -3, -4], **about}
    write_slot_header(slot_header_of(tmp_path, digest), slot_of(tmp_path, digest), b"slot", header)
    double = LlamaDouble()
    listening = Listening(double.app)
    front = gateway(house, listening.url, tmp_path)

    def ask(**body: Any) -> httpx.Response:
        asked = {"model": "soft", "prompt": "a", "max_tokens": 2, "temperature": 0, **body}
        return httpx.post(front.url + "/v1/completions", json=asked, timeout=60)

    names = [each["id"] for each in httpx.get(front.url + "/v1/models").json()["data"]]
    assert names == ["base", "soft@1", "soft"]  # of three prompts in the library one has a slot file
    right, wrong = (lm.tokenizer.decode([token] * 2) for token in (71, 70))
    assert ask().json()["choices"][0]["text"] == right
    assert double.asked == [(0, f"{digest}.slot")]
    double.loses = 2
    assert ask().json()["choices"][0]["text"] == right  # the third time
    double.loses = 3
    failed = ask()
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
    assert wrong not in failed.text
    assert ask(ignore_eos=True).json()["error"]["code"] == "not_supported"
    double.asked.clear()
    assert ask(model="base").json()["choices"][0]["text"] == wrong  # without a prompt nothing is restored
    assert double.asked[0][1] is None
    front.close()
    double.restores_slots = False
    front = gateway(house, listening.url, tmp_path)
    assert httpx.get(front.url + "/ready").status_code == 503
    front.close()
    listening.close()
    slot_of(tmp_path, digest).write_bytes(b"other")
    with pytest.raises(DamagedPrompt, match="not what was written"):
        read_slot_header(slot_header_of(tmp_path, digest))


@pytest.mark.parametrize(
    "options",
    [
        ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--kv-unified"],
        ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-kv-unified"],
    ],
)
def test_a_real_llama_server_answers_as_generation_does(
    house: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Optional: SOFTPROMPT_LLAMA_SERVER names llama.cpp's llama-server."""
    program = os.environ.get("SOFTPROMPT_LLAMA_SERVER")
    if not program:
        pytest.skip("needs llama-server: SOFTPROMPT_LLAMA_SERVER=its path")
    lm = FrozenLM.load(str(house / "base"), dtype="float32")
    file = write(tmp_path / "tiny.gguf", lm.model)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    slots = tmp_path / "slots"
    slots.mkdir()
    arguments = [
        program,
        "-m",
        str(file),
        "-c",
        "512",
        "-np",
        "3",
        "--slot-save-path",
        str(slots),
        "-ngl",
        "0",
        "-t",
        "1",
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*arguments, *options, "--port", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        exported = ["export", *(str(house / "runs" / prompt.name) for prompt in prompts_of(lm))]
        exported += ["--to", "llama-slot", "--out", str(slots), "--server", url]
        assert main([*exported, "--base", str(house / "base"), "--dtype", "float32"]) == 0, (
            capsys.readouterr().err
        )
        front = gateway(house, url, slots)
        # A random model chooses bytes that are no characters, which the server answers with an error.
        halves = [token for token in range(lm.vocab_size) if "\ufffd" in lm.tokenizer.decode([token])]
        bias = dict.fromkeys(halves, -100.0)
        settings = DecodeSettings(max_new_tokens=12, logit_bias=bias)
        with httpx.Client(base_url=front.url, timeout=120) as client:
            for name, prompt in [("base", None), *((prompt.name, prompt) for prompt in prompts_of(lm))]:
                body: dict[str, Any] = {"model": name, "prompt": TEXTS, "max_tokens": 12, "temperature": 0}
                body["logit_bias"] = {str(token): amount for token, amount in bias.items()}
                answer = client.post("/v1/completions", json=body)
                wanted = generate(lm, TEXTS, prompt, settings)
                assert answer.status_code == 200, answer.text
                found = [choice["text"] for choice in answer.json()["choices"]]
                assert found == [row.text for row in wanted], name
        front.close()
    finally:
        server.kill()
        server.wait()


def test_placeholders_of_a_tiny_vocabulary_are_in_it() -> None:
    assert set(placeholder_ids("b" * 64, 200, 3)) == {0, 1, 2}
