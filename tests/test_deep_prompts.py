"""Deep prompts: started, learned, saved and used by the roads that soft prompts take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example, Splits
from softprompt.errors import RecipeError
from softprompt.inference.compiled import text_state
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.prompt.soft_prompt import DeepPrompt
from softprompt.store.artifact import load_prompt
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import plain_start
from test_learn import SPLITS, recipe
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["quick help", "thank you", "the lazy dog", "my order never came", "nobody answers", "act as a fox"]


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")


def learn(lm: FrozenLM, out: Path, *settings: str) -> TuneResult:
    rows = tuple(Example({"text": text}, row=n) for n, text in enumerate(TEXTS))
    base = ["data.source=x", f"out={out}", "prompt.kind=deep", "prompt.length=4", "tune.batch_size=3"]
    recipe = Recipe.from_flags({}, [*base, "tune.epochs=6", "tune.learning_rate=0.1", *settings])
    return tune(recipe, lm=lm, splits=Splits(rows, rows, (), "made for the test"))


@pytest.mark.parametrize("init", ["random", "zero", "vocabulary", "text"])
def test_every_start_learns(lm: FrozenLM, tmp_path: Path, init: str) -> None:
    before = lm.weights_sha256()
    tuned = learn(lm, tmp_path / "p", f"prompt.init={init}", "prompt.init_text=Classify the text")
    assert tuned.nll_after < tuned.nll_before - 0.1
    assert lm.weights_sha256() == before


def test_the_text_start_is_the_keys_and_values_of_that_text(lm: FrozenLM, tmp_path: Path) -> None:
    length = len(lm.tokenizer("Classify")["input_ids"])
    still = (
        "prompt.init_text=Classify",
        f"prompt.length={length}",
        "tune.learning_rate=1e-12",
        "tune.epochs=1",
    )
    prompt = learn(lm, tmp_path / "p", "prompt.init=text", *still).prompt
    assert isinstance(prompt, DeepPrompt)
    keys_LPHK, values_LPHK = text_state(lm, "Classify", length)
    torch.testing.assert_close(prompt.keys_LPHK, keys_LPHK)
    torch.testing.assert_close(prompt.values_LPHK, values_LPHK)


def test_the_zero_start_is_zero_and_only_for_deep_prompts(lm: FrozenLM, tmp_path: Path) -> None:
    prompt = learn(lm, tmp_path / "p", "prompt.init=zero", "tune.learning_rate=1e-12", "tune.epochs=1").prompt
    assert all(float(tensor.abs().max()) < 1e-9 for tensor in prompt.tensors.values())
    with pytest.raises(RecipeError, match=r"prompt\.kind to deep"):
        Recipe.from_flags({}, ["data.source=x", "prompt.init=zero"])


def test_what_was_learned_says_the_same_here_again_and_in_peft(lm: FrozenLM, tmp_path: Path) -> None:
    tuned = learn(lm, tmp_path / "p", "prompt.init=vocabulary")
    settings = DecodeSettings(max_new_tokens=8, ignore_end=True)
    said = [list(one.token_ids) for one in generate(lm, TEXTS, tuned.prompt, settings)]
    again = load_prompt(tmp_path / "p", base=lm.fingerprint)
    assert [list(one.token_ids) for one in generate(lm, TEXTS, again, settings)] == said
    assert said != [list(one.token_ids) for one in generate(lm, TEXTS, None, settings)]
    theirs = PeftModel.from_pretrained(tiny_model("Llama"), tmp_path / "p")
    for text, ours in zip(TEXTS, said, strict=True):
        found = lm.tokenizer(text, return_tensors="pt")
        given = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        tokens = theirs.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens[0, -8:].tolist() == ours


def test_a_starting_text_longer_than_the_prompt_is_not_cut_off(lm: FrozenLM, tmp_path: Path) -> None:
    """Its end decides as much as its beginning: another end gives another start, nearer to the whole text's losses."""
    text = "the quick brown fox jumps over the lazy dog and nobody answers my tweet about the order"
    starts = []
    for words in (text, text.replace("about the order", "act as a fox")):
        overrides = ["prompt.kind=deep", "prompt.length=4", f"prompt.init_text={words}", "prompt.init=text"]
        starts.append(
            plain_start(make_plan(recipe(tmp_path, *overrides), lm=lm, splits=SPLITS), torch.Generator())
        )
    assert starts[0][0].shape[1] == 4
    assert not torch.allclose(starts[0][1], starts[1][1])
