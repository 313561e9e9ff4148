"""A row's answer depends on nothing but the row: not on its neighbours, nor on who had its place before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.base import step_attention
from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State
from softprompt.base.placement import Placed
from softprompt.errors import NotFinite
from softprompt.inference.compiled import CompiledPrompt, compile_prompt, text_state
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.prefill import PASS_COST_CPU, PrefillRow, like_lengths
from softprompt.inference.request import Request, request
from softprompt.inference.running_batch import Running
from softprompt.inference.score import score
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["", "hello", "Tweet: my order never came", "I want you to act as a logistician. " * 3]


@cache
def llama() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())


@cache
def stepped() -> FrozenLM:
    """The same base, whose steps attend to the whole buffers, as in bfloat16; here in float32, so that tokens are exact."""
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_attention, "STEPPED", frozenset({torch.float32}))
        assert step_attention.can_step(lm)
    return lm


@cache
def compiled() -> list[CompiledPrompt]:
    """Prompts under which the empty text may be continued, of different lengths."""
    lm = llama()
    vectors = lm.embed(torch.arange(40, 57)) * 1.1
    return [
        compile_prompt(lm, SoftPrompt(vectors[:5], lm.fingerprint, "{soft:5}{text}", name="short")),
        compile_prompt(lm, SoftPrompt(vectors, lm.fingerprint, "{soft:17}{text}", name="long")),
        compile_prompt(
            lm, DeepPrompt(*text_state(lm, "Classify the text: ", 6), lm.fingerprint, "{soft:6} {text}")
        ),
    ]


def new(asked: tuple[int, str, DecodeSettings], lm: FrozenLM | None = None) -> Request:
    prompt, text, decoding = asked
    return request(lm or llama(), compiled()[prompt], text, decoding)


@cache
def alone(asked: tuple[int, str, DecodeSettings]) -> tuple[object, ...]:
    row = new(asked)
    running = Running(llama(), max_rows=1)
    running.admit([row])
    while len(running):
        running.step()
    return answer(row)


def answer(row: Request) -> tuple[object, ...]:
    return tuple(row.token_ids), row.text, row.finish_reason


DECODINGS = st.builds(
    DecodeSettings,
    max_new_tokens=st.integers(1, 12),
    max_text_tokens=st.sampled_from([None, None, 68, 74]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 7]),
    top_p=st.sampled_from([1.0, 0.6]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 3.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {7: 5.0, 300: -4.0}, {0: -100.0}]),
    bad_words=st.sampled_from([(), (), ("e",), (" the", "order", "s l")]),
    stop=st.sampled_from([(), ("e",), (" the", "xyz")]),
    seed=st.integers(0, 3),
    ignore_end=st.booleans(),
    log_probabilities=st.booleans(),
)
ASKED = st.tuples(st.integers(0, 2), st.sampled_from(TEXTS), DECODINGS)
SCHEDULES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12)


@pytest.mark.parametrize("base", [llama, stepped])
@settings(max_examples=40, deadline=None)
@given(st.lists(ASKED, min_size=1, max_size=9), SCHEDULES, st.sampled_from([None, 60_000]))
def test_a_row_that_joins_leaves_or_takes_a_used_place_answers_as_if_alone(
    base: Callable[[], FrozenLM],
    asked: Sequence[tuple[int, str, DecodeSettings]],
    schedule: Sequence[tuple[int, bool]],
    memory_bytes: int | None,
) -> None:
    running = Running(base(), max_rows=4, memory_bytes=memory_bytes)
    rows = [new(one, base()) for one in asked]
    waiting, cancelled = list(rows), []
    turn = 0
    while waiting or len(running):
        joining, cancels = schedule[turn % len(schedule)]
        turn += 1
        group: list[Request] = []
        while waiting and len(group) < max(joining, not len(running)):
            if not running.fits([*group, waiting[0]]):
                break
            group.append(waiting.pop(0))
        running.admit(group)
        if cancels and turn < len(schedule) and len(running) > 1:
            cancelled.append(running.requests[0])
            running.cancel(running.requests[0])
        running.step()
    for one, row in zip(asked, rows, strict=True):
        ids, text, reason = alone(one)
        if any(row is other for other in cancelled):
            assert tuple(row.token_ids) == ids[: len(row.token_ids)]  # type: ignore[index]
        else:
            assert answer(row) == (ids, text, reason)


def test_a_row_of_no_text_is_not_weighed_by_the_text_of_the_row_before_it() -> None:
    lm, prompt = llama(), compiled()[0]
    how = DecodeSettings(max_new_tokens=12, repetition_penalty=3.0, ignore_end=True)
    for text in ["thank you for the quick help", "Tweet: my order never came", "I want you to act"]:
        (solo,) = generate(lm, [""], prompt, how)
        assert generate(lm, [text, ""], prompt, how, batch_rows=1)[1] == solo


def test_token_0_is_not_weighed_down_when_a_longer_row_joins() -> None:
    """A base that always says token 0 after the first step, unless it is penalised without cause."""
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    base = compile_prompt(lm, None)
    how = DecodeSettings(max_new_tokens=3, repetition_penalty=5.0, ignore_end=True)
    first = request(lm, base, "hello", how)
    running = Running(lm, max_rows=2)
    running.admit([first])
    calls: list[torch.Tensor] = []

    def logits(hidden_BD: torch.Tensor) -> torch.Tensor:
        calls.append(hidden_BD)
        logits_BV = torch.zeros(len(hidden_BD), lm.vocab_size)
        logits_BV[:, 0], logits_BV[:, 300] = 4.0, 3.0
        return logits_BV

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenLM, "logits", staticmethod(logits))
        running.admit([request(lm, base, TEXTS[3], how)])
        running.step()
    assert calls
    assert first.token_ids[1] == 0


def nan_prompt() -> CompiledPrompt:
    """Not a number at every soft position, as of a prompt that overflows its base."""
    return replace(compiled()[1], state=EMPTY, vectors_PD=torch.full((17, 32), float("nan")), name="broken")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("base", [llama, stepped])
def test_a_row_that_is_not_finite_is_named_and_its_neighbours_go_on(
    base: Callable[[], FrozenLM], place: int
) -> None:
    lm = base()
    twelve = DecodeSettings(max_new_tokens=12, ignore_end=True)
    running = Running(lm, max_rows=2)
    keeps = new((0, "hello", twelve), lm)
    broken = request(lm, nan_prompt(), "Tweet: my order", twelve)
    with pytest.raises(NotFinite, match=r'The row "Tweet: my order" has logits that are not finite'):
        running.admit([keeps, broken] if place else [broken, keeps])
    assert running.requests == [keeps]
    follows = new((1, TEXTS[3], twelve), lm)  # takes the place, and the buffers, of the broken row
    running.admit([follows])
    while len(running):
        running.step()
    assert answer(follows) == alone((1, TEXTS[3], twelve))
    assert answer(keeps) == alone((0, "hello", twelve))


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NotFinite, match=r"broken: the log-probabilities of the row"):
        score(llama(), ["Tweet: my order"], None, nan_prompt())


@pytest.mark.parametrize("temperature", [1e-38, 1e-60, 1e-12])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature: float) -> None:
    greedy = DecodeSettings(max_new_tokens=12, ignore_end=True)
    cold = DecodeSettings(max_new_tokens=12, ignore_end=True, temperature=temperature, top_p=0.9, top_k=5)
    for prompt in compiled():
        (wanted,), (found,) = (generate(llama(), ["hello"], prompt, how) for how in (greedy, cold))
        assert found.token_ids == wanted.token_ids


def rows_of(rests: Sequence[int], known: Sequence[int] = ()) -> list[PrefillRow]:
    known = known or [0] * len(rests)
    return [
        PrefillRow(State((), (), tuple(range(length))), tuple(range(length + rest)))
        for rest, length in zip(rests, known, strict=True)
    ]


def least_cost(rests: Sequence[int], pass_cost: int) -> int:
    """By trying every way to put rows into passes: each row into one of as many passes as there are rows."""
    best = len(rests) * (pass_cost + max(rests))
    for places in product(range(len(rests)), repeat=len(rests)):
        passes = [
            [rest for rest, place in zip(rests, places, strict=True) if place == p] for p in set(places)
        ]
        best = min(best, sum(pass_cost + len(one) * max(one) for one in passes))
    return best


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=5))
def test_texts_are_read_in_the_passes_that_cost_least(rests: list[int]) -> None:
    groups = like_lengths(llama(), rows_of(rests))
    assert sorted(row.rest for group in groups for row in group) == sorted(rests)
    cost = sum(PASS_COST_CPU + len(group) * max(row.rest for row in group) for group in groups)
    assert cost == least_cost(rests, PASS_COST_CPU)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=40), st.integers(1, 6)
)
def test_a_pass_has_room_for_every_row_in_it(sizes: list[tuple[int, int]], most_rows: int) -> None:
    lm = llama()
    most = longest_text(lm)
    assert most is not None
    rows = rows_of([rest for rest, _ in sizes], [known * 2 for _, known in sizes])
    rows = [row for row in rows if len(row.marks) <= most]
    groups = like_lengths(lm, rows, most_rows)
    assert sorted(id(row) for group in groups for row in group) == sorted(id(row) for row in rows)
    for group in groups:
        assert len(group) <= most_rows
        assert max(row.state.length for row in group) + max(row.rest for row in group) <= most


def test_grouped_heads_never_step_without_a_mask_on_a_cpu_in_bfloat16() -> None:
    lm = FrozenLM.wrap(tiny_model("Mistral (sliding window)").bfloat16(), tiny_tokenizer())
    assert not step_attention.can_step(lm)  # its steps go through torch's own kernel
    base = compile_prompt(lm, None)
    twelve = DecodeSettings(max_new_tokens=12, ignore_end=True)
    masks: list[torch.Tensor] = []
    states = FrozenLM.states

    def watched(self: FrozenLM, placed: Placed, body: object = None) -> torch.Tensor:
        if placed.embeddings_BSD.shape[1] == 1:
            assert placed.mask_BS is not None
            masks.append(placed.mask_BS)
        return states(self, placed, body)

    running = Running(lm, max_rows=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenLM, "states", watched)
        waiting = [request(lm, base, text, twelve) for text in [*TEXTS[1:], TEXTS[1], *TEXTS[1:]]]
        while waiting or len(running):
            while waiting and running.fits([waiting[0]]):
                running.admit([waiting.pop(0)])
            running.step()
            if len(running) == 2 and waiting:
                running.cancel(running.requests[0])
    assert len(masks) > 12
    for mask_BS in masks:
        assert not mask_BS[:, 0].any()  # the blank column
        assert mask_BS[:, 1].any()  # one alone
        assert mask_BS[:, -1].all()
