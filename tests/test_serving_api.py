"""What clients send and how they misbehave: responses, constraints, hang-ups, keys taken out, bodies of any kind."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forked import begun
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.errors import DataError
from softprompt.inference.generate import generate
from softprompt.inference.score import score
from softprompt.inference.settings import DecodeSettings
from softprompt.serving.answers import sse
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.keys import Keys, sha256_of
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.refusals import as_refusal
from softprompt.serving.steering import Choice
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_serving import TEXTS, Serving, alone, prompt_of
from tiny_models import tiny_model, tiny_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "/secret/folder/tiny")


@pytest.fixture(scope="module")
def engine(lm: FrozenLM) -> Iterator[LocalEngine]:
    with LocalEngine(lm, max_rows=6) as engine:
        yield engine


@pytest.fixture(scope="module")
def serving(lm: FrozenLM, engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    catalogue = Catalogue(engine)
    labels = "{text}{soft:4} {label}"
    for name, template in (("support", "{soft:4}{text}"), ("sort", labels), ("pair", "{soft:4}{a} and {b}")):
        prompt = prompt_of(lm, 0, name, template)
        save_prompt(prompt if name != "sort" else sort_prompt(lm), folder / name)
        catalogue.add(folder / name)
    server = Serving(engine, catalogue)
    yield server
    server.close()


def sort_prompt(lm: FrozenLM) -> Any:
    from dataclasses import replace

    return replace(prompt_of(lm, 3, "sort", "{text}{soft:4} {label}"), target="label")


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200  # however busy the machine is
    while time.monotonic() < deadline:
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def post(serving: Serving, path: str = "/v1/completions", /, **body: Any) -> httpx.Response:
    return httpx.post(serving.url + path, json={"model": "base", "temperature": 0, **body}, timeout=60)


# Responses


def test_a_response_is_the_answer_that_generation_alone_gives(serving: Serving, lm: FrozenLM) -> None:
    answer = serving.client().responses.create(
        model="support", input=TEXTS[0], max_output_tokens=12, temperature=0, store=False
    )
    assert answer.output_text == alone(lm, prompt_of(lm, 0, "support"), TEXTS[0])
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(lm.tokenizer(TEXTS[0])["input_ids"])
    assert answer.store is False  # type: ignore[attr-defined]
    assert (answer.status == "incomplete") == (answer.usage.output_tokens == 12)


def test_a_response_of_messages_and_instructions_reads_the_last_question(
    serving: Serving, lm: FrozenLM
) -> None:
    answer = serving.client().responses.create(
        model="support",
        instructions="Be kind.",
        input=[
            {"role": "user", "content": "first"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "second"}]},  # type: ignore[list-item]
            {"role": "user", "content": [{"type": "input_text", "text": TEXTS[1]}]},
        ],
        max_output_tokens=12,
        temperature=0,
    )
    assert answer.output_text == alone(lm, prompt_of(lm, 0, "support"), TEXTS[1])


def test_a_streamed_response_is_the_same_as_a_whole_one(serving: Serving, lm: FrozenLM) -> None:
    wanted = alone(lm, prompt_of(lm, 0, "support"), TEXTS[0])
    events = list(
        serving.client().responses.create(
            model="support", input=TEXTS[0], max_output_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == wanted
    with serving.client().responses.stream(
        model="support", input="a", extra_body={"choice": ["quick help"]}
    ) as stream:
        assert stream.get_final_response().output_text == "quick help"


# What steers an answer


def test_a_choice_is_the_label_that_scoring_step_by_step_prefers(serving: Serving, lm: FrozenLM) -> None:
    """Greedy over the labels' tokens: with labels that differ in their first token, the likelier first token wins."""
    labels = ["complaint", "quick", "answer"]
    prompt = sort_prompt(lm)
    for text in TEXTS:
        firsts = [score(lm, [text], label, prompt)[0].token_log_probabilities[0] for label in labels]
        wanted = labels[firsts.index(max(firsts))]
        answer = post(serving, model="sort", prompt=text, choice=labels, max_tokens=20).json()
        assert answer["choices"][0]["text"].strip() == wanted
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_every_choice_can_be_drawn_and_nothing_else(serving: Serving) -> None:
    labels = ["yes", "yes please", "no", "ü"]
    answer = post(
        serving, model="support", prompt=["a"] * 60, choice=labels, temperature=2.0, max_tokens=20
    ).json()
    assert {choice["text"] for choice in answer["choices"]} == set(labels)


def test_where_one_choice_begins_another_an_end_token_decides() -> None:
    choice = Choice([[5], [5, 6], [7]], ends=[1])
    logits_V = torch.arange(10.0)

    def allowed(new: list[int]) -> list[int]:
        return choice.steered(logits_V, new).isfinite().nonzero()[:, 0].tolist()

    assert allowed([]) == [5, 7]
    assert allowed([5]) == [1, 6]
    assert [choice.is_complete(new) for new in ([], [5], [5, 6], [7], [5, 1])] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_an_answer_follows_its_json_schema_and_expression(serving: Serving) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'softprompt[guided]'")
    schema = {
        "type": "object",
        "properties": {
            "mood": {"enum": ["glad", "cross"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        },
        "required": ["mood", "stars"],
        "additionalProperties": False,
    }
    for seed in range(4):
        form = {"type": "json_schema", "json_schema": {"name": "review", "schema": schema}}
        answer = post(
            serving, prompt=TEXTS[seed], response_format=form, temperature=1, seed=seed, max_tokens=90
        ).json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        read = json.loads(answer["text"])
        assert read["mood"] in ("glad", "cross")
        assert 1 <= read["stars"] <= 5
    number = post(serving, prompt="a", regex="[0-9]{3}-[ab]", max_tokens=30).json()["choices"][0]["text"]
    assert len(number) == 5
    assert number[:3].isdigit()
    assert number[3:] in ("-a", "-b")
    both = post(serving, prompt="a", regex="a", choice=["b"])
    assert both.status_code == 400


def test_without_llguidance_a_schema_is_refused_in_a_line_and_a_choice_works(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.serving.steering.find_spec", lambda name: None)
    answer = post(serving, prompt="a", response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "softprompt[guided]" in answer.json()["error"]["message"]
    assert post(serving, prompt="a", choice=["b"]).json()["choices"][0]["text"] == "b"


def test_penalties_are_openais_sums_over_the_new_tokens(serving: Serving, lm: FrozenLM) -> None:
    """By hand: logits less presence once and frequency each time, of the model's own logits."""
    ids = lm.tokenizer(TEXTS[0])["input_ids"]
    new: list[int] = []
    for _ in range(10):
        with torch.no_grad():
            logits_V = lm.model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        for token, count in Counter(new).items():
            logits_V[token] -= 1.5 + 0.7 * count
        new.append(int(logits_V.argmax()))
    answer = post(
        serving, prompt=ids, max_tokens=10, presence_penalty=1.5, frequency_penalty=0.7, ignore_eos=True
    ).json()
    assert answer["choices"][0]["text"] == lm.tokenizer.decode(new, skip_special_tokens=True)


def test_a_bias_forbids_a_token(serving: Serving, lm: FrozenLM) -> None:
    first = post(serving, prompt="a", max_tokens=1, logprobs=2).json()["choices"][0]["logprobs"]
    (table,) = first["top_logprobs"]
    assert 2 <= len(table) <= 3  # the token that was drawn is in it too
    likeliest = max(table, key=table.get)
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer("a")["input_ids"]])
        best = int(lm.model(input_ids=ids).logits[0, -1].argmax())
    assert lm.tokenizer.decode([best]) == likeliest
    answer = post(serving, prompt="a", max_tokens=1, logit_bias={str(best): -100}, logprobs=1).json()
    assert answer["choices"][0]["logprobs"]["tokens"] != [likeliest]


def test_top_logprobs_of_a_completion_hold_the_token_itself(serving: Serving, lm: FrozenLM) -> None:
    """As OpenAI's do: of the `logprobs` likeliest tokens, and of the chosen one."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([lm.tokenizer("a")["input_ids"]])).logits[0, -1]
    rates = logits.log_softmax(-1)
    best, rare = int(rates.argmax()), int(rates[: lm.vocab_size].argsort()[3])
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = post(serving, prompt="a", logit_bias={str(rare): 100}, **asked).json()["choices"][0]["logprobs"]
    (table,) = answer["top_logprobs"]
    assert table == pytest.approx(
        {lm.tokenizer.decode([token]): float(rates[token]) for token in (best, rare)}, abs=1e-4
    )


def test_top_logprobs_of_a_chat_are_the_models_own(serving: Serving, lm: FrozenLM) -> None:
    answer = serving.client().chat.completions.create(
        model="support",
        messages=[{"role": "user", "content": TEXTS[0]}],
        temperature=0,
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=4,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    for token in content:
        rates = [other.logprob for other in token.top_logprobs]
        assert rates == sorted(rates, reverse=True)
        assert (len(rates), rates[0]) == (4, pytest.approx(token.logprob))
    ids = torch.tensor(lm.tokenizer(TEXTS[0])["input_ids"])
    embeddings_1SD = torch.cat([prompt_of(lm, 0, "support").embeddings_PD, lm.embedding_VD[ids]])[None]
    with torch.no_grad():
        theirs_V = lm.model(inputs_embeds=embeddings_1SD).logits[0, -1].log_softmax(-1)
    best = theirs_V.topk(4)
    assert [other.logprob for other in content[0].top_logprobs] == pytest.approx(
        best.values.tolist(), abs=1e-4
    )
    assert [other.token for other in content[0].top_logprobs] == [
        lm.tokenizer.decode([token]) for token in best.indices.tolist()
    ]


def test_without_a_seed_answers_differ_and_with_one_they_do_not(serving: Serving) -> None:
    free = [post(serving, prompt="a", temperature=1, max_tokens=12).json() for _ in range(4)]
    assert len({answer["choices"][0]["text"] for answer in free}) > 1
    bound = [post(serving, prompt="a", temperature=1, max_tokens=12, seed=7).json() for _ in range(3)]
    assert len({answer["choices"][0]["text"] for answer in bound}) == 1


def test_greedy_samples_are_all_the_greedy_answer(serving: Serving, lm: FrozenLM) -> None:
    answer = post(serving, prompt=TEXTS[:2], n=2, max_tokens=12).json()
    wanted = [alone(lm, None, text) for text in TEXTS[:2] for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert answer["usage"]["prompt_tokens"] == sum(len(lm.tokenizer(text)["input_ids"]) for text in TEXTS[:2])


def test_a_length_of_null_is_openais_16_and_more_texts_than_rows_are_all_answered(
    serving: Serving, lm: FrozenLM
) -> None:
    answer = post(serving, prompt=TEXTS * 40, max_tokens=None, ignore_eos=True).json()
    wanted = [alone(lm, None, text, max_new_tokens=16, ignore_end=True) for text in TEXTS]
    assert [choice["text"] for choice in answer["choices"]] == wanted * 40


def test_a_chat_with_the_base_is_laid_out_by_its_template(lm: FrozenLM) -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = CHAT_TEMPLATE
    chatting = FrozenLM.wrap(tiny_model("Llama"), tokenizer, "chatting")
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = generate(chatting, [tokenizer.decode(ids)], None, DecodeSettings(max_new_tokens=8))[0].text
    with LocalEngine(chatting) as engine:
        server = Serving(engine, Catalogue(engine))
        chat = server.client().chat.completions.create(
            model="base",
            messages=turns,
            max_tokens=8,
            temperature=0,  # type: ignore[arg-type]
        )
        assert chat.choices[0].message.content == wanted
        response = server.client().responses.create(
            model="base", input="hello", instructions="x", max_output_tokens=8, temperature=0
        )
        assert response.output_text == wanted
        server.close()


def test_columns_come_in_one_stream_each_as_alone_and_a_broken_one_breaks_no_other(
    serving: Serving, lm: FrozenLM
) -> None:
    columns = [
        {"model": "base", "prompt": TEXTS[0]},
        {"model": "support", "prompt": "word " * 400},
        {"model": "pair", "prompt": "a"},
        {"model": "support", "prompt": TEXTS[1]},
        {"model": "pair", "fields": {"a": "hello", "b": "you"}},
    ]
    answer = post(serving, "/v1/softprompt/compare", columns=columns, max_tokens=12)
    assert answer.text.endswith("data: [DONE]\n\n")
    texts, ends = dict.fromkeys(range(5), ""), {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            texts[event["column"]] += event.get("text", "")
            if "text" not in event:
                ends[event["column"]] = "error" in event
    assert ends == {0: False, 1: True, 2: True, 3: False, 4: False}
    pair = prompt_of(lm, 0, "pair", "{soft:4}{a} and {b}")
    example = Example({"a": "hello", "b": "you"})
    wanted = generate(lm, [example], pair, DecodeSettings(max_new_tokens=12))[0].text
    assert [texts[0], texts[3], texts[4]] == [
        alone(lm, None, TEXTS[0]),
        alone(lm, prompt_of(lm, 0, "support"), TEXTS[1]),
        wanted,
    ]
    assert post(serving, "/v1/softprompt/compare", columns=[{"model": "x"}]).status_code == 404


# Clients that misbehave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows_and_its_share(
    serving: Serving, engine: LocalEngine, stream: bool
) -> None:
    where = urlsplit(serving.url)
    body = json.dumps(
        {"model": "base", "prompt": ["a"] * 8, "max_tokens": 120, "ignore_eos": True, "stream": stream}
    ).encode()
    for _ in range(3):
        with socket.create_connection((where.hostname or "", where.port or 0)) as wire:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            wire.sendall(head.encode() + body)
            wait_for(lambda: engine.health()["running"] > 0)
        wait_for(lambda: engine.health()["running"] == engine.health()["waiting"] == 0)
    assert post(serving, prompt="a", max_tokens=2).status_code == 200


def test_a_body_without_a_length_is_bounded_all_the_same(serving: Serving) -> None:
    where = urlsplit(serving.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 0, timeout=30)
    with contextlib.closing(connection):
        chunks = (b" " * 100_000 for _ in range(60))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(
                "POST",
                "/v1/completions",
                body=chunks,
                headers={"content-type": "application/json"},
                encode_chunked=True,
            )
        with contextlib.suppress(ConnectionResetError):
            assert connection.getresponse().status == 413


def test_names_of_fields_cannot_become_headers(serving: Serving) -> None:
    answer = post(serving, prompt="a", max_tokens=1, **{"é\r\nset-cookie: a=b": 1})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers


def test_no_answer_tells_where_files_lie(serving: Serving) -> None:
    for answer in (
        httpx.get(serving.url + "/v1/models"),
        post(serving, prompt="word " * 400),
        post(serving, "/admin/prompts", name="x", path="/x"),
        httpx.get(serving.url + "/health"),
    ):
        assert "/secret" not in answer.text


def test_not_even_an_administrator_is_told_where_files_lie(lm: FrozenLM, tmp_path: Path) -> None:
    entry = {"name": "operator", "sha256": sha256_of("operator"), "admin": True}
    (tmp_path / "keys.yaml").write_text(json.dumps([entry]), encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{", encoding="utf-8")
    with LocalEngine(lm) as engine:
        server = Serving(engine, Catalogue(engine), Keys.load(tmp_path / "keys.yaml"))
        for name, said in (
            ("nothing", "nothing: there is no such folder"),
            ("broken", "adapter_config.json: "),
        ):
            answer = httpx.post(
                server.url + "/admin/prompts",
                json={"name": "x", "path": str(tmp_path / name)},
                headers={"authorization": "Bearer operator"},
                timeout=30,
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(said)
            assert str(tmp_path.parent) not in answer.text
        server.close()
    refusal = as_refusal(DataError("'/a/b.json': and/or, see http://x/y/z, not ./d/e"), "base")
    assert str(refusal) == "'b.json': and/or, see http://x/y/z, not ./d/e"


def test_half_a_character_is_refused_or_read_but_breaks_nothing(
    serving: Serving, engine: LocalEngine
) -> None:
    for body in (
        '{"model": "base", "prompt": "\\ud800", "max_tokens": 1}',
        '{"model": "support", "messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
        '{"model": "\\ud800", "prompt": "a"}',
        '{"model": "base", "prompt": "a", "\\ud800": 1}',
        '{"model": "base", "prompt": "a", "choice": ["\\ud800"]}',
    ):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = httpx.post(
                serving.url + path,
                content=body.encode(),
                headers={"content-type": "application/json"},
                timeout=30,
            )
            assert answer.status_code in (200, 400, 404), answer.text
    assert engine.health()["alive"] == 1


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.one_of(st.text(max_size=3), st.integers(-1, 400)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
)
FIELDS = st.sampled_from(
    "prompt messages input max_tokens max_completion_tokens max_output_tokens temperature top_p top_k min_p n seed "
    "stop stream stream_options echo logprobs top_logprobs logit_bias presence_penalty frequency_penalty "
    "repetition_penalty response_format choice regex softprompt suffix best_of tools store text instructions "
    "previous_response_id ignore_eos continuations models top tokens name path colour".split()
)
PATHS = st.sampled_from(
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/softprompt/score",
        "/tokenize",
        "/detokenize",
        "/admin/prompts",
    ]
)
LIKELY = {
    "prompt": "a",
    "messages": [{"role": "user", "content": "a"}],
    "input": "a",
    "max_tokens": 2,
    "max_completion_tokens": 2,
    "max_output_tokens": 2,
    "continuations": ["b"],
    "models": ["base"],
    "tokens": [5],
}


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    PATHS,
    st.sampled_from(["base", "support", "sort", "pair", "x"]),
    st.dictionaries(FIELDS, VALUES, max_size=4),
)
def test_any_body_is_answered_in_openais_shape_and_never_with_500(
    serving: Serving, path: str, model: str, changed: dict[str, Any]
) -> None:
    body = {**LIKELY, "model": model, **changed}
    answer = httpx.post(
        serving.url + path,
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code in (200, 400, 403, 404), (path, body, answer.text)
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert events
        assert not any("error" in event for event in events)
    elif answer.status_code == 200:
        assert isinstance(answer.json(), dict)
    else:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# Keys, libraries, ends


def test_a_key_that_is_taken_out_of_the_file_is_refused_and_a_broken_file_changes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.yaml"
    both = [{"name": name, "sha256": sha256_of(name)} for name in ("a", "b")]
    path.write_text(json.dumps(both), encoding="utf-8")
    keys = Keys.load(path)
    assert keys.caller("Bearer a") is not None
    path.write_text(json.dumps(both[1:]), encoding="utf-8")
    keys.refresh()
    assert keys.caller("Bearer a") is None
    assert keys.caller("Bearer b") is not None
    path.write_text("[", encoding="utf-8")
    keys.refresh()
    assert keys.caller("Bearer b") is not None
    path.unlink()
    keys.refresh()
    assert keys.caller(None) is None


def test_a_broken_index_leaves_what_is_served_and_a_removed_prompt_is_given_back(
    lm: FrozenLM, tmp_path: Path
) -> None:
    library = Library(tmp_path / "library")
    for seed, name in enumerate(("keeps", "goes")):
        save_prompt(prompt_of(lm, seed, name), tmp_path / name)
        library.publish(tmp_path / name, name)
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine, library)
        index = Path(library.path) / "index.json"
        whole = index.read_text(encoding="utf-8")
        index.write_text("{", encoding="utf-8")
        catalogue.refresh()
        assert catalogue.find("keeps") is not None
        assert "index" in catalogue.problems
        record = json.loads(whole)
        del record["names"]["goes"]
        index.write_text(json.dumps(record), encoding="utf-8")
        catalogue.refresh()
        assert catalogue.find("goes") is None
        assert catalogue.find("keeps") is not None
        assert len(engine.prompts) == 1
        assert catalogue.problems == {}


def test_a_server_that_is_asked_to_end_says_so_and_finishes_what_runs() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "softprompt", "serve", "--base", "builtin", "--port", str(port), "-q"]
    command += ["--grace-seconds", "300"]  # however busy the machine is
    with begun(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:

        def answers() -> bool:
            assert server.poll() is None, server.stderr and server.stderr.read()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(url + "/ready", timeout=5).status_code == 200
            time.sleep(0.2)
            return False

        wait_for(answers)
        body = {"model": "base", "prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "stream": True}
        # Both requests are sent while the stream runs, so the client is made before: that alone can take a tenth of a second.
        with (
            httpx.Client(base_url=url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").status_code == 503)
            refused = client.post("/v1/completions", json={**body, "stream": False})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(60) == 0


def test_a_wrong_key_gets_no_metrics_and_no_hint(lm: FrozenLM, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(
        json.dumps([{"name": "a", "sha256": sha256_of("a")}]), encoding="utf-8"
    )
    with LocalEngine(lm) as engine:
        server = Serving(engine, Catalogue(engine), Keys.load(tmp_path / "keys.yaml"))
        assert httpx.get(server.url + "/metrics").status_code == 401
        known = httpx.get(server.url + "/metrics", headers={"authorization": "Bearer a"})
        assert known.status_code == 403
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("b").responses.create(model="base", input="a")
        server.close()


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    """Clients that read lines as text break them at every separator that Unicode knows."""
    text = "".join(map(chr, [*range(0x300), 0x2028, 0x2029, 0x1F600]))
    first, *rest = sse({"text": text}).decode().splitlines()
    assert json.loads(first.removeprefix("data: ")) == {"text": text}
    assert rest == [""]
