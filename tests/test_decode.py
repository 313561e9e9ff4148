"""Every row is continued as if it were alone, and as transformers itself would continue it."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.placement import Placed
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import BaseError, DataError, OutOfMemory, PromptError, RecipeError
from softprompt.inference.bad_words import bad_sequences
from softprompt.inference.compiled import CompiledPrompt, Promptable, TextPrompt, compile_prompt, text_state
from softprompt.inference.conversation import Conversation
from softprompt.inference.detokenize import TextStream
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.prefill import prefill
from softprompt.inference.request import request
from softprompt.inference.running_batch import Running, position_bytes
from softprompt.inference.sampling import biased, completing, draw, filtered_probabilities, penalised, without
from softprompt.inference.score import score
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from softprompt.settings.section import settings
from softprompt.store.artifact import save_prompt
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = [
    "Tweet: my order never came",
    "hello",
    "I want you to act as a logistician. ",
    "thank you for the quick help",
]
TEN = DecodeSettings(max_new_tokens=10, ignore_end=True)


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Gemma 2 (sliding window)"), tiny_tokenizer())


@pytest.fixture(scope="module")
def prompts(lm: FrozenLM) -> list[Promptable]:
    """One of each kind, of different lengths."""
    vectors = lm.embed(torch.arange(40, 57)) * 1.1
    return [
        None,
        SoftPrompt(vectors[:5], lm.fingerprint, "{soft:5}{text}", name="short"),
        SoftPrompt(vectors, lm.fingerprint, "{soft:17} {text}", name="long"),
        SoftPrompt(vectors[5:8], lm.fingerprint, "Tweet: {text}{soft:3} Complaint?", name="infix"),
        DeepPrompt(*text_state(lm, "Classify the text: ", 6), lm.fingerprint, name="deep"),
        TextPrompt("Answer with the label alone. "),
        Template.parse("Tweet: {text} Complaint?"),
    ]


def ids_of(lm: FrozenLM, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


def theirs(lm: FrozenLM, ids: list[int], **settings: object) -> list[int]:
    """The new tokens of transformers' own generate."""
    ids_1T = torch.tensor([ids])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    found = lm.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)
    return found[0, len(ids) :].tolist()


def test_the_base_alone_says_what_transformers_generate_says(lm: FrozenLM) -> None:
    for text, one in zip(TEXTS, generate(lm, TEXTS, None, TEN), strict=True):
        assert list(one.token_ids) == theirs(lm, ids_of(lm, text))
        assert (one.prompt, one.input, one.tokens, one.finish_reason) == (None, text, 10, "length")


def test_a_text_prompt_says_what_the_joined_text_says(lm: FrozenLM) -> None:
    for text, one in zip(TEXTS, generate(lm, TEXTS, TextPrompt("Classify: "), TEN), strict=True):
        assert list(one.token_ids) == theirs(lm, ids_of(lm, "Classify: " + text))


@pytest.mark.parametrize("batch_rows", [28, 3])
def test_rows_with_different_prompts_are_each_as_if_alone(
    lm: FrozenLM, prompts: list[Promptable], batch_rows: int
) -> None:
    rows = [(text, prompt) for text in TEXTS for prompt in prompts]
    together = generate(
        lm, [text for text, _ in rows], [prompt for _, prompt in rows], TEN, batch_rows=batch_rows
    )
    for (text, prompt), one in zip(rows, together, strict=True):
        (alone,) = generate(lm, [text], prompt, TEN)
        assert alone == one


def test_rows_that_join_and_leave_at_any_time_are_each_as_if_alone(
    lm: FrozenLM, prompts: list[Promptable]
) -> None:
    compiled = [compile_prompt(lm, prompt) for prompt in prompts]
    rng = random.Random(0)
    running = Running(lm, max_rows=5)
    waiting = [
        request(
            lm, rng.choice(compiled), rng.choice(TEXTS), DecodeSettings(max_new_tokens=rng.randint(1, 25))
        )
        for _ in range(30)
    ]
    everyone = list(waiting)
    while waiting or len(running):
        room = min(running.max_rows - len(running), len(waiting), rng.randint(0, 3))
        running.admit([waiting.pop() for _ in range(room)])
        assert len(running) <= 5
        running.step()
    for one in everyone:
        alone = request(lm, compiled[0], one.row.marks, one.settings, row=one.row)
        solo = Running(lm, max_rows=1)
        solo.admit([alone])
        while len(solo):
            solo.step()
        assert (alone.token_ids, alone.text, alone.finish_reason) == (
            one.token_ids,
            one.text,
            one.finish_reason,
        )


def test_a_cancelled_row_leaves_and_its_neighbours_do_not_notice(lm: FrozenLM) -> None:
    base = compile_prompt(lm, None)
    first, second, third = (request(lm, base, text, TEN) for text in TEXTS[:3])
    running = Running(lm, max_rows=3)
    running.admit([first, second, third])
    running.step()
    running.cancel(first)
    assert (first.finish_reason, len(first.token_ids), len(running)) == ("cancelled", 2, 2)
    while len(running):
        running.step()
    assert [second.token_ids, third.token_ids] == [theirs(lm, ids_of(lm, text)) for text in TEXTS[1:3]]
    running.cancel(first)  # it is gone already: nothing happens
    assert first.finish_reason == "cancelled"


def test_memory_is_bounded_and_counted_in_bytes(lm: FrozenLM) -> None:
    # 2 layers x 2 key/value heads x 8 wide x keys and values x 4 bytes
    assert position_bytes(lm) == 2 * 2 * 8 * 2 * 4
    base = compile_prompt(lm, None)
    texts = [text * times for times in (1, 3) for text in TEXTS]
    limit = 3 * 90 * position_bytes(lm)
    running, most = Running(lm, max_rows=8, memory_bytes=limit), 0
    waiting = [request(lm, base, text, TEN) for text in texts]
    everyone = list(waiting)
    while waiting or len(running):
        while waiting and running.fits([waiting[-1]]):
            running.admit([waiting.pop()])
        most = max(most, running.bytes)
        running.step()
    assert 0 < most <= limit
    assert [one.token_ids for one in everyone] == [theirs(lm, ids_of(lm, text)) for text in texts]


def test_a_row_that_can_never_fit_is_refused(lm: FrozenLM) -> None:
    with pytest.raises(OutOfMemory, match="Lower max_new_tokens"):
        generate(lm, TEXTS[:1], None, DecodeSettings(max_new_tokens=80), memory_bytes=2000)


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(lm: FrozenLM, penalty: float) -> None:
    settings = DecodeSettings(max_new_tokens=10, repetition_penalty=penalty, ignore_end=True)
    mixed = [settings, TEN, settings, settings]
    for text, how, one in zip(TEXTS, mixed, generate(lm, TEXTS, None, mixed), strict=True):
        assert list(one.token_ids) == theirs(lm, ids_of(lm, text), repetition_penalty=how.repetition_penalty)


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones_of_seen_tokens() -> None:
    seen = torch.tensor([[True, True, False, False]])
    logits = penalised(torch.tensor([[2.0, -2.0, 1.0, -1.0]]), seen, torch.tensor([2.0]))
    assert logits.tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_logit_bias_and_bad_sequences_change_logits_as_transformers_processors_do() -> None:
    logits_BV = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)) * 3
    texts = [[5, 9, 3], [9, 3, 5], [3, 5, 9], [1, 2, 4]]
    bias = {9: 2.5, 3: -1.75, 59: 40.0}
    bad = ((7,), (9, 11), (5, 9, 12), (9, 3, 5), (1, 2, 4, 8))
    expected_BV = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], amount] for token, amount in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.5),
            NoBadWordsLogitsProcessor([list(sequence) for sequence in bad], eos_token_id=0),
        ]
    )(torch.tensor(texts), logits_BV.clone())
    seen_BV = torch.zeros(4, 60, dtype=torch.bool).scatter(1, torch.tensor(texts), True)
    ours_BV = without(
        penalised(biased(logits_BV, [bias] * 4), seen_BV, torch.ones(4) * 1.5),
        [completing(bad, text) for text in texts],
    )
    expected_BV[
        3, 8
    ] = -torch.inf  # as long as the whole text: some versions of transformers (5.16) overlook it
    assert torch.equal(ours_BV, expected_BV)
    assert [int(row.isinf().sum()) for row in ours_BV] == [2, 1, 3, 2]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_biased_rows_and_rows_without_bad_words_are_continued_as_transformers_does(
    lm: FrozenLM, penalty: float
) -> None:
    plain = generate(lm, TEXTS, None, TEN)
    often = plain[0].token_ids[0]
    word = lm.tokenizer.decode(plain[1].token_ids[1:3])
    bias = {often: -3.5, 17: 1.25}
    hows = [
        DecodeSettings(max_new_tokens=10, ignore_end=True, repetition_penalty=penalty, **more)  # type: ignore[arg-type]
        for more in (
            {"logit_bias": bias},
            {"bad_words": word},
            {},
            {"logit_bias": bias, "bad_words": [word, "e"]},
        )
    ]
    special = compile_prompt(lm, None).special
    for text, how, one in zip(TEXTS, hows, generate(lm, TEXTS, None, hows), strict=True):
        options: dict[str, object] = {"repetition_penalty": penalty}
        if how.logit_bias:
            options["sequence_bias"] = [[[token], amount] for token, amount in how.logit_bias.items()]
        if how.bad_words:
            bad = bad_sequences(how.bad_words, lm.tokenizer, special, [])
            options["bad_words_ids"] = [list(sequence) for sequence in bad]
        assert list(one.token_ids) == theirs(lm, ids_of(lm, text), **options)
    (changed,) = generate(lm, TEXTS[:1], None, hows[0])
    assert changed.token_ids != plain[0].token_ids


def test_a_bad_word_is_not_said_with_a_space_before_it_nor_without(lm: FrozenLM) -> None:
    def spelled(word: str) -> list[int]:
        return list(lm.tokenizer(word, add_special_tokens=False)["input_ids"])

    def says(ids: Sequence[int], word: list[int]) -> bool:
        return any(list(ids[at : at + len(word)]) == word for at in range(len(ids)))

    how = {"max_new_tokens": 40, "ignore_end": True, "temperature": 1.5, "seed": 3, "n": 8}
    words = [spelled(text) for text in ("e", " e", " th", "or", " or")]
    free = generate(lm, TEXTS[:2], None, DecodeSettings(**how))  # type: ignore[arg-type]
    assert any(says(one.token_ids, word) for one in free for word in words)
    bad = DecodeSettings(**how, bad_words=["e", " th", "or"])  # type: ignore[arg-type]
    for one in generate(lm, TEXTS[:2], None, bad):
        assert not any(says(one.token_ids, word) for word in words)


def test_a_bias_or_bad_word_that_cannot_be_is_refused(lm: FrozenLM) -> None:
    with pytest.raises(DataError, match=f"found token {lm.vocab_size}"):
        generate(lm, "hello", None, DecodeSettings(logit_bias={lm.vocab_size: 1.0}))
    end = str(lm.tokenizer.eos_token)
    with pytest.raises(DataError, match="which ends an answer"):
        generate(lm, "hello", None, DecodeSettings(bad_words=end))


def test_a_bias_is_read_from_text_as_from_numbers() -> None:
    found = DecodeSettings.from_flags({"--logit-bias": ["50=-2.5", "7=3"]})
    assert found == DecodeSettings(logit_bias={50: -2.5, 7: 3.0})
    assert DecodeSettings(logit_bias={"50": -2.5, "7": 3}) == found  # type: ignore[dict-item]
    assert hash(found) == hash(DecodeSettings(logit_bias={7: 3.0, 50: -2.5}))
    for wrong in ({-1: 1.0}, {3: float("inf")}, {3: 1e39}, {"a": 1.0}, {True: 1.0}):
        with pytest.raises(RecipeError, match="logit_bias"):
            DecodeSettings(logit_bias=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_text_tokens", "max_length"])
def test_the_longest_text_counts_the_input_and_not_the_virtual_tokens(
    lm: FrozenLM, prompts: list[Promptable], name: str
) -> None:
    given = len(ids_of(lm, TEXTS[0]))
    for prompt in (None, prompts[1]):
        settings = DecodeSettings(**{name: given + 7}, ignore_end=True)  # type: ignore[arg-type]
        (one,) = generate(lm, TEXTS[:1], prompt, settings)
        assert (one.tokens, one.finish_reason) == (7, "length")
    with pytest.raises(DataError, match=f"{given} tokens and max_text_tokens is {given}"):
        generate(lm, TEXTS[:1], None, DecodeSettings(**{name: given}))  # type: ignore[arg-type]


def test_two_names_of_one_setting_may_not_disagree() -> None:
    assert DecodeSettings(max_length=9, max_text_tokens=9).max_length == 9  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="max_length: found 9 and max_text_tokens 8"):
        DecodeSettings(max_length=9, max_text_tokens=8)  # type: ignore[call-arg]


def test_decoding_settings_are_read_from_flags_as_from_python() -> None:
    flags = {"--max-new-tokens": "5", "--temperature": "0.5", "--stop": ["###"], "--n": "3", "--top-p": None}
    found = DecodeSettings.from_flags(flags)
    assert found == DecodeSettings(max_new_tokens=5, temperature=0.5, stop="###", n=3)
    assert found.stop == ("###",)
    assert hash(found) == hash(DecodeSettings(**found.model_dump()))
    named = {one.path: one.flag for one in settings(DecodeSettings)}
    assert all(flag == "--" + path.replace("_", "-") for path, flag in named.items())
    with pytest.raises(RecipeError, match=r"--top-k: .*found .*, wanted .*at most 2147483647"):
        DecodeSettings.from_flags({"--top-k": "1" + "0" * 29})


def test_an_end_token_ends_a_row(lm: FrozenLM) -> None:
    free = theirs(lm, ids_of(lm, TEXTS[0]))
    end = next(token for place, token in enumerate(free) if place > 2 and token not in free[:place])
    lm.model.generation_config.eos_token_id = [end]
    try:
        one, other = generate(lm, [TEXTS[0], TEXTS[1]], None, DecodeSettings(max_new_tokens=10))
    finally:
        lm.model.generation_config.eos_token_id = 1
    assert list(one.token_ids) == free[: free.index(end) + 1]
    assert one.finish_reason == "stop"
    expected = theirs(lm, ids_of(lm, TEXTS[1]))
    assert list(other.token_ids) == (expected[: expected.index(end) + 1] if end in expected else expected)


def test_a_stop_text_ends_a_row_and_is_cut_off(lm: FrozenLM) -> None:
    (free,) = generate(lm, TEXTS[:1], None, TEN)
    stop = free.text[5:8]
    told: list[str] = []
    settings = DecodeSettings(max_new_tokens=10, ignore_end=True, stop=[stop, "never said"])
    (one,) = generate(lm, TEXTS[:1], None, settings, on_text=lambda _, piece: told.append(piece))
    assert one.text == free.text[: free.text.index(stop)]
    assert one.finish_reason == "stop"
    assert one.tokens < free.tokens
    assert "".join(told) == one.text


def test_streamed_pieces_make_up_each_text(lm: FrozenLM) -> None:
    told = dict.fromkeys(range(len(TEXTS)), "")

    def tell(place: int, piece: str) -> None:
        told[place] += piece

    for place, one in enumerate(generate(lm, TEXTS, None, TEN, on_text=tell)):
        assert told[place] == one.text


def test_text_is_told_when_its_characters_are_whole_and_no_stop_text_can_have_begun() -> None:
    tokenizer = tiny_tokenizer()
    told: list[str] = []
    stream = TextStream(tokenizer, [], ["END"], told.append)
    ids = list(tokenizer("é!E")["input_ids"])  # é is two bytes, two tokens here
    assert len(ids) == 4
    assert [stream.add(token) for token in ids] == [False] * 4
    assert told == ["é", "!"]  # the E may begin END
    assert [stream.add(token) for token in tokenizer("NDy")["input_ids"]] == [False, True, True]
    assert stream.finish() == "é!"
    assert "".join(told) == "é!"


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (40, 0.5)])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 0.3, 1.0])
def test_what_may_be_drawn_is_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    logits_BV = torch.randn(6, 320, generator=torch.Generator().manual_seed(0)) * 3
    seen_BN = torch.tensor([[3, 5, 3]] * 6)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected_BV = warpers(seen_BN, logits_BV.clone()).softmax(1)
    six = torch.ones(6)
    seen_BV = torch.zeros(6, 320, dtype=torch.bool).scatter(1, seen_BN, True)
    ours_BV = filtered_probabilities(
        penalised(logits_BV, seen_BV, six * 1.5),
        six * 0.7,
        (six * top_k).long(),
        six * top_p,
        six * min_p,
    )
    assert ((ours_BV > 0) == (expected_BV > 0)).all()
    torch.testing.assert_close(ours_BV, expected_BV)


def test_rows_of_one_batch_may_leave_out_different_tokens() -> None:
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 3)
    one = torch.ones(3)
    found = filtered_probabilities(logits_BV, one, torch.tensor([1, 3, 0]), one, one * 0)
    assert (found > 0).sum(1).tolist() == [1, 3, 4]
    # The second is 1/e = 0.37 times as likely as the first, the third 0.14 times.
    found = filtered_probabilities(logits_BV, one, torch.zeros(3).long(), one, torch.tensor([0.0, 0.3, 0.4]))
    assert (found > 0).sum(1).tolist() == [4, 2, 1]


def test_a_token_is_drawn_where_the_summed_probabilities_pass_the_number() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.25, 0.25]] * 5)
    found = draw(probabilities, torch.tensor([0.0, 0.49, 0.5, 0.76, 0.999999]))
    assert found.tolist() == [0, 0, 2, 3, 3]


def test_a_drawn_row_is_the_same_alone_and_in_any_batch(lm: FrozenLM, prompts: list[Promptable]) -> None:
    warm = DecodeSettings(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=7, ignore_end=True)
    mixed = [warm, TEN, warm, warm]
    chosen = [prompts[1], None, prompts[4], prompts[5]]
    together = generate(lm, TEXTS, chosen, mixed)
    for text, prompt, how, one in zip(TEXTS, chosen, mixed, together, strict=True):
        assert generate(lm, [text], prompt, how) == [one]
    other = generate(
        lm, TEXTS, chosen, DecodeSettings(max_new_tokens=10, temperature=1.0, seed=8, ignore_end=True)
    )
    assert [one.token_ids for one in other] != [one.token_ids for one in together]


def test_n_texts_are_drawn_and_the_likeliest_are_kept(lm: FrozenLM) -> None:
    drawn = generate(
        lm, TEXTS[:2], None, DecodeSettings(max_new_tokens=8, temperature=1.5, n=5, log_probabilities=True)
    )
    assert [one.input for one in drawn] == [TEXTS[0]] * 5 + [TEXTS[1]] * 5
    assert [one.sample for one in drawn[:5]] == [0, 1, 2, 3, 4]
    assert len({one.token_ids for one in drawn[:5]}) > 1
    best = generate(lm, TEXTS[:2], None, DecodeSettings(max_new_tokens=8, temperature=1.5, n=2, best_of=5))
    for place in (0, 1):
        group = drawn[place * 5 : place * 5 + 5]
        ranked = sorted(group, key=lambda one: -(one.log_probability or 0) / one.tokens)
        assert best[place * 2 : place * 2 + 2] == ranked[:2]


def test_log_probabilities_are_those_of_the_models_own_logits(lm: FrozenLM) -> None:
    (one,) = generate(
        lm, TEXTS[:1], None, DecodeSettings(max_new_tokens=5, log_probabilities=True, ignore_end=True)
    )
    ids = ids_of(lm, TEXTS[0])
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*ids, *one.token_ids]])).logits[0].log_softmax(-1)
    expected = sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(one.token_ids))
    assert one.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"top_k": -3}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"n": 3}, "at temperature 0"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, r"at least n \(3\)"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DecodeSettings(**wrong)  # type: ignore[arg-type]


def test_a_row_ends_with_the_bases_context(lm: FrozenLM) -> None:
    assert longest_text(lm) == 128
    ids = [5] * 120
    base = compile_prompt(lm, None)
    one = request(lm, base, ids, DecodeSettings(max_new_tokens=50))
    assert one.limit == 8
    with pytest.raises(DataError, match="131 positions with its prompt, and wrapped has 128"):
        request(lm, base, [5] * 130, TEN)


@pytest.mark.parametrize("architecture", ["MPT (ALiBi)", "GPT-Neo (local attention)", "GPT-2"])
def test_rows_that_fit_alone_fit_together(architecture: str) -> None:
    """A long prompt beside a long text: more columns than the base has positions, though no row has."""
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer())
    long, short = compile_prompt(lm, TextPrompt("fox " * 45)), compile_prompt(lm, None)
    assert long.length > 80
    text = "The quick brown fox. " * 9
    assert long.length + len(ids_of(lm, text)) > 128
    together = generate(lm, ["hello", text], [long, short], TEN)
    assert together == generate(lm, ["hello"], long, TEN) + generate(lm, [text], short, TEN)
    scored = score(lm, ["hello", text], " dog", [long, short])
    alone = score(lm, ["hello"], " dog", long) + score(lm, [text], " dog", short)
    for one, other in zip(scored, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    with pytest.raises(DataError, match="positions with its prompt"):
        score(lm, [text], " dog", long)


def test_lengths_that_change_the_angles_of_every_row_are_not_reached() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_model(
        "Phi-3 (sliding window)",
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    lm = FrozenLM.wrap(model, tiny_tokenizer())
    assert longest_text(lm) == 32


def test_as_many_prompts_as_inputs_are_wanted(lm: FrozenLM) -> None:
    with pytest.raises(DataError, match="found 2 for 4 inputs"):
        generate(lm, TEXTS, ["a", "b"])


@pytest.mark.parametrize("kind", range(7))
def test_a_conversation_goes_on_as_if_everything_were_read_again(
    lm: FrozenLM, prompts: list[Promptable], kind: int
) -> None:
    talk = Conversation(lm, prompts[kind])
    for text in (TEXTS[0], " What else?", " And the dog?"):
        before = talk.marks
        answer = talk.say(text, DecodeSettings(max_new_tokens=6, ignore_end=True))
        marks = talk.marks[: len(talk.marks) - 6]
        again = Running(lm, max_rows=1)
        fresh = request(lm, talk.prompt, marks, DecodeSettings(max_new_tokens=6, ignore_end=True))
        again.admit([fresh])
        while len(again):
            again.step()
        assert tuple(fresh.token_ids) == answer.token_ids
        assert marks[: len(before)] == before
        assert talk.state.length == len(talk.marks) - 1  # the last token was never read
    assert talk.bytes == talk.state.length * position_bytes(lm)


def own_log_probabilities(lm: FrozenLM, context: Sequence[int], ids: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*context, *ids]])).logits[0].log_softmax(-1)
    return [float(logits[len(context) - 1 + place, token]) for place, token in enumerate(ids)]


def test_a_continuation_is_scored_as_the_model_scores_it(lm: FrozenLM) -> None:
    labels = [" complaint", " no complaint", "!", " the quick brown fox"]
    for text, label, found in zip(TEXTS, labels, score(lm, TEXTS, labels), strict=True):
        # White space before the label belongs to it, as in training.
        head, tail = text.rstrip(), text[len(text.rstrip()) :] + label
        expected = own_log_probabilities(lm, ids_of(lm, head), ids_of(lm, tail))
        assert found.token_ids == tuple(ids_of(lm, tail))
        assert list(found.token_log_probabilities) == pytest.approx(expected, abs=1e-4)
        assert found.log_probability == pytest.approx(sum(expected), abs=1e-4)
        assert found.text_bytes == len(tail)


def test_scores_under_a_prompt_of_real_tokens_are_those_of_the_tokens(lm: FrozenLM) -> None:
    ids = ids_of(lm, "Classify: ")
    prompt = SoftPrompt(
        lm.embed(torch.tensor(ids)), lm.fingerprint, f"{{soft:{len(ids)}}}{{text}} {{label}}", "label"
    )
    (found,) = score(lm, [TEXTS[0]], "complaint", prompt)
    expected = own_log_probabilities(lm, ids + ids_of(lm, TEXTS[0]), ids_of(lm, " complaint"))
    assert list(found.token_log_probabilities) == pytest.approx(expected, abs=1e-4)


def test_a_whole_text_is_scored_from_its_second_token_on(lm: FrozenLM) -> None:
    (found,) = score(lm, [TEXTS[0]])
    ids = ids_of(lm, TEXTS[0])
    assert list(found.token_log_probabilities) == pytest.approx(
        own_log_probabilities(lm, ids[:1], ids[1:]), abs=1e-4
    )


def test_every_row_is_scored_as_if_alone(lm: FrozenLM, prompts: list[Promptable]) -> None:
    rows = [(text, prompt) for text in TEXTS for prompt in prompts]
    found = score(lm, [text for text, _ in rows], " complaint", [prompt for _, prompt in rows], batch_rows=5)
    for (text, prompt), one in zip(rows, found, strict=True):
        (alone,) = score(lm, [text], " complaint", prompt)
        assert alone.token_ids == one.token_ids
        assert list(alone.token_log_probabilities) == pytest.approx(
            list(one.token_log_probabilities), abs=1e-4
        )


def test_the_greedy_answer_is_recognised(lm: FrozenLM) -> None:
    base = compile_prompt(lm, None)
    row = base.row(base.marks(lm, TEXTS[1]))
    with torch.no_grad():
        best = int(lm.logits(prefill(lm, [row]).hidden_BTD[0, -1]).argmax())
    said = lm.tokenizer.decode([best])
    assert ids_of(lm, said) == [best]
    likely, unlikely = score(lm, [TEXTS[1]] * 2, [said, "x" if said != "x" else "y"])
    assert (likely.greedy, unlikely.greedy) == (True, False)


def test_a_row_by_name_of_its_fields_is_continued_like_its_text(lm: FrozenLM) -> None:
    (text,) = generate(lm, ["hello"], None, TEN)
    (row,) = generate(lm, [Example({"tweet": "hello"})], None, TEN)
    assert row == text


def test_a_compiled_prompt_is_taken_as_it_is(lm: FrozenLM, prompts: list[Promptable]) -> None:
    compiled = compile_prompt(lm, prompts[2])  # type: ignore[arg-type]
    assert isinstance(compiled, CompiledPrompt)
    assert generate(lm, TEXTS, compiled, TEN) == generate(lm, TEXTS, prompts[2], TEN)


CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_chat_goes_on_as_if_it_were_laid_out_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    lm = FrozenLM.wrap(tiny_model("Gemma 2 (sliding window)"), tokenizer)
    prompt = SoftPrompt(lm.embed(torch.arange(40, 44)), lm.fingerprint, "{soft:4}{messages}", name="polite")
    talk = Conversation(lm, prompt)
    for turn in ("hello", "And the dog?"):
        answer = talk.say(turn, TEN)
        assert [message.role for message in talk.messages[-2:]] == ["user", "assistant"]
        (anew,) = generate(lm, [Example({}, tuple(talk.messages[:-1]))], prompt, TEN)
        assert anew.token_ids == answer.token_ids
    assert talk.messages[2].content == "And the dog?"
    before = (list(talk.messages), talk.marks)
    with pytest.raises(DataError, match="wrapped has 128"):
        talk.say("fox " * 60)
    assert (talk.messages, talk.marks) == before


def test_nothing_changes_under_gradient_checkpointing() -> None:
    """It makes the embedding layer ask for gradients, and nothing here may ask for any."""
    model = tiny_model("Llama")
    said = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of some versions of transformers
                model.gradient_checkpointing_enable()
        lm = FrozenLM.wrap(model, tiny_tokenizer())
        prompt = SoftPrompt(lm.embed(torch.arange(40, 46)), lm.fingerprint)
        said.append(generate(lm, [*TEXTS, *TEXTS], [prompt] * 4 + [TextPrompt("Classify: ")] * 4, TEN))
    assert said[0] == said[1]


def test_in_bfloat16_a_row_in_a_batch_is_itself_to_rounding(prompts: list[Promptable]) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama").bfloat16(), tiny_tokenizer())
    vectors = lm.embed(torch.arange(40, 46)).float()
    chosen = [
        None,
        SoftPrompt(vectors, lm.fingerprint),
        TextPrompt("Classify: "),
        DeepPrompt(*text_state(lm, "a b c", 3), lm.fingerprint),
    ]
    together = score(lm, TEXTS, " complaint", chosen)
    for text, prompt, one in zip(TEXTS, chosen, together, strict=True):
        (alone,) = score(lm, [text], " complaint", prompt)
        assert one.log_probability == pytest.approx(alone.log_probability, abs=0.15)


def test_an_unknown_architecture_proves_itself_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.inference.verify.PROVEN", frozenset())
    for architecture in ("BLOOM (ALiBi)", "OPT", "DeepSeek-V3 (latent heads, experts)"):
        compile_prompt(FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer()), TextPrompt("hello"))


def test_an_architecture_that_ignores_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.inference.verify.PROVEN", frozenset())
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="odd")
    states = FrozenLM.states

    def without_mask(self: FrozenLM, placed: Placed, body: object = None) -> object:
        return states(self, replace(placed, mask_BS=None), body)

    monkeypatch.setattr(FrozenLM, "states", without_mask)
    with pytest.raises(BaseError, match=r"odd: LlamaForCausalLM gives other logits .* Choose another base"):
        compile_prompt(lm, TextPrompt("hello"))


def test_a_single_text_is_one_input_at_every_door(lm: FrozenLM) -> None:
    assert generate(lm, TEXTS[0], None, TEN) == generate(lm, [TEXTS[0]], None, TEN)
    assert generate(lm, Example({"text": TEXTS[0]}), None, TEN)[0].token_ids == tuple(
        theirs(lm, ids_of(lm, TEXTS[0]))
    )
    assert generate(lm, iter(TEXTS), None, TEN) == generate(lm, TEXTS, None, TEN)
    assert score(lm, TEXTS[0], " hello") == score(lm, [TEXTS[0]], [" hello"])


def test_a_folder_is_the_prompt_in_it_at_every_door(
    lm: FrozenLM, prompts: list[Promptable], tmp_path: Path
) -> None:
    prompt = prompts[1]
    assert isinstance(prompt, SoftPrompt)
    folder = save_prompt(prompt, tmp_path / "short")
    (wanted,) = generate(lm, TEXTS[0], prompt, TEN)
    for door in (folder, str(folder)):
        assert generate(lm, TEXTS[0], door, TEN)[0].token_ids == wanted.token_ids
        assert score(lm, TEXTS[0], " hello", door) == score(lm, TEXTS[0], " hello", prompt)
        assert Conversation(lm, door).say(TEXTS[0], TEN).token_ids == wanted.token_ids
        assert compile_prompt(lm, door).length == compile_prompt(lm, prompt).length
    several = generate(lm, TEXTS[:3], [folder, None, str(folder)], TEN)
    assert [one.prompt for one in several] == ["short", None, "short"]


def test_a_text_that_is_no_folder_is_refused_and_the_typed_text_named(lm: FrozenLM) -> None:
    for text in ("Classify: ", "runs/missing", "~nobody/there"):
        with pytest.raises(PromptError, match=rf"'{text}', which is no folder .* TextPrompt\('{text}'\)"):
            generate(lm, ["hi"], text, TEN)
    with pytest.raises(PromptError, match="found int, wanted a prompt, the folder of one, TextPrompt"):
        generate(lm, ["hi"], 3, TEN)  # type: ignore[arg-type]


def test_results_print_in_one_line_and_write_themselves_as_plain_data(lm: FrozenLM) -> None:
    (generation,) = generate(lm, TEXTS[0], TextPrompt("Classify: ", name="mine"), TEN)
    (scored,) = score(lm, TEXTS[0], " hello")
    for result in (generation, scored):
        assert "\n" not in repr(result)
        assert len(repr(result)) < 160
        record = result.to_record()
        assert json.loads(json.dumps(record)) == record
    assert generation.to_record()["prompt"] == "mine"
    assert scored.to_record()["token_log_probabilities"] == list(scored.token_log_probabilities)
