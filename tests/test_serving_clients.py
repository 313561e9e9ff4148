"""Other programs' clients, unchanged, against the server: LangChain, LiteLLM, lm-evaluation-harness, vLLM's benchmark client and
schemathesis. Those that are not installed are skipped: pip install 'softprompt[clients]'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import judge_rows
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import predictor
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import save_prompt
from test_serving import Serving, prompt_of
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients and what they import

INSTALL = "needs {}: pip install 'softprompt[clients]'"
TEXT = "The quick brown fox"
GREEDY = DecodeSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return FrozenLM.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def support(lm: FrozenLM) -> SoftPrompt:
    return prompt_of(lm, 1, "support")


@pytest.fixture(scope="module")
def serving(lm: FrozenLM, support: SoftPrompt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("clients")
    with LocalEngine(lm, max_rows=8) as engine:
        catalogue = Catalogue(engine)
        save_prompt(support, folder / "support")
        catalogue.add(folder / "support")
        server = Serving(engine, catalogue)
        yield server
        server.close()


def alone(lm: FrozenLM, prompt: SoftPrompt | None, text: str = TEXT) -> str:
    return generate(lm, [text], prompt, GREEDY)[0].text


@pytest.mark.parametrize("model", ["base", "support"])
def test_langchains_completion_class_gets_whole_and_streamed_answers(
    serving: Serving, lm: FrozenLM, support: SoftPrompt, model: str
) -> None:
    langchain = pytest.importorskip("langchain_openai", reason=INSTALL.format("langchain-openai"))
    client = langchain.OpenAI(
        base_url=f"{serving.url}/v1", api_key="none", model=model, temperature=0, max_tokens=12
    )
    wanted = alone(lm, support if model == "support" else None)
    assert client.invoke(TEXT) == wanted
    assert "".join(client.stream(TEXT)) == wanted
    result = client.generate([TEXT, "a"])
    assert [texts[0].text for texts in result.generations] == [
        wanted,
        alone(lm, support if model == "support" else None, "a"),
    ]
    assert result.llm_output["token_usage"]["completion_tokens"] > 0


def test_langchains_chat_class_gets_answers_streams_and_log_probabilities(
    serving: Serving, lm: FrozenLM, support: SoftPrompt
) -> None:
    langchain = pytest.importorskip("langchain_openai", reason=INSTALL.format("langchain-openai"))
    client = langchain.ChatOpenAI(
        base_url=f"{serving.url}/v1", api_key="none", model="support", temperature=0, max_tokens=12
    )
    wanted = alone(lm, support)
    answer = client.invoke([("system", "Be kind."), ("user", TEXT)])
    assert answer.content == wanted
    assert answer.usage_metadata["input_tokens"] == len(lm.tokenizer(TEXT)["input_ids"])
    pieces = list(client.stream(TEXT, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == wanted
    rated = client.bind(logprobs=True, top_logprobs=2).invoke(TEXT)
    content = rated.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert "".join(token["token"] for token in content).startswith(wanted.strip()[:4])


def test_litellms_openai_routes_get_answers_and_streams(
    serving: Serving, lm: FrozenLM, support: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is fetched
    litellm = pytest.importorskip("litellm", reason=INSTALL.format("litellm"))
    where: dict[str, Any] = {"api_base": f"{serving.url}/v1", "api_key": "none", "temperature": 0}
    wanted, turns = alone(lm, support), [{"role": "user", "content": TEXT}]
    chat = litellm.completion("openai/support", messages=turns, max_tokens=12, **where)
    assert chat.choices[0].message.content == wanted
    pieces = litellm.completion("openai/support", messages=turns, max_tokens=12, stream=True, **where)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    text = litellm.text_completion(
        model="text-completion-openai/support", prompt=TEXT, max_tokens=12, **where
    )
    assert text.choices[0].text == wanted
    with pytest.raises(litellm.exceptions.NotFoundError, match="does not exist"):
        litellm.completion("openai/nobody", messages=turns, max_tokens=2, **where)


ROWS = [("my order never came", "complaint"), ("thank you", "praise"), ("where is it", "complaint")] * 2
CHOICES = ["complaint", "praise", "question"]


@pytest.mark.parametrize("model", ["base", "support"])
def test_lm_eval_over_the_server_finds_what_our_evaluate_finds(
    serving: Serving, lm: FrozenLM, support: SoftPrompt, tmp_path: Path, model: str
) -> None:
    """loglikelihood with echo; token ids for the base, and texts for a prompt, which lays its input out as text."""
    pytest.importorskip("lm_eval", reason=INSTALL.format("lm-eval"))
    pytest.importorskip("tenacity", reason="needs lm-eval's extra api: pip install 'softprompt[clients]'")
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS), encoding="utf-8"
    )
    (tmp_path / "task.yaml").write_text(
        f"""
task: served_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(tmp_path / "rows.jsonl"))}}}}}
test_split: test
doc_to_text: "{{{{text}}}}:"
doc_to_target: label
doc_to_choice: {json.dumps(CHOICES)}
output_type: multiple_choice
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    client = LocalCompletionsAPI(
        base_url=f"{serving.url}/v1/completions",
        model=model,
        tokenizer=lm.name,
        tokenizer_backend="huggingface",
        tokenized_requests=model == "base",
        batch_size=2,
        max_length=200,
        revision=None,
    )
    result = lm_eval.simple_evaluate(
        model=client,
        tasks=["served_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    prompt = support if model == "support" else None
    slot = "{soft:4}" if prompt is not None else ""
    layout = Template.parse(f"{slot}{{text}}: {{label}}", target="label", length=4)
    examples = [Example({"text": text, "label": label}, row=row) for row, (text, label) in enumerate(ROWS)]
    metrics, asked = metrics_named(["accuracy"]), JudgeSettings(answers="rank", labels=CHOICES)
    compiled = compile_prompt(lm, prompt, template=layout)
    predict = predictor(lm, compiled, layout, metrics, asked, end="never")
    ours = judge_rows(predict, examples, metrics, layout)
    assert result["results"]["served_choice"]["acc,none"] == ours.estimates["accuracy"].value
    # Not the share alone: each label's log-probability behind each row.
    samples = sorted(result["samples"]["served_choice"], key=lambda sample: sample["doc_id"])
    for sample, judged in zip(samples, ours.rows, strict=True):
        assert judged.scores is not None
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert theirs == pytest.approx([judged.scores[choice] for choice in CHOICES], abs=1e-3)


def vllm_bench(payload: dict[str, Any], url: str) -> tuple[str, int]:
    """What vLLM's benchmark client does with a completion (endpoint_request_func.py, version 0.32): the text, and the
    tokens of the usage."""
    text, tokens = "", 0
    with httpx.stream("POST", f"{url}/v1/completions", json=payload, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            data = json.loads(line.removeprefix("data: "))
            if choices := data.get("choices"):
                text += choices[0].get("text") or ""
            elif usage := data.get("usage"):
                tokens = usage.get("completion_tokens")
    return text, tokens


def test_the_payload_of_vllms_benchmark_client_is_answered_in_full(serving: Serving, lm: FrozenLM) -> None:
    payload = {
        "model": "base",
        "prompt": TEXT,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    settings = DecodeSettings(max_new_tokens=12, ignore_end=True)
    assert vllm_bench(payload, serving.url) == (generate(lm, [TEXT], None, settings)[0].text, 12)
    ids = lm.tokenizer(TEXT)["input_ids"]  # its random data set sends ids
    assert vllm_bench({**payload, "prompt": ids}, serving.url)[1] == 12


def test_schemathesis_finds_no_fault_in_the_openapi_document(serving: Serving, tmp_path: Path) -> None:
    """Every operation with drawn bodies: no 5xx, no answer that the document does not describe, no wrong content type."""
    pytest.importorskip("schemathesis", reason=INSTALL.format("schemathesis"))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{serving.url}/openapi.json",
        "--checks",
        checks,
    ]
    command += [
        "--max-examples",
        "15",
        "--phases",
        "examples,fuzzing",
        "--request-timeout",
        "20",
        "--seed",
        "1",
    ]
    command += ["--workers", "1", "--suppress-health-check", "all", "--no-color"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
