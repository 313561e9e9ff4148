"""Where PEFT's prompt learning fails, softprompt is right. docs/peft-differences.md lists these, test by test.

What PEFT does wrong is shown beside it, on the version in which it was seen, so that the page stays true.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from layouts import encode
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import WrongBase
from softprompt.inference.compiled import as_deep, text_state
from softprompt.inference.conversation import Conversation
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import score
from softprompt.prompt.init import random_at_scale
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.store.artifact import load_prompt, save_prompt
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT and transformers say of the failures shown here

SEEN = peft.__version__.startswith("0.21.")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "peft-differences.md"
TEXTS = ["Tweet: my order never came", "hello", "thank you for the quick help"]
EIGHT = DecodeSettings(max_new_tokens=8, ignore_end=True)
SAME = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())


@pytest.fixture
def prompt(lm: FrozenLM) -> SoftPrompt:
    return SoftPrompt(lm.embed(torch.arange(40, 46)) * 1.1, lm.fingerprint, "{soft:6}{text}", name="greet")


@pytest.fixture
def theirs(prompt: SoftPrompt, tmp_path: Path) -> PeftModel:
    """PEFT, with our prompt from our folder."""
    return PeftModel.from_pretrained(tiny_model("Llama"), save_prompt(prompt, tmp_path))


def tokens(lm: FrozenLM, texts: str | list[str]) -> dict[str, Tensor]:
    lm.tokenizer.padding_side = "left"
    found = lm.tokenizer(texts, return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def said_by(model: Any, lm: FrozenLM, texts: str | list[str]) -> list[list[int]]:
    found: list[list[int]] = model.generate(**tokens(lm, texts), **SAME)[:, -8:].tolist()
    return found


def test_left_padding(lm: FrozenLM, prompt: SoftPrompt, theirs: PeftModel) -> None:
    alone = [said_by(theirs, lm, text)[0] for text in TEXTS]
    assert [list(one.token_ids) for one in generate(lm, TEXTS, prompt, EIGHT)] == alone
    if SEEN:
        assert said_by(theirs, lm, TEXTS) != alone


def test_one_batch_several_prompts(
    lm: FrozenLM, prompt: SoftPrompt, theirs: PeftModel, tmp_path: Path
) -> None:
    other = SoftPrompt(prompt.embeddings_PD.flip(0), lm.fingerprint, prompt.template, name="other")
    theirs.load_adapter(str(save_prompt(other, tmp_path / "other")), "other")
    expected = []
    for adapter, text in (("default", TEXTS[0]), ("other", TEXTS[0]), ("default", TEXTS[1])):
        theirs.set_adapter(adapter)
        expected += said_by(theirs, lm, text)
    ours = generate(lm, [TEXTS[0], TEXTS[0], TEXTS[1]], [prompt, other, prompt], EIGHT)
    assert [list(one.token_ids) for one in ours] == expected
    assert [one.prompt for one in ours] == ["greet", "other", "greet"]
    if SEEN:
        theirs.set_adapter("default")
        ids = torch.arange(20, 30).repeat(2, 1)
        with torch.no_grad():
            for names in (["default", "other"], ["default", "no such adapter"]):
                logits = theirs(
                    input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names
                ).logits
                assert torch.equal(logits[0], logits[1])


def test_a_prompt_of_another_base(prompt: SoftPrompt, tmp_path: Path) -> None:
    folder = save_prompt(prompt, tmp_path)
    other = FrozenLM.wrap(tiny_model("Llama", seed=5), tiny_tokenizer(), name="other")
    with pytest.raises(WrongBase, match="the same sizes and other weights"):
        load_prompt(folder, base=other.fingerprint)
    if SEEN:
        PeftModel.from_pretrained(tiny_model("Llama", seed=5), folder)  # without a word


def test_going_on_from_a_saved_prompt(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    folder = save_prompt(prompt, tmp_path)
    again = load_prompt(folder, base=lm.fingerprint)
    assert isinstance(again, SoftPrompt)
    batch = batch_of(lm, prompt)
    vectors_PD = again.embeddings_PD.clone().requires_grad_()
    loss, _ = lm.nll(batch, (vectors_PD,))
    assert torch.equal(loss.detach(), lm.nll(batch, (prompt.embeddings_PD,))[0])
    loss.backward()
    assert vectors_PD.grad is not None
    with torch.no_grad():
        better, _ = lm.nll(batch, (vectors_PD - 0.01 * vectors_PD.grad / vectors_PD.grad.norm(),))
    assert better < loss
    if SEEN:
        with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
            PeftModel.from_pretrained(tiny_model("Llama"), folder, is_trainable=True)


def test_the_random_start_has_the_tables_scale(lm: FrozenLM) -> None:
    ours_PD = random_at_scale(lm.embedding_VD, 200, torch.Generator().manual_seed(0))
    assert float(ours_PD.std()) == pytest.approx(float(lm.embedding_VD.std()), rel=0.05)
    if SEEN:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=200)
        started = get_peft_model(tiny_model("Llama"), config).prompt_encoder["default"].embedding.weight
        assert float(started.detach().std()) > 4 * float(lm.embedding_VD.std())


def test_no_virtual_positions_in_what_is_scored(lm: FrozenLM, prompt: SoftPrompt, theirs: PeftModel) -> None:
    ids = tokens(lm, TEXTS[0])["input_ids"][0]
    with torch.no_grad():
        logits_SV = theirs(**tokens(lm, TEXTS[0])).logits[0].log_softmax(-1)
    expected = logits_SV[5:-1].gather(1, ids[:, None])[:, 0]
    (ours,) = score(lm, TEXTS[:1], None, prompt)
    assert ours.token_ids == tuple(ids.tolist())
    assert list(ours.token_log_probabilities) == pytest.approx(expected.tolist(), abs=1e-4)
    assert lm.nll(batch_of(lm, prompt, TEXTS[:1]), (prompt.embeddings_PD,))[1] == len(ids)
    if SEEN:
        assert len(logits_SV) == len(ids) + 6


def test_deep_prompts_with_gradient_checkpointing(lm: FrozenLM) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("Llama")
        if checkpointing:
            model.gradient_checkpointing_enable()
        one = FrozenLM.wrap(model, tiny_tokenizer())
        keys_LPHK, values_LPHK = (
            tensor.clone().requires_grad_() for tensor in text_state(one, "Classify: ", 4)
        )
        layout = Template.parse("{text}")
        encoded = [encode(layout, Example({"text": text}), one.tokenizer) for text in TEXTS]
        loss, _ = one.nll(collate([row for row in encoded if row is not None]), (keys_LPHK, values_LPHK))
        loss.backward()
        assert keys_LPHK.grad is not None
        gradients.append(keys_LPHK.grad)
    assert float(gradients[0].norm()) > 0
    torch.testing.assert_close(*gradients)
    if SEEN:
        model = tiny_model("Llama")
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
            get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))(
                **tokens(lm, TEXTS[0])
            )


def test_a_second_turn_on_the_kept_state(lm: FrozenLM, prompt: SoftPrompt, theirs: PeftModel) -> None:
    first = tokens(lm, TEXTS[0])
    answered = theirs.generate(**first, **SAME, return_dict_in_generate=True)
    more = lm.tokenizer(" What else?", return_tensors="pt")["input_ids"]
    whole = torch.cat([answered.sequences, more], 1)
    anew = theirs.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **SAME)[0, -8:].tolist()
    talk = Conversation(lm, prompt)
    assert list(talk.say(TEXTS[0], EIGHT).token_ids) == answered.sequences[0, -8:].tolist()
    assert list(talk.say(" What else?", EIGHT).token_ids) == anew
    if SEEN:
        kept = theirs.generate(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=answered.past_key_values,
            **SAME,
        )
        assert kept[0, -8:].tolist() != anew


def test_a_cache_that_is_reserved_ahead(lm: FrozenLM, prompt: SoftPrompt, theirs: PeftModel) -> None:
    """Our running batch writes into buffers that are reserved once, as a static cache does."""
    ours = generate(lm, TEXTS[:1], prompt, EIGHT)
    assert list(ours[0].token_ids) == said_by(theirs, lm, TEXTS[0])[0]
    if SEEN:
        for settings in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises((KeyError, RuntimeError)):
                theirs.generate(**tokens(lm, TEXTS[0]), **SAME, **settings)


def test_a_compiled_prompt_mends_left_padding_in_peft_itself(
    lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path
) -> None:
    compiled = PeftModel.from_pretrained(
        tiny_model("Llama"), save_prompt(as_deep(lm, prompt), tmp_path / "deep")
    )
    ours = generate(lm, TEXTS, prompt, EIGHT)
    assert said_by(compiled, lm, TEXTS) == [list(one.token_ids) for one in ours]


def test_a_slot_in_the_middle_of_the_text(lm: FrozenLM) -> None:
    """PEFT has no such thing. A prompt made of real tokens shows that it is right here."""
    ids = [40, 77, 123]
    infix = SoftPrompt(lm.embed(torch.tensor(ids)), lm.fingerprint, "Tweet: {text}{soft:3} Complaint?")
    for text, ours in zip(TEXTS, generate(lm, TEXTS, infix, EIGHT), strict=True):
        whole = [
            *lm.tokenizer("Tweet: " + text)["input_ids"],
            *ids,
            *lm.tokenizer(" Complaint?")["input_ids"],
        ]
        found = lm.model.generate(
            input_ids=torch.tensor([whole]), attention_mask=torch.ones(1, len(whole)), **SAME
        )
        assert found[0, -8:].tolist() == list(ours.token_ids)


def batch_of(lm: FrozenLM, prompt: SoftPrompt, texts: list[str] = TEXTS) -> Any:
    layout = Template.parse(prompt.template)
    encoded = [encode(layout, Example({"text": text}), lm.tokenizer) for text in texts]
    return collate([row for row in encoded if row is not None])


def test_the_page_names_every_difference_that_is_tested() -> None:
    tests: list[str] = [
        name for name, one in globals().items() if name.startswith("test_") and isinstance(one, Callable)
    ]
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    assert named == set(tests) - {"test_the_page_names_every_difference_that_is_tested"}
