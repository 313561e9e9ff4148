"""A base that one process spreads over devices (device_map), with layers on disk in place of a second GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base import frozen_lm
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import Head
from softprompt.base.packed_weights import pack_weights
from softprompt.base.placement import prefix_cache
from softprompt.base.ragged import can_read_ragged
from softprompt.base.split import split_options
from softprompt.data.example import Example
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import TextPrompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import score
from softprompt.loss.fast import FastLoss
from softprompt.loss.packed_body import PackedBody
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.engine import Finished, Work
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import load_prompt
from test_learn import learn
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("accelerate", reason="needs accelerate, an optional package")

# What lies on disk has no numbers in memory (device meta) but while its module computes.
MAPS = {
    "a layer": {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.1": "disk"},
    "the ends": {"model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk", "model.layers.1": "cpu"},
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model("Llama", max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(params=list(MAPS))
def spread(base: str, request: pytest.FixtureRequest) -> FrozenLM:
    placed = {"model.rotary_emb": "cpu", "model.layers.0": "cpu", **MAPS[request.param]}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(frozen_lm, "split_options", lambda spread, name: {"device_map": placed})
        lm = FrozenLM.load(base, dtype="float32", device="cpu", spread="devices")
    assert any(weight.is_meta for weight in lm.model.parameters())
    assert lm.device == torch.device("cpu")
    return lm


@pytest.fixture
def whole(base: str) -> FrozenLM:
    return FrozenLM.load(base, dtype="float32", device="cpu")


def test_the_setting_lets_transformers_place_the_base() -> None:
    assert split_options("devices", "tiny") == {"device_map": "auto"}


def test_a_base_over_devices_has_the_fingerprint_of_the_whole(spread: FrozenLM, whole: FrozenLM) -> None:
    for digest in ("weights_sha256", "sha256", "config", "tokenizer_sha256"):
        assert getattr(spread.fingerprint, digest) == getattr(whole.fingerprint, digest)
    assert spread.weights_sha256() == whole.weights_sha256()
    assert torch.equal(spread.embedding_VD, whole.embedding_VD)
    assert spread.num_parameters == whole.num_parameters
    # Both would read weights past the hooks.
    assert not pack_weights(spread)
    assert not can_read_ragged(spread)


@pytest.mark.parametrize("kind", ["soft", "deep"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_prompt_learned_over_devices_is_that_of_the_whole(
    tmp_path: Path, spread: FrozenLM, whole: FrozenLM, kind: str, recompute: str
) -> None:
    settings = [f"prompt.kind={kind}", f"tune.gradient_checkpointing={recompute}", "tune.epochs=2"]
    assert not isinstance(FastLoss(spread).body, PackedBody)  # which reads the weights where they do not lie
    learn(tmp_path / "spread", *settings, lm=spread)
    learn(tmp_path / "whole", *settings, lm=whole)
    found, wanted = load_prompt(tmp_path / "spread").plain, load_prompt(tmp_path / "whole").plain
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_text_under_prompts_long_ones_too_is_that_of_the_whole(spread: FrozenLM, whole: FrozenLM) -> None:
    drawn = torch.Generator().manual_seed(5)
    vectors_PD = 0.3 * torch.randn(140, whole.width, generator=drawn)
    long = SoftPrompt(vectors_PD, whole.fingerprint, "{soft:140}{text}", name="long")
    short = SoftPrompt(vectors_PD[:4], whole.fingerprint, "{soft:4}{text}", name="short")
    texts, prompts = ["a", "Tweet: my order", "The quick"], [long, short, None]
    settings = DecodeSettings(max_new_tokens=5, ignore_end=True)
    found = generate(spread, texts, prompts, settings)
    wanted = generate(whole, texts, prompts, settings)
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    scored = score(spread, texts, " never came", prompts)
    for ours, theirs in zip(scored, score(whole, texts, " never came", prompts), strict=True):
        assert ours.token_log_probabilities == pytest.approx(theirs.token_log_probabilities, abs=1e-5)


def test_an_engine_over_devices_gives_the_text_of_the_whole(spread: FrozenLM, whole: FrozenLM) -> None:
    """Several rows at once, under a prompt and under none."""
    drawn = torch.Generator().manual_seed(5)
    prompt = SoftPrompt(
        0.3 * torch.randn(4, whole.width, generator=drawn), whole.fingerprint, "{soft:4}{text}"
    )
    settings = DecodeSettings(max_new_tokens=8, ignore_end=True)
    asked = [(digest, text) for text in ("a", "Tweet: my order", "The quick") for digest in ("digest", None)]
    wanted = [
        generate(whole, text, None if digest is None else prompt, settings)[0].token_ids
        for digest, text in asked
    ]

    async def served() -> list[tuple[int, ...]]:
        with LocalEngine(spread) as engine:
            engine.load(prompt, "digest")

            async def ask(digest: str | None, text: str) -> tuple[int, ...]:
                answers = [answer async for answer in engine.submit(Work(digest, text, settings))]
                assert isinstance(answers[-1], Finished)
                return answers[-1].token_ids

            return list(await asyncio.gather(*(ask(digest, text) for digest, text in asked)))

    assert asyncio.run(served()) == wanted


def test_an_evaluation_over_devices_has_the_figures_of_the_whole(spread: FrozenLM, whole: FrozenLM) -> None:
    rows = [
        Example({"text": f"my order {number}", "label": "late" if number % 2 else "new"})
        for number in range(6)
    ]
    settings = JudgeSettings(max_new_tokens=4)
    given = {"template": "{text} {label}", "target": "label", "settings": settings, "progress": False}
    found, wanted = (
        evaluate(TextPrompt("Is it one? "), rows, base=lm, **given)  # type: ignore[arg-type]
        for lm in (spread, whole)
    )
    assert found.estimates
    for name, estimate in wanted.estimates.items():
        assert found.estimates[name].value == pytest.approx(estimate.value, abs=1e-5)


def test_what_a_deep_prompt_and_the_head_need_goes_to_where_their_layers_are() -> None:
    """Without a second device that computes, `meta` shows where tensors go."""

    class TwoDevices:
        device, dtype = torch.device("cpu"), torch.float32
        layer_devices = (torch.device("cpu"), torch.device("meta"))

        def embed(self, ids: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    state_LPHK = torch.randn(2, 3, 1, 4)
    cache: Any = prefix_cache(TwoDevices(), (state_LPHK, state_LPHK), rows=2)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    assert [layer.values.device.type for layer in cache.layers] == ["cpu", "meta"]
    head = Head(torch.randn(7, 4, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):  # computed there, and its result cannot come back
        head.logits(torch.randn(2, 4))
