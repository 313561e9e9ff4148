"""Steps that attend to the whole buffers: the base's own answers, in buffers that are never much larger than their rows."""

from __future__ import annotations

import random

import pytest
import torch

from softprompt.base import shared_prefix, step_attention
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.step_attention import attend_step, can_step
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.lanes import Lanes
from softprompt.inference.request import request
from softprompt.inference.running_batch import Running, position_bytes
from softprompt.inference.running_cache import SPARE, room
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import tiny_model, tiny_tokenizer

STEPPED = ["Llama", "GPT-2", "GPT-NeoX", "Qwen3", "Gemma"]
OTHERS = [
    "BLOOM (ALiBi)",
    "Mistral (sliding window)",
    "Gemma 2 (sliding window)",
    "Falcon (rotary, one key/value head)",
]
TEXTS = ["The quick brown fox", "Tweet: my order never came and nobody answers", "I want you", "a"]


def base(architecture: str, *, longest: int = 512) -> FrozenLM:
    """A base in float32, where the greedy tokens are exact."""
    positions = "n_positions" if architecture in ("GPT-2", "BLOOM (ALiBi)") else "max_position_embeddings"
    return FrozenLM.wrap(tiny_model(architecture, **{positions: longest}), tiny_tokenizer(), "tiny")


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_attention, "STEPPED", frozenset({torch.float32}))


def greedy(tokens: int = 8) -> DecodeSettings:
    return DecodeSettings(max_new_tokens=tokens, ignore_end=True, log_probabilities=True)


@pytest.mark.parametrize("group", [1, 3])
def test_a_step_is_a_softmax_in_double_precision(group: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, group, 8, generator=drawn)
    keys, values = torch.randn(3, 2, 11, 8, generator=drawn), torch.randn(3, 2, 11, 5, generator=drawn)
    bias = torch.zeros(3, 1, 1, 11)
    bias[0, ..., :4] = bias[2, ..., 9:] = -torch.inf
    result, weight = attend_step(query, keys, values, bias, 0.3, rated=True)
    scores = query.double() @ keys.double().mT * 0.3 + bias.double()
    assert torch.allclose(result.double(), scores.softmax(-1) @ values.double(), atol=1e-5)
    assert weight is not None
    assert torch.allclose(weight.double(), scores.logsumexp(-1), atol=1e-5)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("architecture", STEPPED)
def test_rows_of_unlike_length_get_transformers_own_continuation(architecture: str) -> None:
    lm = base(architecture)
    assert can_step(lm)
    running, compiled = Running(lm), compile_prompt(lm, None)
    rows = [request(lm, compiled, text, greedy(40 if text == "a" else 6)) for text in TEXTS]
    running.admit(rows)
    while len(running):
        running.step()
    for text, row in zip(TEXTS, rows, strict=True):
        ids = lm.tokenizer(text, return_tensors="pt")
        new = row.settings.max_new_tokens
        theirs = lm.model.generate(
            **ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert row.token_ids == theirs[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("architecture", OTHERS)
def test_a_base_with_another_attention_keeps_its_own(
    architecture: str,
) -> None:
    lm = base(architecture)
    assert not can_step(lm)
    assert not Running(lm)._cache.follows


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_rows_that_share_a_long_prompt_are_as_in_torchs_kernel_whatever_runs_beside_them(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = base(architecture)
    assert can_step(lm)
    drawn = torch.Generator().manual_seed(1)
    prompts = [
        SoftPrompt(torch.randn(P, lm.width, generator=drawn), lm.fingerprint, f"{{soft:{P}}}{{text}}")
        for P in (5, 140)
    ]
    compiled = [compile_prompt(lm, prompt) for prompt in (None, *prompts)]
    rng = random.Random(0)
    asked = [(rng.choice(compiled), rng.choice(TEXTS), greedy(rng.randint(1, 60))) for _ in range(24)]
    rows = [request(lm, *each) for each in asked]
    assert any(row.row.shared.length for row in rows)
    running, waiting = Lanes(lm, max_rows=7), list(rows)
    while waiting or len(running):
        count = min(len(waiting), running.max_rows - len(running), rng.randint(0, 3))
        running.join([waiting.pop() for _ in range(count)])
        running.advance()
    # The reference: every row alone, its prompt copied, through the base's own attention.
    plain = base(architecture)
    monkeypatch.setattr(step_attention, "STEPPED", frozenset())
    monkeypatch.setattr(shared_prefix, "SHARED_FROM", 10**6)
    for row, (prompt, text, settings) in zip(rows, asked, strict=True):
        alone = request(plain, prompt, text, settings)
        solo = Running(plain, max_rows=1)
        solo.admit([alone])
        while len(solo):
            solo.step()
        assert row.token_ids == alone.token_ids
        assert row.log_probabilities == pytest.approx(alone.log_probabilities, abs=2e-4)


def test_in_bfloat16_a_step_is_as_near_to_float32_as_the_bases_own() -> None:
    """Log-probabilities of forced tokens, so that rows cannot part at a tie."""
    exact = base("Llama")
    lm = FrozenLM.wrap(tiny_model("Llama", max_position_embeddings=512).bfloat16(), tiny_tokenizer(), "tiny")
    assert can_step(lm)
    assert not can_step(exact)
    forced = DecodeSettings(max_new_tokens=10, logit_bias={7: 100.0}, ignore_end=True, log_probabilities=True)

    def log_probabilities(lm: FrozenLM) -> torch.Tensor:
        running = Running(lm)
        rows = [request(lm, compile_prompt(lm, None), text, forced) for text in TEXTS]
        running.admit(rows)
        while len(running):
            running.step()
        assert all(set(row.token_ids) == {7} for row in rows)
        return torch.tensor([row.log_probabilities for row in rows])

    wanted = log_probabilities(exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_attention, "STEPPED", frozenset())
        own = FrozenLM.wrap(lm.model, tiny_tokenizer(), "tiny")
        assert not can_step(own)
        own_error = (log_probabilities(own) - wanted).abs().mean()
    assert (log_probabilities(lm) - wanted).abs().mean() <= 1.5 * own_error


@pytest.mark.usefixtures("in_float32")
def test_buffers_have_few_more_columns_than_their_rows_need() -> None:
    """A step reads all of them, so neither a far limit nor a long row that has left may make it slow."""
    lm = base("Llama")
    running, compiled = Running(lm, max_rows=3), compile_prompt(lm, None)
    short = request(lm, compiled, "a", greedy(300))
    long = request(lm, compiled, "I want you to act as a logistician. " * 9, greedy(4))
    running.admit([short])
    assert running._cache.mask.shape[1] <= 1 + SPARE
    running.admit([long])
    longest = len(long.row.marks)
    assert longest > 80
    while len(running):
        running.step()
        columns = running._cache.mask.shape[1]
        live = 1 + len(short.token_ids) if long.finish_reason else longest + len(long.token_ids)
        since = len(short.token_ids) - 5  # steps of the short row alone
        assert columns <= live + SPARE or since <= SPARE
        assert columns >= live - 1 or not len(running)


@pytest.mark.usefixtures("in_float32")
def test_memory_is_counted_as_rows_will_need_it_and_not_as_they_begin() -> None:
    lm = base("Llama")
    compiled = compile_prompt(lm, None)
    row = request(lm, compiled, "a", greedy(200))
    limit = 3 * room(row.columns) * position_bytes(lm)
    for running in (Running(lm, memory_bytes=limit), Lanes(lm, memory_bytes=limit)):
        running.join([row])
        assert running.bytes < limit / 10
        more = [request(lm, compiled, "a", greedy(200)) for _ in range(3)]
        assert running.fits(more[:1])
        assert not running.fits(more)
        running.cancel(row)
        row = request(lm, compiled, "a", greedy(200))


@pytest.mark.usefixtures("in_float32")
def test_memory_of_a_lane_that_no_row_joins_is_counted_at_its_full_length() -> None:
    lm = base("Llama")
    compiled = compile_prompt(lm, None)
    short, long = (request(lm, compiled, "a", greedy(new)) for new in (200, 450))
    needed = (room(short.columns) + room(long.columns)) * position_bytes(lm)
    for spare, fits in ((2 * position_bytes(lm), True), (-2 * position_bytes(lm), False)):
        lanes = Lanes(lm, memory_bytes=needed + spare + position_bytes(lm), lane_cost=0)
        lanes.join([short])
        assert lanes.fits([long]) == fits
        lanes.cancel(short)
        short = request(lm, compiled, "a", greedy(200))


@pytest.mark.usefixtures("in_float32")
def test_short_rows_take_no_more_memory_than_is_counted_for_them() -> None:
    lm = base("Llama")
    running, compiled = Running(lm), compile_prompt(lm, None)
    rows = [request(lm, compiled, "a", greedy(new)) for new in (3, 9, 6, 12)]
    counted = running.bytes_for(rows)
    running.admit(rows)
    while len(running):
        assert running.bytes <= counted
        running.step()
