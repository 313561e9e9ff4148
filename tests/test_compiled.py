"""A compiled prompt is what reading the whole sequence gives, whatever kind of prompt it is."""

from __future__ import annotations

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.template import Template
from softprompt.errors import DataError, PromptError, WrongBase
from softprompt.inference.compiled import TextPrompt, compile_prompt, text_state
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.prefill import prefill
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from tiny_models import tiny_model, tiny_tokenizer

INSTRUCTION = "Classify the text: "
TWEET = "my order never came"


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Mistral (sliding window)"), tiny_tokenizer())


@pytest.fixture(scope="module")
def lm_with_bos() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(bos=True))


def own_logits(lm: FrozenLM, ids: list[int]) -> torch.Tensor:
    """The model's own logits after the last of `ids`, without any of our code."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0, -1]


def our_logits(lm: FrozenLM, prompt: object, given: str) -> torch.Tensor:
    compiled = compile_prompt(lm, prompt)  # type: ignore[arg-type]
    row = compiled.row(compiled.marks(lm, given))
    with torch.no_grad():
        return lm.logits(prefill(lm, [row]).hidden_BTD[0, row.rest - 1])


def token_prompt(lm: FrozenLM, ids: list[int], template: str) -> SoftPrompt:
    return SoftPrompt(lm.embed(torch.tensor(ids)), lm.fingerprint, template)


def ids_of(lm: FrozenLM, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


def test_a_prompt_of_real_token_embeddings_gives_the_logits_of_those_tokens(lm: FrozenLM) -> None:
    ids = ids_of(lm, INSTRUCTION)
    prompt = token_prompt(lm, ids, f"{{soft:{len(ids)}}}{{text}}")
    torch.testing.assert_close(our_logits(lm, prompt, TWEET), own_logits(lm, ids + ids_of(lm, TWEET)))


def test_a_text_prompt_gives_the_logits_of_the_joined_text(lm: FrozenLM) -> None:
    torch.testing.assert_close(
        our_logits(lm, TextPrompt(INSTRUCTION), TWEET), own_logits(lm, ids_of(lm, INSTRUCTION + TWEET))
    )


def test_text_that_joins_with_the_end_of_a_text_prompt_is_still_read_as_one_text(lm: FrozenLM) -> None:
    # "the" is one token, "t" and "he" are two: the compiled "t" must give way.
    assert ids_of(lm, "of t") + ids_of(lm, "he") != ids_of(lm, "of the")
    torch.testing.assert_close(our_logits(lm, TextPrompt("of t"), "he"), own_logits(lm, ids_of(lm, "of the")))


def test_a_slot_behind_a_field_is_merged_into_each_row(lm: FrozenLM) -> None:
    ids = [40, 77, 123]
    prompt = token_prompt(lm, ids, "Tweet: {text}{soft:3} Complaint?")
    expected = ids_of(lm, "Tweet: " + TWEET) + ids + ids_of(lm, " Complaint?")
    assert compile_prompt(lm, prompt).marks(lm, TWEET)[-len(ids_of(lm, " Complaint?")) - 3 :][:3] == [
        -1,
        -2,
        -3,
    ]
    torch.testing.assert_close(our_logits(lm, prompt, TWEET), own_logits(lm, expected))


def test_fixed_text_around_a_slot_is_compiled_with_it(lm: FrozenLM) -> None:
    ids = [40, 77, 123]
    prompt = token_prompt(lm, ids, "Tweet: {soft:3} about {text}")
    expected = ids_of(lm, "Tweet: ") + ids + ids_of(lm, " about " + TWEET)
    assert compile_prompt(lm, prompt).length >= len(ids_of(lm, "Tweet: ")) + 3 + len(ids_of(lm, " about")) - 1
    torch.testing.assert_close(our_logits(lm, prompt, TWEET), own_logits(lm, expected))


def test_two_slots_take_the_rows_of_the_prompt_in_order(lm: FrozenLM) -> None:
    prompt = token_prompt(lm, [40, 77, 123], "{soft:2}{text}{soft:1} Complaint?")
    expected = [40, 77, *ids_of(lm, TWEET), 123, *ids_of(lm, " Complaint?")]
    torch.testing.assert_close(our_logits(lm, prompt, TWEET), own_logits(lm, expected))


def test_the_start_token_stands_behind_a_leading_slot_as_in_peft(lm_with_bos: FrozenLM) -> None:
    prompt = token_prompt(lm_with_bos, [40, 77, 123], "{soft:3}{text}")
    expected = [40, 77, 123, *ids_of(lm_with_bos, TWEET)]
    assert expected[3] == lm_with_bos.tokenizer.bos_token_id
    torch.testing.assert_close(our_logits(lm_with_bos, prompt, TWEET), own_logits(lm_with_bos, expected))


def test_a_text_prompt_has_one_start_token(lm_with_bos: FrozenLM) -> None:
    marks = compile_prompt(lm_with_bos, TextPrompt(INSTRUCTION)).marks(lm_with_bos, TWEET)
    assert marks == ids_of(lm_with_bos, INSTRUCTION + TWEET)
    assert marks.count(lm_with_bos.tokenizer.bos_token_id) == 1


def test_a_deep_prompt_made_of_a_text_gives_the_logits_of_that_text(lm: FrozenLM) -> None:
    ids = ids_of(lm, INSTRUCTION)
    prompt = DeepPrompt(*text_state(lm, INSTRUCTION, len(ids)), lm.fingerprint)
    torch.testing.assert_close(our_logits(lm, prompt, TWEET), own_logits(lm, ids + ids_of(lm, TWEET)))


def test_a_text_too_short_for_a_deep_prompt_is_repeated(lm: FrozenLM) -> None:
    ids = ids_of(lm, "dog")
    keys_LPHK, values_LPHK = text_state(lm, "dog", 2 * len(ids))
    with torch.no_grad():
        cache = lm.model(input_ids=torch.tensor([ids + ids])).past_key_values
    torch.testing.assert_close(keys_LPHK[0], cache.layers[0].keys[0].transpose(0, 1))
    torch.testing.assert_close(values_LPHK[1], cache.layers[1].values[0].transpose(0, 1))


def test_compiled_keys_and_values_are_those_that_the_model_caches(lm_with_bos: FrozenLM) -> None:
    compiled = compile_prompt(lm_with_bos, TextPrompt("quick brown fox"))
    ids = ids_of(lm_with_bos, "quick brown fox")
    assert list(compiled.state.marks) == ids
    with torch.no_grad():
        cache = lm_with_bos.model(input_ids=torch.tensor([ids])).past_key_values
    torch.testing.assert_close(compiled.keys_LPHK[1], cache.layers[1].keys[0].transpose(0, 1))
    torch.testing.assert_close(compiled.values_LPHK[0], cache.layers[0].values[0].transpose(0, 1))
    assert compiled.bytes == compiled.keys_LPHK.numel() * 2 * 4


def test_the_base_alone_sees_a_template_without_its_slots(lm: FrozenLM) -> None:
    compiled = compile_prompt(lm, None, template="Tweet: {soft:3}{text} Complaint?")
    assert compiled.name is None
    assert compiled.marks(lm, TWEET) == ids_of(lm, "Tweet: ") + ids_of(lm, TWEET + " Complaint?")


def test_a_template_of_text_is_an_engineered_prompt(lm: FrozenLM) -> None:
    prompt = Template.parse("Tweet: {text} Complaint?")
    torch.testing.assert_close(
        our_logits(lm, prompt, TWEET), own_logits(lm, ids_of(lm, f"Tweet: {TWEET} Complaint?"))
    )


def test_generation_stops_before_the_target(lm: FrozenLM) -> None:
    prompt = SoftPrompt(
        lm.embed(torch.tensor([40, 77])), lm.fingerprint, "{soft:2}Tweet: {text} Complaint? {label}", "label"
    )
    marks = compile_prompt(lm, prompt).marks(lm, TWEET)
    assert marks == [-1, -2, *ids_of(lm, f"Tweet: {TWEET} Complaint?")]


def test_a_prompt_of_another_base_is_refused_though_its_sizes_agree(lm: FrozenLM) -> None:
    other = FrozenLM.wrap(tiny_model("Mistral (sliding window)", seed=1), tiny_tokenizer(), name="other")
    prompt = SoftPrompt(torch.randn(4, 32), other.fingerprint, "{soft:4}{text}", name="greet")
    with pytest.raises(WrongBase, match=r"greet.*other"):
        compile_prompt(lm, prompt)


def test_a_template_of_another_length_is_refused(lm: FrozenLM) -> None:
    prompt = SoftPrompt(torch.randn(4, 32), lm.fingerprint, "{soft:5}{text}", name="greet")
    with pytest.raises(PromptError, match=r"greet has 4 virtual tokens.*has 5 virtual tokens"):
        compile_prompt(lm, prompt)


def test_nothing_to_go_on_from_is_refused(lm: FrozenLM) -> None:
    with pytest.raises(DataError, match="empty"):
        generate(lm, [""])


def test_a_deep_prompt_without_text_is_refused_and_a_soft_one_is_not(lm: FrozenLM) -> None:
    keys_LPHK, values_LPHK = text_state(lm, INSTRUCTION, 4)
    with pytest.raises(DataError, match="Give some text"):
        generate(lm, [""], DeepPrompt(keys_LPHK, values_LPHK, lm.fingerprint))
    ids = ids_of(lm, INSTRUCTION)
    settings = DecodeSettings(max_new_tokens=6, ignore_end=True)
    (soft,) = generate(lm, [""], token_prompt(lm, ids, f"{{soft:{len(ids)}}}{{text}}"), settings)
    (text,) = generate(lm, [INSTRUCTION], None, settings)
    assert soft.token_ids == text.token_ids
