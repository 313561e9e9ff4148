"""Weights that are packed once: the same products, less time, and a base that nobody changed."""

from __future__ import annotations

import pytest
import torch

from softprompt.base import packed_weights
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.packed_weights import PackedLinear, logits, pack_weights, packed_body
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.serving.local_engine import LocalEngine
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox", "Tweet: my order never came", "I want you", "a"]
OFFERED = packed_weights.packing_is_offered()
needs_packing = pytest.mark.skipif(not OFFERED, reason="this torch packs no bfloat16 weights on this CPU")


def base(architecture: str = "Llama", dtype: torch.dtype = torch.bfloat16) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture).to(dtype), tiny_tokenizer(), "tiny")


@needs_packing
@pytest.mark.parametrize(
    "architecture", ["Llama", "OPT", "Cohere", "Gemma 2 (sliding window)", "Mixtral (experts)"]
)
def test_logits_of_packed_weights_are_transformers_own(architecture: str) -> None:
    """Biases, a scaled head, a capped head, and layers that are no nn.Linear among them."""
    lm = base(architecture)
    before = lm.weights_sha256()
    assert pack_weights(lm)
    body = packed_body(lm, lm.body)
    assert any(isinstance(module, PackedLinear) for module in body.modules())
    assert not any(isinstance(module, PackedLinear) for module in lm.model.modules())
    for rows, length in ((1, 1), (3, 5), (8, 20)):
        ids_BT = (torch.arange(rows * length) * 7 % lm.vocab_size).view(rows, length)
        with torch.no_grad():
            wanted = lm.model(ids_BT).logits.float()
            found = logits(lm, body(inputs_embeds=lm.embed(ids_BT))[0]).float()
        assert torch.allclose(found, wanted, atol=0.05, rtol=0.02)
    assert lm.weights_sha256() == before


@needs_packing
def test_a_server_packs_its_base_and_answers_what_the_base_answers_unpacked() -> None:
    settings = DecodeSettings(max_new_tokens=12, ignore_end=True)
    wanted = [row.token_ids for row in generate(base(), TEXTS, None, settings)]
    lm = base()
    LocalEngine(lm)
    assert any(isinstance(module, PackedLinear) for module in packed_body(lm, lm.body).modules())
    assert [row.token_ids for row in generate(lm, TEXTS, None, settings)] == wanted


def test_what_cannot_or_must_not_be_packed_is_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds_otherwise = base(dtype=torch.float32)
    assert not pack_weights(rounds_otherwise)
    assert packed_body(rounds_otherwise, rounds_otherwise.body) is rounds_otherwise.body
    lm = base()
    size = sum(weight.nbytes for weight in lm.model.parameters())
    monkeypatch.setattr(packed_weights, "free_memory_bytes", lambda device: 2 * size)
    assert not pack_weights(lm)
    assert packed_body(lm, lm.body) is lm.body


@needs_packing
def test_a_product_that_is_another_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packed_weights._product
    monkeypatch.setattr(packed_weights, "_product", lambda *given: 1.1 * plain(*given))
    lm = base()
    assert not pack_weights(lm)
    assert packed_body(lm, lm.body) is lm.body
