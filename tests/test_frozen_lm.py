"""The frozen base and its loss, against transformers' own."""

from __future__ import annotations

import inspect

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded
from softprompt.errors import BaseError, PromptError
from tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = [
    "BLOOM (ALiBi)",
    "GPT-2",
    "OPT",
    "Llama",
    "Gemma 2 (sliding window)",
    "Gemma 3 (sliding window)",
    "Cohere",
    "Granite",
    "Phi-3 (sliding window)",
]


def text_row(ids: list[int], first_trained: int, soft: int = 0) -> Encoded:
    """`soft` virtual positions, then `ids`, trained from the text's position `first_trained` on."""
    return Encoded(
        ids=[0] * soft + ids,
        soft=[*range(soft), *([-1] * len(ids))],
        trained=[False] * (soft + first_trained) + [True] * (len(ids) - first_trained),
        row=0,
        text_bytes=0,
    )


def theirs(lm: FrozenLM, ids: list[int], first_trained: int) -> torch.Tensor:
    """Sum of transformers' own loss over the tokens from `first_trained` on."""
    labels = torch.tensor([[-100] * first_trained + ids[first_trained:]])
    loss = lm.model(input_ids=torch.tensor([ids]), labels=labels).loss
    return loss * (len(ids) - first_trained)


@pytest.fixture(params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(request.param), tiny_tokenizer(), request.param)


def test_a_prompt_of_real_token_embeddings_scores_as_those_tokens_do(lm: FrozenLM) -> None:
    ids = [7, 9, 30, 41, 5, 88, 17]
    prompt_PD = lm.embed(torch.tensor(ids[:2])).clone()
    nll, tokens = lm.nll(collate([text_row(ids[2:], 0, soft=2)]), (prompt_PD,))
    assert tokens == 5
    torch.testing.assert_close(nll, theirs(lm, ids, 2), rtol=1e-5, atol=1e-5)


def test_a_slot_in_the_middle_scores_as_the_tokens_it_was_made_of(lm: FrozenLM) -> None:
    ids = [30, 41, 7, 9, 5, 88, 17]
    row = Encoded([30, 41, 0, 0, 5, 88, 17], [-1, -1, 0, 1, -1, -1, -1], [False] * 4 + [True] * 3, 0, 0)
    nll, _ = lm.nll(collate([row]), (lm.embed(torch.tensor([7, 9])).clone(),))
    torch.testing.assert_close(nll, theirs(lm, ids, 4), rtol=1e-5, atol=1e-5)


def test_padding_and_neighbours_do_not_change_a_rows_loss(lm: FrozenLM) -> None:
    prompt_PD = torch.randn(3, lm.width, generator=torch.Generator().manual_seed(0))
    rows = [text_row(list(range(20, 20 + length)), 1, soft=3) for length in (4, 11, 7)]
    alone = torch.stack([lm.nll(collate([row]), (prompt_PD,))[0] for row in rows])
    together = lm.token_nll(collate(rows), (prompt_PD,))
    counts = [row.trained_tokens for row in rows]
    torch.testing.assert_close(
        torch.stack([part.sum() for part in together.split(counts)]), alone, rtol=1e-5, atol=1e-5
    )


def test_the_prompts_gradient_is_that_of_transformers_own_loss(lm: FrozenLM) -> None:
    rows = [text_row([30, 41, 5, 88, 17], 1, soft=4), text_row([60, 2, 9], 0, soft=4)]
    batch = collate(rows)
    prompt_PD = torch.randn(4, lm.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    nll, _ = lm.nll(batch, (prompt_PD,))
    (ours_PD,) = torch.autograd.grad(nll, prompt_PD)

    twin_PD = prompt_PD.detach().clone().requires_grad_()
    total = torch.zeros(())
    for row in rows:
        text_TD = lm.embed(torch.tensor(row.ids[4:]))
        labels = torch.tensor([[i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)]])
        loss = lm.model(inputs_embeds=torch.cat([twin_PD, text_TD])[None], labels=labels).loss
        total = total + loss * row.trained_tokens
    (theirs_PD,) = torch.autograd.grad(total, twin_PD)
    torch.testing.assert_close(nll, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_PD, theirs_PD, rtol=1e-4, atol=1e-5)


def test_no_weight_gets_a_gradient_and_every_weight_stays() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    before = lm.weights_sha256()
    prompt_PD = torch.randn(2, lm.width).requires_grad_()
    lm.nll(collate([text_row([5, 6, 7], 0, soft=2)]), (prompt_PD,))[0].backward()
    assert prompt_PD.grad is not None
    assert float(prompt_PD.grad.norm()) > 0
    assert all(weight.grad is None for weight in lm.model.parameters())
    assert lm.weights_sha256() == before


def test_one_changed_weight_changes_the_digest_of_all_weights() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    before = lm.weights_sha256()
    with torch.no_grad():
        next(lm.model.parameters()).view(-1)[3] += 1e-6
    assert lm.weights_sha256() != before


def test_the_fingerprint_is_the_same_in_bfloat16_and_float32_and_differs_for_other_weights() -> None:
    whole = FrozenLM.wrap(tiny_model("BLOOM (ALiBi)"), tiny_tokenizer())
    half = FrozenLM.wrap(tiny_model("BLOOM (ALiBi)").to(torch.bfloat16), tiny_tokenizer())
    other = FrozenLM.wrap(tiny_model("BLOOM (ALiBi)", seed=1), tiny_tokenizer())
    assert whole.fingerprint == half.fingerprint
    assert whole.fingerprint.sha256 != other.fingerprint.sha256
    assert whole.fingerprint.width == other.fingerprint.width


def test_deep_state_before_a_batch_equals_the_tokens_it_was_read_from(lm: FrozenLM) -> None:
    ids = [7, 9, 30, 41, 5, 88, 17]
    with torch.no_grad():
        past = lm.model(input_ids=torch.tensor([ids[:3]]), use_cache=True).past_key_values
    keys, values = (
        torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in past.layers])
        for name in ("keys", "values")
    )
    rows = [text_row(ids[3:], 1), text_row(ids[3:5], 1)]
    nll_N = lm.token_nll(collate(rows), (keys, values))
    torch.testing.assert_close(nll_N[:3].sum(), theirs(lm, ids, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll_N[3:].sum(), theirs(lm, ids[:5], 4), rtol=1e-5, atol=1e-5)


def test_a_batch_and_a_prompt_that_do_not_fit_each_other_are_refused() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    soft: Batch = collate([text_row([5, 6, 7], 0, soft=2)])
    plain = collate([text_row([5, 6, 7], 1)])
    with pytest.raises(PromptError, match="no soft prompt was given"):
        lm.nll(soft)
    with pytest.raises(PromptError, match="no slot"):
        lm.nll(plain, (torch.zeros(2, lm.width),))


def test_what_cannot_be_supported_is_refused_by_name() -> None:
    with pytest.raises(BaseError, match=r"no/such: there is no|not a folder here"):
        FrozenLM.load("no/such")
    with pytest.raises(BaseError, match=r"config\.json"):
        FrozenLM.load(".")
    with pytest.raises(BaseError, match="float16"):
        FrozenLM.load("builtin", dtype="float16", device="cpu")


def test_the_bundled_base_loads_and_says_why_its_dtype_was_chosen() -> None:
    lm = FrozenLM.load("builtin", device="cpu")
    assert lm.name == "builtin"
    assert lm.vocab_size == 8192
    assert "bfloat16" in lm.dtype_reason


def test_from_pretrained_is_load_under_transformers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect.signature(FrozenLM.from_pretrained) == inspect.signature(FrozenLM.load)
    given: dict[str, object] = {}
    wanted = {"revision": "r", "dtype": "d", "device": "v", "trust_remote_code": True, "spread": "layers"}
    monkeypatch.setattr(FrozenLM, "load", lambda name, **options: given.update(options, name=name))
    FrozenLM.from_pretrained("somewhere", **wanted)
    assert given == {"name": "somewhere", **wanted}


def test_a_base_prints_short_and_its_table_is_escaped() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "<b>mine</b>")
    total = sum(weight.numel() for weight in lm.model.parameters())
    assert repr(lm) == (
        f"FrozenLM('<b>mine</b>', {total:,} parameters, 2 layers of width 32, 128 positions, float32 on cpu)"
    )
    table = lm._repr_html_()
    assert "&lt;b&gt;mine&lt;/b&gt;" in table
    assert "<b>" not in table
