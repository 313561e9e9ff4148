"""What a GPU computes, against the CPU in float32. Skipped where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import Head, dense
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import score
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients
from softprompt.loss.kernels.cut_head import CutHead
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.engine import Finished, Work
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import load_prompt
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from test_learn import SPLITS, learn, recipe
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def lm_on(device: str, dtype: torch.dtype = torch.float32) -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama").to(device, dtype), tiny_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_loss_and_gradient_are_those_of_the_cpu(tmp_path: Path, kind: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        plan = make_plan(recipe(tmp_path / device, f"prompt.kind={kind}"), lm=lm_on(device), splits=SPLITS)
        form = start(plan)
        (nll,) = Gradients(FastLoss(plan.lm), 5)([form], [plan.train.encoded])
        found.append((nll, [parameter.grad for parameter in form.parameters()]))
    (ours, slopes), (theirs, wanted) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    for slope, other in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-6)


def test_a_prompt_learned_there_is_that_of_the_cpu_and_fits_either(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        learn(tmp_path / device, "tune.epochs=2", lm=lm_on(device))
    found = load_prompt(tmp_path / "cuda", base=lm_on("cpu").fingerprint)
    torch.testing.assert_close(found.plain[0], load_prompt(tmp_path / "cpu").plain[0], rtol=1e-3, atol=1e-4)


def test_generated_scored_and_served_text_is_that_of_the_cpu() -> None:
    here, there = lm_on("cpu"), lm_on("cuda")
    drawn = torch.Generator().manual_seed(5)
    vectors_PD = 0.3 * torch.randn(4, here.width, generator=drawn)
    prompt = SoftPrompt(vectors_PD, here.fingerprint, "{soft:4}{text}", name="drawn")
    texts = ["a", "Tweet: my order never came", "The quick"]
    settings = DecodeSettings(max_new_tokens=8, ignore_end=True)
    wanted = [answer.token_ids for answer in generate(here, texts, prompt, settings)]
    assert [answer.token_ids for answer in generate(there, texts, prompt, settings)] == wanted
    ours, theirs = (score(lm, texts, " never came", prompt) for lm in (there, here))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_log_probabilities == pytest.approx(other.token_log_probabilities, abs=1e-4)

    async def served() -> list[tuple[int, ...]]:
        with LocalEngine(there) as engine:
            engine.load(prompt, "digest")

            async def ask(text: str) -> tuple[int, ...]:
                answers = [answer async for answer in engine.submit(Work("digest", text, settings))]
                assert isinstance(answers[-1], Finished)
                return answers[-1].token_ids

            return list(await asyncio.gather(*map(ask, texts)))

    assert asyncio.run(served()) == wanted


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cut_cross_entropy_gives_the_plain_roads_loss_and_gradient_without_its_logits(
    softcap: float | None,
) -> None:
    pytest.importorskip("cut_cross_entropy", reason="needs cut-cross-entropy, an optional package")
    tokens, vocabulary, width = 1024, 50_000, 512
    weight_VD = torch.randn(vocabulary, width, device="cuda").bfloat16() / width**0.5
    hidden_ND = torch.randn(tokens, width, device="cuda").bfloat16()
    targets_N = torch.randint(0, vocabulary, (tokens,), device="cuda")
    head = Head(weight_VD, softcap=softcap)
    wanted_N, wanted_ND = dense(hidden_ND, targets_N, head, True)
    CutHead(head)(hidden_ND, targets_N, head, True)  # its kernels are compiled
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found_N, found_ND = CutHead(head)(hidden_ND, targets_N, head, True)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < tokens * vocabulary * 2 / 4  # a quarter of the logits in bfloat16
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-2, atol=1e-2)
    assert found_ND is not None
    assert wanted_ND is not None
    assert float((found_ND - wanted_ND).norm() / wanted_ND.norm()) < 0.05
