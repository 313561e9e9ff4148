"""The body that packs rows, against transformers' own body through `FrozenLM.token_nll`: loss and prompt gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.hardware import has_int8_products
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.loss import body, packed_body
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Loss
from softprompt.loss.kernels import grouped_attention, llama_layer, workspace
from softprompt.loss.kernels.linear import Int8Linear
from softprompt.loss.packed_body import PackedBody
from softprompt.prompt.soft_prompt import Plain
from tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = ["Llama", "Mistral (sliding window)", "Qwen2", "Qwen2 (sliding window)", "Qwen3"]
SOFT = 4


def encoded(before: range, soft: int, after: range, trained: int) -> Encoded:
    """Text, virtual tokens, text; the last `trained` tokens are learned."""
    length = len(before) + soft + len(after)
    return Encoded(
        [*before, *[0] * soft, *after],
        [*[-1] * len(before), *range(soft), *[-1] * len(after)],
        [index >= length - trained for index in range(length)],
        0,
        0,
    )


NONE = range(0)
LAYOUTS = {
    "prompt in front, all text": [
        encoded(NONE, SOFT, range(20, 34), 14),
        encoded(NONE, SOFT, range(60, 67), 7),
        encoded(NONE, SOFT, range(90, 115), 25),
    ],
    "prompt in front, labels": [
        encoded(NONE, SOFT, range(20, 44), 2),
        encoded(NONE, SOFT, range(60, 67), 1),
        encoded(NONE, SOFT, range(90, 100), 3),
    ],
    "a common text after the prompt": [
        encoded(NONE, SOFT, range(20, 44), 2),
        encoded(NONE, SOFT, range(20, 30), 1),
        encoded(NONE, SOFT, range(20, 27), 7),
    ],
    "prompt after text of three lengths": [
        encoded(range(20, 32), SOFT, range(90, 94), 4),
        encoded(range(40, 60), SOFT, range(95, 96), 1),
        encoded(range(20, 32), SOFT, range(70, 77), 5),
    ],
    "short text before the prompt": [
        encoded(range(20, 23), SOFT, range(90, 104), 4),
        encoded(range(40, 42), SOFT, range(95, 99), 1),
    ],
    "one row": [encoded(NONE, SOFT, range(20, 40), 5)],
    "equal rows of equal length": [encoded(NONE, SOFT, range(20, 40), 2)] * 3,
    "a row with nothing to learn": [
        encoded(NONE, SOFT, range(20, 40), 0),
        encoded(NONE, SOFT, range(20, 30), 1),
    ],
}


def without_slot(row: Encoded) -> Encoded:
    text = [index for index, soft in enumerate(row.soft) if soft < 0]
    trained = [row.trained[index] for index in text]
    return Encoded([row.ids[index] for index in text], [-1] * len(text), trained, 0, 0)


def prompt_for(lm: FrozenLM, deep: bool) -> Plain:
    drawn = torch.Generator().manual_seed(3)
    if deep:
        shape = (lm.num_layers, SOFT, lm.fingerprint.kv_heads, lm.fingerprint.head_width)
        return tuple(torch.randn(shape, generator=drawn).requires_grad_() for _ in range(2))
    vectors_PD = torch.randn(SOFT, lm.width, generator=drawn) * lm.embedding_VD.float().std()
    return (vectors_PD.requires_grad_(),)


def learned(loss: Loss, rows: list[Encoded], prompt: Plain) -> tuple[Tensor, tuple[Tensor, ...]]:
    nll_N = loss(collate(rows), prompt)
    weights_N = torch.linspace(0.5, 2.0, len(nll_N))
    return nll_N.detach(), torch.autograd.grad((nll_N * weights_N).sum(), prompt)


def assert_like_transformers(lm: FrozenLM, loss: FastLoss, rows: list[Encoded], deep: bool) -> None:
    assert isinstance(loss.body, PackedBody)
    if deep:
        rows = [without_slot(row) for row in rows]
    prompt = prompt_for(lm, deep)
    (ours_N, ours), (theirs_N, theirs) = learned(loss, rows, prompt), learned(lm.token_nll, rows, prompt)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-5, atol=1e-5)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(loss(collate(rows), prompt), theirs_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True], ids=["soft", "deep"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_transformers(architecture: str, layout: str, deep: bool) -> None:
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)
    assert_like_transformers(lm, FastLoss(lm), LAYOUTS[layout], deep)


@pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with int8 dot products")
@pytest.mark.parametrize("deep", [False, True], ids=["soft", "deep"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_in_int8_they_are_near_those_of_transformers(
    architecture: str, layout: str, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "MIN_WEIGHTS", 1)
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)
    rows = [without_slot(row) for row in LAYOUTS[layout]] if deep else LAYOUTS[layout]
    loss = FastLoss(lm, int8_products=True)
    prompt = prompt_for(lm, deep)
    (ours_N, ours), (theirs_N, theirs) = learned(loss, rows, prompt), learned(lm.token_nll, rows, prompt)
    assert not torch.equal(ours_N, theirs_N)
    torch.testing.assert_close(ours_N, theirs_N, rtol=0.02, atol=0.05)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        alike = torch.cosine_similarity(our_gradient.flatten(), their_gradient.flatten(), dim=0)
        assert float(alike) > 0.97
    with torch.inference_mode():  # a loss without a gradient is the base's own
        torch.testing.assert_close(loss(collate(rows), prompt), theirs_N, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with int8 dot products")
def test_long_rows_use_the_same_int8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MIN_WEIGHTS", 1)
    coded = body.learning_body(tiny_model("Llama").model, "int8")
    assert isinstance(coded, PackedBody)
    assert coded.layers[0].query is coded.body.layers[0].self_attn.q_proj.linear
    assert isinstance(coded.layers[0].down, Int8Linear)


@pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with int8 dot products")
def test_a_body_whose_packed_rows_were_refused_is_not_packed_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(llama_layer, "swiglu", lambda gate_MF, up_MF: gate_MF * up_MF)
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    loss = FastLoss(lm, int8_products=True)
    loss.prepare()
    assert not isinstance(loss.body, PackedBody)
    monkeypatch.delattr(PackedBody, "states_at")
    rows, prompt = LAYOUTS["one row"], prompt_for(lm, deep=False)
    (ours_N, _), (theirs_N, _) = learned(loss, rows, prompt), learned(lm.token_nll, rows, prompt)
    torch.testing.assert_close(ours_N, theirs_N, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("deep", [False, True], ids=["soft", "deep"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_are_they_in_small_chunks_and_with_recomputed_layers(
    layout: str, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "NUMBERS_AT_ONCE", 100)
    monkeypatch.setattr(grouped_attention, "SCORES_AT_ONCE", 700)
    monkeypatch.setattr(grouped_attention, "QUERIES_AT_ONCE", 3)  # stretches that see fewer columns each
    monkeypatch.setattr(grouped_attention, "COLUMNS_ALIGNED", 4)
    lm = FrozenLM.wrap(tiny_model("Qwen3"), tiny_tokenizer())
    assert_like_transformers(lm, FastLoss(lm, recompute=True), LAYOUTS[layout], deep)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    ids=["biases", "one key/value head", "no groups", "yarn", "linear scaling"],
)
def test_so_are_they_with_biases_other_groups_of_heads_and_scaled_positions(
    changes: dict[str, object],
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama", **changes), tiny_tokenizer())
    assert_like_transformers(lm, FastLoss(lm), LAYOUTS["prompt in front, labels"], False)
    assert_like_transformers(lm, FastLoss(lm), LAYOUTS["prompt in front, all text"], True)


def test_rows_too_long_for_whole_score_matrices_take_the_plain_body(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    FastLoss(lm).prepare()
    monkeypatch.setattr(packed_body, "MOST_SCORES", 10)
    monkeypatch.setattr(PackedBody, "states_at", lambda *given: pytest.fail("packed"))
    for recompute in (False, True):
        loss = FastLoss(lm, recompute=recompute)
        assert_like_transformers(lm, loss, LAYOUTS["prompt in front, labels"], False)


@pytest.mark.parametrize("deep", [False, True], ids=["soft", "deep"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers(architecture: str, deep: bool) -> None:
    """Mean error over six models of the loss and of the gradient, against the same bfloat16 weights in float32."""
    rows = LAYOUTS["prompt in front, all text"]
    rows = [without_slot(row) for row in rows] if deep else rows
    errors = torch.zeros(2, 2)
    for seed in range(6):
        model = tiny_model(architecture, seed=seed).to(torch.bfloat16)
        half = FrozenLM.wrap(model, tiny_tokenizer())
        whole = FrozenLM.wrap(copy.deepcopy(model).float(), tiny_tokenizer())
        true_N, true = learned(whole.token_nll, rows, prompt_for(whole, deep))
        for arm, loss in enumerate((FastLoss(half), half.token_nll)):
            nll_N, gradient = learned(loss, rows, prompt_for(half, deep))
            errors[arm, 0] += distance(nll_N, true_N)
            errors[arm, 1] += distance(flat(gradient), flat(true))
    ours, theirs = errors
    assert bool((ours < 1.1 * theirs).all()), errors


def flat(gradient: Plain) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in gradient])


def distance(tensor: Tensor, reference: Tensor) -> float:
    return float((tensor.float() - reference).norm() / reference.norm())


def test_a_common_beginning_is_read_once_and_padding_never() -> None:
    batch = collate(LAYOUTS["a common text after the prompt"])
    wanted_BS = torch.nn.functional.pad(batch.trained_BS[:, 1:], (0, 1))
    packing = packed_body.packed(batch, wanted_BS, share=True)
    # The third row learns the token after the slot, so that the slot's last state is read: three are shared.
    assert packing.shared == SOFT - 1
    assert len(packing.source_N) == 3 + sum(len(row) - 3 for row in LAYOUTS["a common text after the prompt"])


def test_a_packed_body_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    monkeypatch.setattr(llama_layer, "swiglu", lambda gate_MF, up_MF: gate_MF * up_MF)
    assert not isinstance(FastLoss(lm).body, PackedBody)
