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
from softprompt.tuning.optim import orthogonalised
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from test_graphed_body import ARCHITECTURES, batch, prompt_for, slopes_of
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


@pytest.mark.parametrize("kind", ["soft", "context", "deep"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_replayed_as_cuda_graphs_give_the_loss_and_gradient_of_the_cpu(
    architecture: str, kind: str
) -> None:
    here, there = (
        FrozenLM.wrap(tiny_model(architecture).to(device), tiny_tokenizer(), name="tiny")
        for device in ("cpu", "cuda")
    )
    loss = FastLoss(there)
    for lengths in ([9, 7, 12], [12, 12, 12], [8, 10, 11], [30, 9]):
        prompt, rows = prompt_for(here, kind), batch(lengths, kind)
        ours, theirs = loss(rows, prompt), here.token_nll(rows, prompt)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
        for mine, other in zip(slopes_of(ours, prompt), slopes_of(theirs, prompt), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert loss.graphed_body is not None
    assert loss.graphed_body.number == 2  # every shape was recorded, and gave what the plain pass gives


def test_two_losses_before_their_gradient_do_not_overwrite_each_other() -> None:
    here, there = lm_on("cpu"), lm_on("cuda")
    loss, prompt = FastLoss(there), prompt_for(here, "soft")
    first, second = batch([9, 7], "soft"), batch([11, 6], "soft")
    together = loss(first, prompt).sum() + loss(second, prompt).sum()
    wanted = here.token_nll(first, prompt).sum() + here.token_nll(second, prompt).sum()
    torch.testing.assert_close(slopes_of(together, prompt), slopes_of(wanted, prompt), rtol=1e-3, atol=1e-4)


def test_experts_that_cannot_be_recorded_are_read_plainly() -> None:
    """Routing asks the GPU for numbers half-way; whatever becomes of the recording, the loss is right."""
    here, there = (
        FrozenLM.wrap(tiny_model("Qwen2-MoE (experts)").to(device), tiny_tokenizer(), name="tiny")
        for device in ("cpu", "cuda")
    )
    loss = FastLoss(there)
    for _ in range(2):
        prompt, rows = prompt_for(here, "soft"), batch([9, 7], "soft")
        torch.testing.assert_close(
            loss(rows, prompt).cpu(), here.token_nll(rows, prompt), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_bfloat16_learns_there_what_float32_learns_here(tmp_path: Path, kind: str) -> None:
    ours = learn(tmp_path / "cuda", f"prompt.kind={kind}", lm=lm_on("cuda", torch.bfloat16))
    theirs = learn(tmp_path / "cpu", f"prompt.kind={kind}", lm=lm_on("cpu"))
    assert ours.nll_after == pytest.approx(theirs.nll_after, rel=0.05)
    assert ours.nll_after < 0.9 * ours.nll_before


def test_steps_of_a_deep_prompt_are_orthogonal_as_on_the_cpu() -> None:
    drawn = torch.Generator().manual_seed(4)
    ahead = torch.randn(6, 32, generator=drawn)
    ours = orthogonalised(ahead.cuda(), parts=4).cpu()
    torch.testing.assert_close(ours, orthogonalised(ahead, parts=4), rtol=1e-4, atol=1e-4)


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
    cut = CutHead(head, most_plain=0)
    cut(hidden_ND, targets_N, head, True)  # its kernels are compiled
    assert cut.agrees
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found_N, found_ND = cut(hidden_ND, targets_N, head, True)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < tokens * vocabulary * 2 / 4  # a quarter of the logits in bfloat16
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-2, atol=1e-2)
    assert found_ND is not None
    assert wanted_ND is not None
    assert float((found_ND - wanted_ND).norm() / wanted_ND.norm()) < 0.05
