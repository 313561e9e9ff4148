"""The server through the openai client and plain HTTP: answers are those of generation alone, errors are OpenAI's."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn

from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.sampling import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.app import build_app
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.engine import Finished, Overloaded, Work
from softprompt.serving.keys import Keys
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox", "Tweet: my order never came", "I want you", "a"]


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


def prompt_of(lm: FrozenLM, seed: int, name: str, template: str = "{soft:4}{text}") -> SoftPrompt:
    drawn = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(4, lm.width, generator=drawn), lm.fingerprint, template, name=name)


class Serving:
    """A server on loopback, in a thread of its own."""

    def __init__(self, engine: LocalEngine, catalogue: Catalogue, keys: Keys | None = None) -> None:
        config = uvicorn.Config(
            build_app(engine, catalogue, keys), host="127.0.0.1", port=0, log_level="error"
        )
        self.catalogue = catalogue
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        for _ in range(500):
            if self.server.started:
                break
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.clients: list[openai.OpenAI] = []

    def client(self, key: str = "none") -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def library(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("served")
    library = Library(folder / "library")
    for number, name in enumerate(("support", "greet")):
        save_prompt(prompt_of(lm, number, name), folder / name)
        library.publish(folder / name, name)
    return library


@pytest.fixture(scope="module")
def serving(lm: FrozenLM, library: Library) -> Iterator[Serving]:
    with LocalEngine(lm, max_rows=6) as engine:
        server = Serving(engine, Catalogue(engine, library))
        yield server
        server.close()


def alone(lm: FrozenLM, prompt: SoftPrompt | None, text: str, **settings: Any) -> str:
    return generate(lm, [text], prompt, DecodeSettings(**{"max_new_tokens": 12, **settings}))[0].text


def test_every_prompt_and_the_base_are_models_by_name(serving: Serving) -> None:
    names = [model.id for model in serving.client().models.list()]
    assert names == ["base", "greet@1", "greet", "support@1", "support"]
    found = serving.client().models.retrieve("support")
    assert (found.parent, found.root) == ("base", "tiny")  # type: ignore[attr-defined]
    assert found.softprompt["virtual_tokens"] == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["base", "support", "greet@1"])
def test_a_completion_is_what_generation_alone_gives(serving: Serving, lm: FrozenLM, model: str) -> None:
    prompt = {"base": None, "support": prompt_of(lm, 0, "support"), "greet@1": prompt_of(lm, 1, "greet")}[
        model
    ]
    answer = serving.client().completions.create(model=model, prompt=TEXTS, max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == [alone(lm, prompt, text) for text in TEXTS]
    ids = sum(len(lm.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == ids


def test_a_seeded_sample_is_the_same_alone_and_in_company(serving: Serving, lm: FrozenLM) -> None:
    answer = serving.client().completions.create(
        model="support", prompt=TEXTS[0], max_tokens=10, temperature=0.9, top_p=0.8, seed=5, n=3
    )
    wanted = generate(
        lm,
        [TEXTS[0]],
        prompt_of(lm, 0, "support"),
        DecodeSettings(max_new_tokens=10, temperature=0.9, top_p=0.8, seed=5, n=3),
    )
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]


def test_a_stream_adds_up_to_the_answer_and_ends_with_its_usage(serving: Serving, lm: FrozenLM) -> None:
    chunks = list(
        serving.client().completions.create(
            model="greet",
            prompt=TEXTS[1],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == alone(lm, prompt_of(lm, 1, "greet"), TEXTS[1])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")


def test_a_stop_text_is_cut_off(serving: Serving, lm: FrozenLM) -> None:
    whole = alone(lm, None, TEXTS[0])
    stop = whole[4:6]
    answer = serving.client().completions.create(
        model="base", prompt=TEXTS[0], max_tokens=12, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_transformers_own(serving: Serving, lm: FrozenLM) -> None:
    """With echo, as evaluation harnesses ask: the text's own tokens, each after those before it."""
    ids = lm.tokenizer(TEXTS[0])["input_ids"]
    answer = serving.client().completions.create(
        model="base", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None
    with torch.no_grad():
        theirs = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(theirs[place - 1, token]) for place, token in enumerate(ids) if place]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    # Harnesses drop the last value, which is that of the one new token.
    assert found.token_logprobs[1:] == pytest.approx([*wanted, float(theirs[-1].max())], abs=1e-4)
    assert answer.choices[0].text == lm.tokenizer.decode([*ids, int(theirs[-1].argmax())])
    read = serving.client().completions.create(model="base", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert read.choices[0].logprobs is not None
    assert read.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]
    assert read.choices[0].text == TEXTS[0]
    said = serving.client().completions.create(
        model="base", prompt=ids, max_tokens=3, temperature=0, logprobs=1
    )
    assert said.choices[0].logprobs is not None
    assert said.choices[0].logprobs.token_logprobs is not None
    assert said.choices[0].logprobs.token_logprobs[0] == pytest.approx(float(theirs[-1].max()), abs=1e-4)


def test_a_chat_gives_a_prompt_of_one_field_the_users_last_words(serving: Serving, lm: FrozenLM) -> None:
    answer = serving.client().chat.completions.create(
        model="support",
        messages=[
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "second"},
            {"role": "user", "content": TEXTS[2]},
        ],
        max_completion_tokens=12,
        temperature=0,
    )
    assert answer.choices[0].message.content == alone(lm, prompt_of(lm, 0, "support"), TEXTS[2])


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"model": "nobody", "prompt": "a"}, 404, "does not exist"),
        ("/v1/completions", {"model": "base", "prompt": "a", "temperature": 7}, 400, "temperature"),
        ("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/completions", {"model": "base", "prompt": [1, 10**9]}, 400, "ids from 0"),
        ("/v1/completions", {"model": "support", "prompt": [1, 2]}, 400, "Send text"),
        ("/v1/completions", {"model": "base", "prompt": "word " * 400}, 400, "positions"),
        ("/v1/completions", {"model": "base", "prompt": "a", "logit_bias": {"5000": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"model": "base", "prompt": []}, 400, "empty list"),
        ("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"model": "base", "prompt": "word " * 400, "echo": True}, 400, "positions"),
        ("/v1/completions", {"model": "base", "prompt": "a", "response_format": {"type": "xml"}}, 400, "json_schema"),
        ("/v1/completions", {"model": "base", "prompt": "a", "regex": "(a"}, 400, "constraint"),
        ("/v1/responses", {"model": "base", "input": "a", "previous_response_id": "x"}, 400, "stores no"),
        ("/v1/responses", {"model": "base", "input": "a", "store": True}, 400, "stores no"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]}, 400, "chat template"),
        ("/v1/chat/completions", {"model": "support", "messages": []}, 400, "messages"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/admin/prompts", {"name": "x", "path": "/nowhere"}, 403, "admin"),
    ],
)  # fmt: skip
def test_every_error_has_openais_shape(
    serving: Serving, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = httpx.post(serving.url + path, json=body, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_no_json_or_too_large_is_an_error_too(serving: Serving) -> None:
    broken = httpx.post(
        serving.url + "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400
    assert "error" in broken.json()
    large = httpx.post(serving.url + "/v1/completions", content=b" " * 5_000_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")


def test_unknown_fields_are_named(serving: Serving) -> None:
    answer = httpx.post(
        serving.url + "/v1/completions",
        json={"model": "base", "prompt": "a", "max_tokens": 2, "colour": "red"},
    )
    assert (answer.status_code, answer.headers["x-softprompt-ignored"]) == (200, "colour")
    assert answer.headers["x-softprompt-digest"] == "base"


def test_the_page_and_the_probes_answer(serving: Serving) -> None:
    page = httpx.get(serving.url + "/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert len(page.content) < 60_000
    assert "//" not in page.text.replace("http://", "").replace("https://", "").split("<script>")[0]
    assert httpx.get(serving.url + "/health").json()["status"] == "ok"
    assert httpx.get(serving.url + "/ready").status_code == 200
    assert "softprompt_generation_tokens_total" in httpx.get(serving.url + "/metrics").text


def test_the_description_of_the_api_names_the_errors_that_there_are(serving: Serving) -> None:
    described = httpx.get(serving.url + "/openapi.json").json()["paths"]
    answers = described["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401"} <= set(answers)
    assert not [
        path for path, ways in described.items() for way in ways.values() if "422" in way["responses"]
    ]
    assert httpx.get(serving.url + "/openapi.json").json()["paths"] == described


def test_scores_of_a_page_are_those_of_scoring(serving: Serving, lm: FrozenLM) -> None:
    from softprompt.inference.score import score

    prompt = prompt_of(lm, 0, "support")
    answer = httpx.post(
        serving.url + "/v1/softprompt/score",
        json={"input": TEXTS[0], "continuations": [" jumps over"], "models": ["base", "support"], "top": 3},
    ).json()
    wanted = [score(lm, [TEXTS[0]], " jumps over", one)[0].log_probability for one in (None, prompt)]
    assert [one["continuations"][0]["logprob"] for one in answer["data"]] == pytest.approx(wanted, abs=1e-4)
    assert len(answer["data"][0]["continuations"][0]["tokens"][0]["top"]) == 3


def test_a_key_sees_its_own_models_alone(lm: FrozenLM, library: Library, tmp_path: Path) -> None:
    entries = [
        {"name": "shop", "sha256": hashlib.sha256(b"secret").hexdigest(), "models": ["support"], "rows": 2},
        {"name": "root", "sha256": hashlib.sha256(b"master").hexdigest(), "admin": True},
    ]
    (tmp_path / "keys.yaml").write_text(json.dumps(entries), encoding="utf-8")
    save_prompt(prompt_of(lm, 7, "extra"), tmp_path / "extra")
    with LocalEngine(lm) as engine:
        server = Serving(engine, Catalogue(engine, library), Keys.load(tmp_path / "keys.yaml"))
        shop = server.client("secret")
        assert [model.id for model in shop.models.list()] == ["support@1", "support"]
        with pytest.raises(openai.NotFoundError):
            shop.completions.create(model="greet", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="may run 2 rows"):
            shop.completions.create(model="support", prompt="a", n=3)
        many = shop.completions.create(model="support", prompt=TEXTS, max_tokens=12, temperature=0)
        wanted = [alone(lm, prompt_of(lm, 0, "support"), text) for text in TEXTS]
        assert [choice.text for choice in many.choices] == wanted
        answer = httpx.post(
            f"{server.url}/admin/prompts",
            json={"name": "extra", "path": str(tmp_path / "extra")},
            headers={"authorization": "Bearer master"},
        )
        assert answer.json()["id"] == "extra"
        text = server.client("master").completions.create(
            model="extra", prompt="a", max_tokens=12, temperature=0
        )
        assert text.choices[0].text == alone(lm, prompt_of(lm, 7, "extra"), "a")
        gone = httpx.delete(f"{server.url}/admin/prompts/extra", headers={"authorization": "Bearer master"})
        assert gone.json()["deleted"] is True
        with pytest.raises(openai.NotFoundError):
            server.client("master").completions.create(model="extra", prompt="a")
        server.close()


def test_a_name_switched_under_load_gives_the_old_answer_or_the_new_one(lm: FrozenLM, tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    prompts = [prompt_of(lm, seed, "task") for seed in (20, 21)]
    for prompt in prompts:
        save_prompt(prompt, tmp_path / "one")
        library.publish(tmp_path / "one", "task")
    library.switch("task@1")
    wanted = [alone(lm, prompt, TEXTS[0]) for prompt in prompts]
    assert wanted[0] != wanted[1]
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine, library)
        server = Serving(engine, catalogue)
        client, seen = server.client(), []
        for turn in range(6):
            if turn == 3:
                library.switch("task@2")
                catalogue.refresh()
            seen.append(
                client.completions.create(model="task", prompt=TEXTS[0], max_tokens=12, temperature=0)
                .choices[0]
                .text
            )
        assert seen == [wanted[0]] * 3 + [wanted[1]] * 3
        server.close()


def test_a_client_that_leaves_frees_its_row_and_the_others_go_on(lm: FrozenLM) -> None:
    async def go() -> None:
        with LocalEngine(lm, max_rows=2) as engine:
            long = DecodeSettings(max_new_tokens=100, ignore_end=True)
            leaving = engine.submit(Work(None, "a", long))
            await anext(leaving)
            await leaving.aclose()  # type: ignore[attr-defined]
            answers = [
                answer
                async for answer in engine.submit(Work(None, TEXTS[0], DecodeSettings(max_new_tokens=12)))
            ]
            assert isinstance(answers[-1], Finished)
            assert answers[-1].text == alone(lm, None, TEXTS[0])
            for _ in range(100):
                if engine.health()["running"] == 0:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError("the row of the client that left still runs")

    asyncio.run(go())


def test_a_full_queue_is_said_and_what_waits_is_answered(lm: FrozenLM) -> None:
    async def go() -> None:
        with LocalEngine(lm, max_rows=1, max_waiting=2) as engine:
            work = Work(None, "a", DecodeSettings(max_new_tokens=60, ignore_end=True))

            async def whole() -> str:
                return [answer async for answer in engine.submit(work)][-1].text

            results = await asyncio.gather(*(whole() for _ in range(12)), return_exceptions=True)
            texts = {result for result in results if isinstance(result, str)}
            assert len(texts) == 1
            assert any(isinstance(result, Overloaded) for result in results)
            assert all(isinstance(result, str | Overloaded) for result in results)

    asyncio.run(go())


def test_rows_of_many_prompts_in_one_batch_are_each_as_alone(lm: FrozenLM) -> None:
    prompts = {str(seed): prompt_of(lm, seed, str(seed)) for seed in range(4)}

    async def go() -> list[str]:
        with LocalEngine(lm, max_rows=5) as engine:
            for digest, prompt in prompts.items():
                engine.load(prompt, digest)

            async def whole(digest: str, text: str) -> str:
                work = Work(digest, text, DecodeSettings(max_new_tokens=8), owner=digest)
                return [answer async for answer in engine.submit(work)][-1].text

            return await asyncio.gather(*(whole(digest, text) for digest in prompts for text in TEXTS))

    found = asyncio.run(go())
    assert found == [
        alone(lm, prompt, text, max_new_tokens=8) for prompt in prompts.values() for text in TEXTS
    ]


def test_a_version_never_changes_and_a_name_goes_back(lm: FrozenLM, tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    first, second = prompt_of(lm, 1, "a"), prompt_of(lm, 2, "a")
    save_prompt(first, tmp_path / "p")
    assert library.publish(tmp_path / "p", "support").full_name == "support@1"
    assert library.publish(tmp_path / "p", "support@1").full_name == "support@1"
    save_prompt(second, tmp_path / "p")
    with pytest.raises(ValueError, match=r"support@1: is published already, with other content"):
        library.publish(tmp_path / "p", "support@1")
    assert library.publish(tmp_path / "p", "support").version == 2
    assert library.find("support").load().name == "support"
    assert torch.equal(library.find("support").load().plain[0], second.plain[0])
    library.switch("support@1")
    assert torch.equal(library.find("support").load().plain[0], first.plain[0])
    (Path(library.path) / "support" / "1" / "adapter_model.safetensors").write_bytes(
        (Path(library.path) / "support" / "2" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"digest|published"):
        library.find("support@1").load()


@pytest.mark.parametrize("name", ["base", "../up", "a/b", "a@0", "a@-1", "", "a@1@2", "é"])
def test_names_that_could_mean_something_else_are_refused(lm: FrozenLM, tmp_path: Path, name: str) -> None:
    save_prompt(prompt_of(lm, 1, "a"), tmp_path / "p")
    with pytest.raises(ValueError, match="wanted a name"):
        Library(tmp_path / "library").publish(tmp_path / "p", name)
    assert not (tmp_path / "library").exists() or not any((tmp_path / "library").iterdir())


def test_a_prompt_of_another_base_does_not_stop_the_others(
    lm: FrozenLM, library: Library, tmp_path: Path
) -> None:
    another = FrozenLM.wrap(tiny_model("Llama", seed=1), tiny_tokenizer(), "another")
    other = prompt_of(another, 3, "other")
    shelf = Library(tmp_path / "library")
    save_prompt(other, tmp_path / "other")
    save_prompt(prompt_of(lm, 1, "mine"), tmp_path / "mine")
    shelf.publish(tmp_path / "other", "other")
    shelf.publish(tmp_path / "mine", "mine")
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine, shelf)
        assert [served.name for served in catalogue.models()] == ["base", "mine@1", "mine"]
        assert "other@1" in catalogue.problems
    assert compile_prompt(lm, None).length == 0
