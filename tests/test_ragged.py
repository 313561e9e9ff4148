"""Rows of unlike length read in one list without padding: each gives what transformers gives for its tokens alone."""

from __future__ import annotations

import pytest
import torch

from softprompt.base import ragged
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY
from softprompt.base.ragged import can_read_ragged
from softprompt.inference import prefill as reading
from softprompt.inference.compiled import TextPrompt, compile_prompt
from softprompt.inference.prefill import Prefilled, PrefillRow, like_lengths, prefill_groups
from softprompt.inference.request import request
from softprompt.inference.running_batch import Running
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import tiny_model, tiny_tokenizer

READ_SO = [
    "Llama",
    "GPT-2",
    "Qwen3",
    "Gemma",
    "SmolLM3",
    "Granite",
    "Mixtral (experts)",
    "Qwen3-MoE (experts)",
]
NOT_SO = [
    "DeepSeek-V3 (latent heads, experts)",
    "BLOOM (ALiBi)",
    "MPT (ALiBi)",
    "Mistral (sliding window)",
    "Gemma 2 (sliding window)",
    "GPT-Neo (local attention)",
]
LENGTHS = [3, 4, 5, 40, 41, 90]


def base(architecture: str, dtype: torch.dtype = torch.float32) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture).to(dtype), tiny_tokenizer(), "tiny")


def marks(length: int) -> tuple[int, ...]:
    return tuple(3 + (7 * place + length) % 300 for place in range(length))


def read(lm: FrozenLM, rows: list[PrefillRow]) -> list[Prefilled]:
    groups = like_lengths(lm, rows)
    assert len(groups) > 1
    with torch.inference_mode():
        return prefill_groups(lm, groups)


@pytest.mark.parametrize("architecture", READ_SO)
def test_each_row_has_the_logits_and_the_cache_that_transformers_gives_it_alone(architecture: str) -> None:
    lm = base(architecture)
    assert can_read_ragged(lm)
    done = read(lm, [PrefillRow(EMPTY, marks(length)) for length in LENGTHS])
    assert [len(row.marks) for each in done for row in each.rows] == LENGTHS
    for each in done:
        for b, row in enumerate(each.rows):
            with torch.no_grad():
                alone = lm.model(torch.tensor([row.marks]), use_cache=True)
            logits = lm.logits(each.hidden_BTD[b, : row.rest])
            assert torch.allclose(logits, alone.logits[0], atol=2e-4)
            start, end = each.span(b)
            for mine, theirs in zip(each.cache.layers, alone.past_key_values.layers, strict=True):
                assert torch.allclose(mine.keys[b, :, start:end], theirs.keys[0], atol=1e-5)
                assert torch.allclose(mine.values[b, :, start:end], theirs.values[0], atol=1e-5)


@pytest.mark.parametrize("architecture", NOT_SO)
def test_a_base_that_counts_columns_or_looks_at_some_only_is_read_in_rectangles(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = base(architecture)
    assert not can_read_ragged(lm)
    monkeypatch.setattr(reading, "hidden_ragged", None)  # would fail if it were called
    read(lm, [PrefillRow(EMPTY, marks(length)) for length in LENGTHS])


@pytest.mark.parametrize("short", [0, ragged.SHORT])
def test_prompts_of_every_kind_side_by_side_give_transformers_own_next_logits(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A soft prompt's vectors, read and known, a text prompt that is held once, and texts without a prompt; with scores held
    and without."""
    monkeypatch.setattr(ragged, "SHORT", short)
    lm = FrozenLM.wrap(tiny_model("Llama", max_position_embeddings=512), tiny_tokenizer(), "tiny")
    vectors = torch.randn(6, lm.width, generator=torch.Generator().manual_seed(0))
    soft = SoftPrompt(vectors, lm.fingerprint, "{soft:6}{text}")
    long = compile_prompt(lm, TextPrompt("I want you to act as a logistician. " * 12))
    prompts = [compile_prompt(lm, None), compile_prompt(lm, soft), long]
    running = Running(lm, max_rows=16)
    settings = DecodeSettings(max_new_tokens=3, ignore_end=True, log_probabilities=True)
    texts = ["a", "The quick brown fox", "Tweet: my order never came and nobody answers! " * 5]
    requests = [request(lm, prompt, text, settings) for prompt in prompts for text in texts]
    requests.append(
        request(lm, prompts[1], texts[1], settings, row=PrefillRow(EMPTY, requests[4].row.marks, vectors))
    )
    assert sum(row.row.shared.length > 0 for row in requests) == 3
    assert len(like_lengths(lm, [row.row for row in requests])) > 1
    running.admit(requests)
    while len(running):
        running.step()
    for row in requests:
        ids_T = torch.tensor([max(mark, 0) for mark in row.row.marks])
        embeddings_TD = lm.embed(ids_T)
        for place, mark in enumerate(row.row.marks):
            if mark < 0:
                embeddings_TD[place] = vectors[-1 - mark]
        whole_1TD = torch.cat([embeddings_TD, lm.embed(torch.tensor(row.token_ids))])[None]
        with torch.no_grad():
            logits_TV = lm.model(inputs_embeds=whole_1TD).logits[0]
        next_TV = logits_TV[len(row.row.marks) - 1 : -1].log_softmax(-1)
        assert row.token_ids == next_TV.argmax(-1).tolist()
        rated = next_TV.gather(1, torch.tensor(row.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(row.log_probabilities), rated, atol=1e-4)


def test_a_pass_holds_no_more_positions_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = base("Llama")
    sizes: list[int] = []
    plain = reading.hidden_ragged

    def counted(lm: FrozenLM, embeddings_1ND: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(embeddings_1ND.shape[1])
        return plain(lm, embeddings_1ND, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "hidden_ragged", counted)
    monkeypatch.setattr(reading, "PASS_POSITIONS", 100)
    done = read(lm, [PrefillRow(EMPTY, marks(length)) for length in LENGTHS])
    assert sizes == [3 + 4 + 5 + 40 + 41, 90]
    assert sum(len(each.rows) for each in done) == len(LENGTHS)


def test_in_bfloat16_each_row_is_as_near_to_float32_as_when_it_is_read_alone() -> None:
    exact, lm = base("Llama"), base("Llama", torch.bfloat16)
    exact.model.load_state_dict(lm.model.float().state_dict())
    lm = FrozenLM.wrap(lm.model.to(torch.bfloat16), tiny_tokenizer(), "tiny")
    for each in read(lm, [PrefillRow(EMPTY, marks(length)) for length in LENGTHS]):
        for b, row in enumerate(each.rows):
            ids = torch.tensor([row.marks])
            with torch.no_grad():
                wanted = exact.model(ids).logits[0]
                alone = (lm.model(ids).logits[0].float() - wanted).abs().max()
            mine = (lm.logits(each.hidden_BTD[b, : row.rest]).float() - wanted).abs().max()
            assert mine <= 2 * alone + 0.02
