"""The bundled base and the scripts that made it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

ROOT = Path(__file__).parent.parent
BUILTIN = ROOT / "src/softprompt/base/builtin"
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "pretrain"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "pretrain"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "text",
    ["plain words", " two  spaces\n\n\ttab ", "naïve café – “quotes”", "日本語 עברית 🙂👩‍🚀", "\x00\x7f", ""],
)
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_comes_back_from_its_tokens(tokenizer: Any) -> None:
    text = "".join(chr(code) for code in range(0x250)) + "\u0950\U0010fffd"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_and_the_weights_have_the_size_they_promise(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 8192
    assert tokenizer.model_max_length >= 512
    assert (BUILTIN / "model.safetensors").stat().st_size <= 25_000_000
    assert 6_000_000 <= sum(value.numel() for value in model.parameters()) <= 12_000_000
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_it_reads_a_context_of_512_tokens_as_well_as_a_short_one(tokenizer: Any, model: Any) -> None:
    # A made-up word that came 400 tokens earlier and again 5 tokens ago must not break a long context.
    text = "The little girl walked to the market with her mother. " * 60
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    with torch.inference_mode():
        nll_T = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert nll_T[256:].mean() < nll_T[:24].mean()


def test_it_writes_text_without_a_network(tokenizer: Any, model: Any) -> None:
    ids = tokenizer("Once upon a time there was a", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("Once upon a time there was a ")


def test_it_expects_english_more_than_the_same_words_shuffled(tokenizer: Any, model: Any) -> None:
    def nll(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            return float(model(ids, labels=ids).loss)

    assert (
        nll(" The dog ran to the house because it was raining.")
        < nll(" raining ran because dog house it The to was the.") - 1
    )


def test_bits_per_character_is_what_one_computes_by_hand() -> None:
    # Uniform over 64 tokens: 6 bits each. Windows of 3 over 8 tokens of 2 characters score 2 + 2 + 1 tokens: 30 bits, 10 characters.
    bits = script("bits")

    class Uniform:
        device = "cpu"

        def __call__(self, ids_BT: torch.Tensor) -> Any:
            return type("Output", (), {"logits": torch.zeros(*ids_BT.shape, 64)})

    def pairs(text: str, **_: Any) -> dict[str, Any]:
        spans = [(at, at + 2) for at in range(0, len(text), 2)]
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}

    value, scored = bits.bits_per_character(Uniform(), pairs, "abcdefghijklmnop", size=3)
    assert (value, scored) == (pytest.approx(30 / 10), 5)
    assert bits.windows([(0, 1), (1, 3), (3, 6), (6, 7)], size=3) == [(0, 3, 5)]


def test_the_training_forward_gives_transformers_loss_and_gradient() -> None:
    fast = script("model")
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**TINY))
    ids_BT = torch.randint(0, 64, (3, 17))
    model(ids_BT, labels=ids_BT).loss.backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    weights = fast.cast(dict(model.named_parameters()), torch.float32)
    hidden = fast.hidden_BTD(
        weights, ids_BT[:, :-1], fast.alibi_HTT(4, 16), 2, model.config.layer_norm_epsilon
    )
    nll = fast.head_loss(hidden.reshape(-1, 32), weights["word_embeddings.weight"], ids_BT[:, 1:].reshape(-1))
    (nll / 48).backward()
    with torch.no_grad():
        assert float(nll / 48) == pytest.approx(float(model(ids_BT, labels=ids_BT).loss), abs=1e-5)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train = script("train")
    tokens, config = tmp_path / "tokens", tmp_path / "config.json"
    tokens.mkdir()
    config.write_text(json.dumps(TINY))
    rng = np.random.default_rng(0)
    for name in ("books", "children"):
        rng.integers(4, 64, 400).astype(np.uint16).tofile(tokens / f"{name}.bin")

    def run(work: str, *more: str) -> dict[str, torch.Tensor]:
        common = ["--tokens", str(tokens), "--config", str(config), "--steps", "8", "--batch", "4", "--length", "16",
                  "--no-compile", "--log-every", "1", "--work", str(tmp_path / work)]  # fmt: skip
        return dict(train.train(train.parser().parse_args([*common, *more])).state_dict())

    straight = run("straight")
    run("killed", "--stop-at", "3")
    resumed = run("killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    curve = [json.loads(line) for line in (tmp_path / "killed/curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == list(range(1, 9))
    assert curve[-1]["tokens"] == 8 * 4 * 16


def test_held_out_documents_are_never_among_those_trained_on(shared_data: Path) -> None:
    prepare = script("prepare")
    stories = prepare.stories(shared_data / "pretrain")
    trained, kept = prepare.split(stories)
    assert kept == stories[::20]
    assert len(trained) == 711 - math.ceil(711 / 20) - 4  # near copies of held-out stories
    assert not set(kept) & set(trained)
