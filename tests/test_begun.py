"""An answer that was cut off goes on from its tokens: what comes is what would have come from the start."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import DataError
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from softprompt.serving.engine import Finished, Piece, Work
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.steering import choice_of
from softprompt.store.digest import digest_of
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

TEXT = "Tweet: my order never came"
SETTINGS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 7, "n": 2, "top_p": 0.9},
    "penalised": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.4},
    "bad words": {"bad_words": ("order",), "repetition_penalty": 1.2},
    "bounded": {"max_new_tokens": None, "max_text_tokens": 40},
}


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


def deep_of(lm: FrozenLM) -> DeepPrompt:
    drawn = torch.Generator().manual_seed(3)
    shape = (lm.num_layers, 4, lm.fingerprint.kv_heads, lm.fingerprint.head_width)
    keys, values = (torch.randn(*map(int, shape), generator=drawn) for _ in range(2))
    return DeepPrompt(keys, values, lm.fingerprint, "{soft:4}{text}", None, "deep")


def answers(lm: FrozenLM, prompt: Any, **work: Any) -> tuple[list[Finished], list[Piece]]:
    async def ask() -> tuple[list[Finished], list[Piece]]:
        ends, pieces = [], []
        async for answer in engine.submit(Work(digest, TEXT, **work)):
            (ends if isinstance(answer, Finished) else pieces).append(answer)
        return sorted(ends, key=lambda end: end.sample), pieces

    with LocalEngine(lm, max_rows=4) as engine:
        digest = None if prompt is None else digest_of(prompt)
        if prompt is not None:
            engine.load(prompt, digest_of(prompt))
        return asyncio.run(ask())


@pytest.mark.parametrize("kind", ["none", "soft", "deep"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("taken", [1, 11])
def test_an_answer_goes_on_from_its_first_tokens_as_it_would_have(
    lm: FrozenLM, kind: str, name: str, taken: int
) -> None:
    prompt = {"none": None, "soft": prompt_of(lm, 1, "soft"), "deep": deep_of(lm)}[kind]
    settings = DecodeSettings(**{"max_new_tokens": 14, "ignore_end": True, **SETTINGS[name]})
    wanted = generate(lm, [TEXT], prompt, settings)
    begun = tuple(tuple(row.token_ids[:taken]) for row in wanted)
    ends, pieces = answers(lm, prompt, settings=settings, begun=begun)
    assert [end.token_ids for end in ends] == [tuple(row.token_ids) for row in wanted]
    assert [end.text for end in ends] == [row.text for row in wanted]
    assert [end.reason for end in ends] == [row.finish_reason for row in wanted]
    for end in ends:  # a stream of it begins at its very first character, and tells each token once
        own = [piece for piece in pieces if piece.sample == end.sample]
        assert "".join(piece.text for piece in own) == end.text
        told = [token for piece in own for token in piece.token_ids]
        assert told == list(end.token_ids[: len(told)])
    (alone, *_), _ = answers(lm, prompt, settings=settings)
    assert (alone.input_tokens, alone.virtual_tokens) == (ends[0].input_tokens, ends[0].virtual_tokens)


def test_a_stop_text_across_the_cut_and_a_choice_are_followed(lm: FrozenLM) -> None:
    (whole,) = generate(lm, [TEXT], None, DecodeSettings(max_new_tokens=14, ignore_end=True))
    stop = whole.text[3:9]
    settings = DecodeSettings(max_new_tokens=14, ignore_end=True, stop=(stop,))
    (wanted,) = generate(lm, [TEXT], None, settings)
    assert 0 < len(wanted.text) < len(whole.text)
    (end,), _ = answers(lm, None, settings=settings, begun=(tuple(wanted.token_ids[:-1]),))
    assert (end.text, end.token_ids, end.reason) == (wanted.text, tuple(wanted.token_ids), "stop")

    labels = ("a complaint about things", "a compliment")
    steer: Any = lambda lm, prompt: choice_of(lm, prompt, TEXT, labels)  # noqa: E731
    short = DecodeSettings(max_new_tokens=60)
    (label,), _ = answers(lm, None, settings=short, steer=steer)
    assert label.text.strip() in labels
    (again,), _ = answers(lm, None, settings=short, steer=steer, begun=(label.token_ids[:2],))
    assert again == label


def test_what_cannot_go_on_is_refused(lm: FrozenLM) -> None:
    prompt: SoftPrompt = prompt_of(lm, 1, "soft")
    for settings, begun, words in (
        (DecodeSettings(max_new_tokens=3), (1, 2, 3), "nothing is left"),
        (DecodeSettings(log_probabilities=True), (1,), "from the start"),
        (DecodeSettings(), (lm.vocab_size,), "wanted ids"),
    ):
        with pytest.raises(DataError, match=words):
            answers(lm, prompt, settings=settings, begun=(begun,))
