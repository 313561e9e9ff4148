"""The body as learning runs it, against the body as transformers made it: loss and prompt gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from softprompt.base import hardware as rates
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded
from softprompt.loss import body as learning_body
from softprompt.loss import fast
from softprompt.loss.fast import FastLoss
from softprompt.loss.kernels.attention import fused_attention
from softprompt.loss.kernels.gelu import SmallGelu
from tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = [
    "BLOOM (ALiBi)",
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "Llama",
    "Mistral (sliding window)",
    "Qwen2",
    "Qwen2 (sliding window)",
    "Qwen3",
    "Gemma 2 (sliding window)",
    "Gemma 3 (sliding window)",
    "Cohere",
    "Granite",
    "Phi-3 (sliding window)",
    "Falcon (ALiBi)",
]


def batch() -> Batch:
    """Rows of three lengths with four virtual tokens; of the last only the end counts."""
    rows = [
        Encoded([0] * 4 + list(ids), [*range(4), *[-1] * len(ids)], [False] * 4 + trained, 0, 0)
        for ids, trained in (
            (range(20, 34), [True] * 14),
            (range(60, 67), [True] * 7),
            (range(90, 100), [False] * 8 + [True] * 2),
        )
    ]
    return collate(rows)


def learned(lm: FrozenLM, body: object) -> tuple[Tensor, Tensor]:
    """Loss of each token and gradient of their sum at the prompt, through `body`."""
    drawn = torch.Generator().manual_seed(3)
    prompt_PD = (torch.randn(4, lm.width, generator=drawn) * lm.embedding_VD.float().std()).requires_grad_()
    loss = FastLoss(lm)
    vars(loss)["body"] = body
    nll_N = loss(batch(), (prompt_PD,))
    (gradient_PD,) = torch.autograd.grad(nll_N.sum(), prompt_PD)
    return nll_N.detach(), gradient_PD


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_the_bloom_twin_is_another_body_with_the_same_weights_and_the_model_stays_as_it_was() -> None:
    model = tiny_model("BLOOM (ALiBi)")
    lm = FrozenLM.wrap(model, tiny_tokenizer())
    before = [type(module) for module in model.modules()], lm.weights_sha256()
    twin = FastLoss(lm).body
    assert twin is not lm.body
    theirs = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in twin.parameters()} <= theirs
    learned(lm, twin)
    assert ([type(module) for module in model.modules()], lm.weights_sha256()) == before
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_prompt_gradient_are_equal_in_float32(architecture: str) -> None:
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)
    twin = learning_body.learning_body(lm.body)
    (ours_N, our_slope), (theirs_N, their_slope) = learned(lm, twin), learned(lm, lm.body)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [True, False], ids=["products in float32", "products in bfloat16"])
@pytest.mark.parametrize("architecture", ["BLOOM (ALiBi)", "Llama", "OPT"])
def test_in_bfloat16_the_twin_is_as_near_to_float32_as_transformers_itself(
    architecture: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "float32_is_faster", lambda than: wide)
    monkeypatch.setattr(learning_body, "MIN_WEIGHTS", 1)
    whole = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)
    true_N, true_slope = learned(whole, whole.body)
    half = FrozenLM.wrap(tiny_model(architecture).to(torch.bfloat16), tiny_tokenizer(), architecture)
    twin = learning_body.learning_body(half.body)
    ours_N, our_slope = learned(half, twin)
    theirs_N, their_slope = learned(half, half.body)
    assert apart(ours_N, true_N) < 1.5 * apart(theirs_N, true_N) + 2**-9
    assert apart(our_slope, true_slope) < 1.5 * apart(their_slope, true_slope) + 2**-9


@pytest.mark.skipif(not rates.has_int8_products(), reason="needs a CPU with int8 dot products")
@pytest.mark.parametrize("architecture", ["BLOOM (ALiBi)", "Llama", "OPT"])
def test_int8_products_leave_the_loss_and_the_direction_of_its_gradient(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_body, "MIN_WEIGHTS", 1)
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)
    ours_N, our_slope = learned(lm, learning_body.learning_body(lm.body, "int8"))
    theirs_N, their_slope = learned(lm, lm.body)
    assert apart(ours_N, theirs_N) < 0.02
    assert float(torch.cosine_similarity(our_slope.flatten(), their_slope.flatten(), dim=0)) > 0.98


def test_a_twin_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    other = FrozenLM.wrap(tiny_model("Llama", seed=1), tiny_tokenizer())
    monkeypatch.setattr(fast, "learning_body", lambda body: other.body)
    assert FastLoss(lm).body is lm.body


@pytest.mark.parametrize("length", [1, 5, 40])
def test_fused_attention_is_torchs_attention_with_its_gradient(length: int) -> None:
    drawn = torch.Generator().manual_seed(4)
    rows, heads, width = 3, 4, 8
    fused = torch.randn(rows, length, heads * 3 * width, generator=drawn).requires_grad_()
    bias = torch.randn(rows, heads, length, length, generator=drawn)
    query, key, value = fused.view(rows, length, heads, 3, width).permute(3, 0, 2, 1, 4)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3)
    theirs = theirs.transpose(1, 2).reshape(rows, length, heads * width)
    ours = fused_attention(fused, bias, heads, 0.3)
    upstream = torch.randn(ours.shape, generator=drawn)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(found, fused, upstream)[0] for found in (ours, theirs)), rtol=1e-4, atol=1e-5
    )


def test_the_small_gelu_is_torchs_with_its_slope() -> None:
    inputs = torch.linspace(-12, 12, 3 * 70_001, dtype=torch.float32).view(3, -1).requires_grad_()
    theirs = torch.nn.functional.gelu(inputs, approximate="tanh")
    ours = SmallGelu()(inputs)
    upstream = torch.linspace(0.5, 2, inputs.numel()).view(inputs.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(found, inputs, upstream)[0] for found in (ours, theirs)), rtol=1e-5, atol=2e-6
    )


def test_the_arithmetic_chosen_once_is_kept_for_runs_that_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = rates.measure_float32_is_faster(torch.bfloat16)
    monkeypatch.setattr(rates, "measure_float32_is_faster", lambda than: measured)
    rates.float32_is_faster.cache_clear()
    assert rates.float32_is_faster(torch.bfloat16) is measured
    monkeypatch.setattr(rates, "measure_float32_is_faster", lambda than: not measured)  # as on a busy machine
    rates.float32_is_faster.cache_clear()
    assert rates.float32_is_faster(torch.bfloat16) is measured
    (tmp_path / "softprompt" / "rates.json").write_text("damaged")
    rates.float32_is_faster.cache_clear()
    assert rates.float32_is_faster(torch.bfloat16) is not measured
    rates.float32_is_faster.cache_clear()


@pytest.mark.parametrize("architecture", ["Llama", "Mistral (sliding window)", "Qwen2", "Qwen3"])
def test_the_norm_of_gpus_gives_transformers_own_values_and_gradient(architecture: str) -> None:
    """It is exchanged there alone; it computes anywhere."""
    norms = [
        module for module in tiny_model(architecture).modules() if type(module) in learning_body.RMS_NORMS
    ]
    assert norms
    for norm in norms:
        drawn = torch.Generator().manual_seed(7)
        hidden = 1e-3 * torch.randn(2, 5, len(norm.weight), generator=drawn)  # so that epsilon counts
        found = []
        for each in (norm, learning_body.FusedNorm(norm)):
            leaf = hidden.clone().requires_grad_()
            normed = each(leaf)
            (slope,) = torch.autograd.grad((normed**3).sum(), leaf)
            found.append((normed.detach(), slope))
        (theirs, wanted), (ours, slope) = found
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4)
