"""Attention in two parts: a long prompt is held once, and every row under it gets what it gets with a copy of its own."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from softprompt.base import shared_prefix
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.shared_prefix import attend, can_share
from softprompt.inference.compiled import TextPrompt, compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.lanes import Lanes
from softprompt.inference.request import request
from softprompt.inference.running_batch import Running, position_bytes
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.engine import Finished, Work
from softprompt.serving.local_engine import LocalEngine
from tiny_models import tiny_model, tiny_tokenizer

SHARING = ["Llama", "GPT-2", "Qwen3", "Gemma"]
TEXTS = ["The quick brown fox", "Tweet: my order never came", "I want you", "a"]


def base(architecture: str = "Llama") -> FrozenLM:
    positions = "n_positions" if architecture == "GPT-2" else "max_position_embeddings"
    return FrozenLM.wrap(tiny_model(architecture, **{positions: 512}), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return base()


def greedy(tokens: int = 8) -> DecodeSettings:
    return DecodeSettings(max_new_tokens=tokens, ignore_end=True, log_probabilities=True)


def long_prompt(lm: FrozenLM, seed: int, length: int = 140) -> SoftPrompt:
    drawn = torch.Generator().manual_seed(seed)
    vectors = torch.randn(length, lm.width, generator=drawn)
    return SoftPrompt(vectors, lm.fingerprint, f"{{soft:{length}}}{{text}}", name=str(seed))


@pytest.mark.parametrize("fused", [True, False])
def test_each_part_is_a_softmax_in_double_precision(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, size, 8, generator=drawn) for size in (5, 7, 7))
    mask = torch.zeros(2, 1, 5, 7)
    mask[0, :, :, :3] = torch.finfo(torch.float32).min
    if not fused:  # the way of other devices, computed here
        monkeypatch.setattr(shared_prefix, "FUSED_ON", frozenset())
    scores = query.double() @ key.double().mT * 0.3 + mask.double()
    result, weight = attend(query, key, value, mask, 0.3)
    assert torch.allclose(result.double(), scores.softmax(-1) @ value.double(), atol=1e-5)
    assert torch.allclose(weight.double(), scores.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("architecture", SHARING)
def test_a_long_text_in_front_gives_transformers_own_continuation(architecture: str) -> None:
    """The reference is transformers' generate over the whole text, which knows nothing of prompts."""
    lm = base(architecture)
    front = "I want you to act as a logistician. Tweet: my order never came. " * 6
    compiled = compile_prompt(lm, TextPrompt(front))
    assert compiled.length >= shared_prefix.SHARED_FROM
    running = Running(lm)
    rows = [request(lm, compiled, text, greedy(6)) for text in TEXTS]
    assert all(row.row.shared.length >= shared_prefix.SHARED_FROM for row in rows)
    running.admit(rows)
    while len(running):
        running.step()
    for text, row in zip(TEXTS, rows, strict=True):
        ids = lm.tokenizer(front + text, return_tensors="pt")
        theirs = lm.model.generate(**ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        assert row.token_ids == theirs[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("architecture", [*SHARING, "BLOOM (ALiBi)", "Gemma 2 (sliding window)"])
def test_rows_under_long_prompts_are_as_with_a_copy_whatever_runs_beside_them(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = base(architecture)
    assert can_share(lm) == (architecture in SHARING)
    compiled = [compile_prompt(lm, prompt) for prompt in (None, long_prompt(lm, 1), long_prompt(lm, 2, 200))]
    rng = random.Random(0)
    asked = [(rng.choice(compiled), rng.choice(TEXTS), greedy(rng.randint(1, 9))) for _ in range(30)]
    running, rows = Lanes(lm, max_rows=7), []
    waiting = [request(lm, prompt, text, settings) for prompt, text, settings in asked]
    rows += waiting
    while waiting or len(running):
        count = min(len(waiting), running.max_rows - len(running), rng.randint(0, 3))
        joining = [waiting.pop() for _ in range(count)]
        running.join(joining)
        running.advance()
    monkeypatch.setattr(shared_prefix, "SHARED_FROM", 10**6)
    for row, (prompt, text, settings) in zip(rows, asked, strict=True):
        copied = request(lm, prompt, text, settings)
        assert copied.row.shared.length == 0
        solo = Running(lm, max_rows=1)
        solo.admit([copied])
        while len(solo):
            solo.step()
        assert row.token_ids == copied.token_ids
        assert row.log_probabilities == pytest.approx(copied.log_probabilities, abs=2e-4)


def test_a_long_prompt_takes_its_memory_once(lm: FrozenLM) -> None:
    compiled = compile_prompt(lm, long_prompt(lm, 1, 200))
    rows = [request(lm, compiled, "a", greedy(8)) for _ in range(8)]
    assert len({row.row.shared.keys[0].data_ptr() for row in rows}) == 1
    running = Running(lm)
    own = running.bytes_for(rows)
    running.admit(rows)
    assert running.bytes <= own < 8 * 40 * position_bytes(lm)  # of 8 rows of more than 200 positions


def test_prompts_of_unlike_content_share_nothing(lm: FrozenLM) -> None:
    """Same length, same template, same digest length: only what is one state in memory is shared."""
    compiled = [compile_prompt(lm, long_prompt(lm, seed)) for seed in (1, 2)]
    groups = shared_prefix.prefix_groups(
        [request(lm, each, "a", greedy()).row.shared for each in (*compiled, *compiled)], "cpu"
    )
    assert [group.rows_N.tolist() for group in groups] == [[0, 2], [1, 3]]


def test_an_engine_reads_a_long_text_in_parts_behind_a_shared_prompt(lm: FrozenLM) -> None:
    prompt, text = long_prompt(lm, 3), "I want you to act as a logistician. Tweet: a complaint. "
    settings = DecodeSettings(max_new_tokens=6, temperature=1.0, seed=4, n=2, ignore_end=True)

    async def go(engine: LocalEngine) -> list[str]:
        texts: dict[int, str] = {}
        async for answer in engine.submit(Work("d", text, settings)):
            if isinstance(answer, Finished):
                texts[answer.sample] = answer.text
                assert answer.virtual_tokens == 140
        return [texts[0], texts[1]]

    with LocalEngine(lm, read_beside=5) as engine:
        engine.load(prompt, "d")

        async def both() -> list[list[str]]:
            other = asyncio.ensure_future(go(engine))
            return [await go(engine), await other]

        assert asyncio.run(both()) == [[each.text for each in generate(lm, [text], prompt, settings)]] * 2
