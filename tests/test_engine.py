"""The engine under faults: whatever breaks, every request gets its own answer or an error, and the others go on."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY
from softprompt.errors import DataError, NotFinite, OutOfMemory
from softprompt.inference import lanes as lanes_module
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.generate import generate
from softprompt.inference.lanes import Lanes
from softprompt.inference.prefill import PrefillRow, read_on
from softprompt.inference.request import Request, request
from softprompt.inference.running_batch import Running, position_bytes
from softprompt.inference.score import score
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving import held_prompts, scheduler
from softprompt.serving.engine import (
    EngineFailed,
    Finished,
    Overloaded,
    Piece,
    PromptGone,
    Room,
    ShuttingDown,
    Work,
)
from softprompt.serving.held_prompts import HeldPrompts
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.waiting import Ticket, Waiting
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox", "Tweet: my order never came", "I want you", "a"]
LONG = "I want you to act as a logistician. Tweet: thank you for the quick help. Complaint? no complaint. "


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


def prompt_of(lm: FrozenLM, seed: int, template: str = "{soft:4}{text}") -> SoftPrompt:
    drawn = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(4, lm.width, generator=drawn), lm.fingerprint, template, name=str(seed))


def greedy(tokens: int = 8, *, ignore_end: bool = True) -> DecodeSettings:
    return DecodeSettings(max_new_tokens=tokens, ignore_end=ignore_end)


def alone(lm: FrozenLM, text: str, settings: DecodeSettings, prompt: SoftPrompt | None = None) -> str:
    return generate(lm, [text], prompt, settings)[0].text


async def whole(engine: LocalEngine, work: Work) -> str:
    answers = [answer async for answer in engine.submit(work)]
    last = answers[-1]
    assert isinstance(last, Finished)
    assert "".join(
        piece.text for piece in answers if isinstance(piece, Piece) and piece.sample == last.sample
    )
    return last.text


def together(engine: LocalEngine, works: Sequence[Work]) -> list[Any]:
    async def go() -> list[Any]:
        return await asyncio.gather(*(whole(engine, work) for work in works), return_exceptions=True)

    return asyncio.run(go())


def test_a_prompt_that_is_not_finite_fails_its_request_and_no_other(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = prompt_of(lm, 1)

    def compiled(lm: FrozenLM, prompt: SoftPrompt | None) -> CompiledPrompt:
        done = compile_prompt(lm, prompt)
        if prompt is not broken:
            return done
        return replace(done, state=EMPTY, vectors_PD=torch.full((4, lm.width), float("nan")))

    monkeypatch.setattr(held_prompts, "compile_prompt", compiled)
    with LocalEngine(lm) as engine:
        engine.load(broken, "broken")
        found = together(engine, [Work(None, TEXTS[0], greedy()), Work("broken", "a", greedy())] * 3)
        assert [type(result) for result in found[1::2]] == [NotFinite] * 3
        assert found[::2] == [alone(lm, TEXTS[0], greedy())] * 3
        assert engine.health()["running"] == 0


def test_a_text_that_cannot_be_read_fails_alone_among_those_it_joins_with(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes that read several texts fail as a whole; the ones not at fault are read again without it."""
    embed = FrozenLM.embed

    def demanding(self: FrozenLM, ids: torch.Tensor) -> torch.Tensor:
        if bool((ids == 319).any()):
            raise DataError("319 has no row")
        return embed(self, ids)

    monkeypatch.setattr(FrozenLM, "embed", demanding)
    with LocalEngine(lm) as engine:
        works = [Work(None, text, greedy(ignore_end=False)) for text in TEXTS]
        found = together(engine, [*works, Work(None, [5, 319, 6], greedy())])
    assert isinstance(found[-1], DataError)
    assert found[:-1] == [alone(lm, text, greedy(ignore_end=False)) for text in TEXTS]


def test_a_step_that_breaks_fails_what_runs_and_the_engine_goes_on(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, breaks = Running.advance, [False, False, True]

    def breaking(self: Running) -> Any:
        if breaks and breaks.pop(0):
            raise RuntimeError("no memory")
        return advance(self)

    monkeypatch.setattr(Running, "advance", breaking)
    with LocalEngine(lm) as engine:
        found = together(engine, [Work(None, text, greedy(20)) for text in TEXTS[:3]])
        assert [type(result) for result in found] == [EngineFailed] * 3
        assert together(engine, [Work(None, TEXTS[0], greedy())]) == [alone(lm, TEXTS[0], greedy())]
        assert engine.health()["alive"] == 1


def test_an_engine_that_fails_tells_everybody_and_says_so(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Lanes, requests: Sequence[object]) -> bool:
        raise RuntimeError("a fault of ours")

    with LocalEngine(lm) as engine:
        monkeypatch.setattr(Lanes, "fits", failing)
        found = together(engine, [Work(None, text, greedy()) for text in TEXTS])
        assert {type(result) for result in found} == {EngineFailed}
        assert engine.health()["alive"] == 0
        with pytest.raises(EngineFailed):
            asyncio.run(engine.call(lambda compiled: 1))


def test_more_samples_than_rows_are_drawn_as_alone(lm: FrozenLM) -> None:
    drawn = DecodeSettings(max_new_tokens=8, temperature=1, seed=3, n=5, ignore_end=True)

    async def go(engine: LocalEngine) -> list[str]:
        texts = {}
        async for answer in engine.submit(Work(None, LONG, drawn)):
            if isinstance(answer, Finished):
                texts[answer.sample] = answer.text
        return [texts[sample] for sample in sorted(texts)]

    with LocalEngine(lm, max_rows=2, read_beside=8) as engine:
        assert asyncio.run(go(engine)) == [one.text for one in generate(lm, [LONG], None, drawn)]


def test_an_owner_of_one_request_does_not_wait_for_another_owners_many(lm: FrozenLM) -> None:
    order: list[str] = []

    async def go(engine: LocalEngine) -> None:
        async def one(owner: str) -> None:
            await whole(engine, Work(None, "a", greedy(6), owner))
            order.append(owner)

        many = [asyncio.ensure_future(one("many")) for _ in range(20)]
        await asyncio.sleep(0)
        few = asyncio.ensure_future(one("few"))
        await asyncio.sleep(0)
        engine.start()  # when all of them wait, however the two threads are scheduled
        await asyncio.gather(few, *many)

    engine = LocalEngine(lm, max_rows=2)
    asyncio.run(go(engine))
    engine.stop()
    assert order.index("few") <= 4


def test_memory_bounds_the_rows_and_one_that_can_never_fit_is_refused(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 150 * position_bytes(lm)
    held: list[int] = []
    advance = Lanes.advance

    def watched(self: Lanes) -> Any:
        held.append(engine.health()["kv_bytes"])
        return advance(self)

    monkeypatch.setattr(Lanes, "advance", watched)
    with LocalEngine(lm, memory_bytes=limit) as engine:
        works = [
            Work(None, "a", greedy(20)),
            Work(None, LONG, greedy(60)),
            *[Work(None, text, greedy(20)) for text in TEXTS],
        ]
        found = together(engine, works)
    assert isinstance(found[1], OutOfMemory)
    assert [found[0], *found[2:]] == [alone(lm, text, greedy(20)) for text in ["a", *TEXTS]]
    assert 0 < max(held) <= limit


def test_a_large_row_is_passed_by_small_ones_only_so_often(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_PASSED", 4)
    order: list[str] = []

    async def go(engine: LocalEngine) -> None:
        async def one(name: str, text: str, tokens: int) -> None:
            assert await whole(engine, Work(None, text, greedy(tokens))) == alone(lm, text, greedy(tokens))
            order.append(name)

        small = [asyncio.ensure_future(one("small", "a", 12 + n % 5)) for n in range(4)]
        await asyncio.sleep(0)
        large = asyncio.ensure_future(one("large", LONG, 20))
        await asyncio.sleep(0)
        await asyncio.gather(large, *small, *(one("small", "a", 12 + n % 5) for n in range(30)))

    columns = 2 * (len(tiny_tokenizer()(LONG)["input_ids"]) + 20)
    with LocalEngine(lm, memory_bytes=(columns + 40) * position_bytes(lm), max_rows=6) as engine:
        asyncio.run(go(engine))
    assert order.index("large") < 30


def test_requests_that_were_given_up_while_waiting_free_their_places(lm: FrozenLM) -> None:
    async def go(engine: LocalEngine) -> None:
        running = asyncio.ensure_future(whole(engine, Work(None, "a", greedy(100))))
        await asyncio.sleep(0.05)
        given_up = [asyncio.ensure_future(whole(engine, Work(None, "a", greedy()))) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        assert await whole(engine, Work(None, TEXTS[0], greedy())) == alone(lm, TEXTS[0], greedy())
        await running

    with LocalEngine(lm, max_rows=1, max_waiting=3) as engine:
        asyncio.run(go(engine))


def test_a_request_keeps_its_prompt_though_that_is_removed_while_it_waits(lm: FrozenLM) -> None:
    prompt = prompt_of(lm, 1)

    async def go(engine: LocalEngine) -> None:
        running = asyncio.ensure_future(whole(engine, Work(None, "a", greedy(60))))
        await asyncio.sleep(0.02)
        waiting = asyncio.ensure_future(whole(engine, Work("d", TEXTS[0], greedy())))
        await asyncio.sleep(0.02)
        engine.unload("d")
        assert await waiting == alone(lm, TEXTS[0], greedy(), prompt)
        await running
        with pytest.raises(PromptGone):
            await whole(engine, Work("d", TEXTS[0], greedy()))

    with LocalEngine(lm, max_rows=1) as engine:
        engine.load(prompt, "d")
        asyncio.run(go(engine))


def test_an_end_within_the_grace_finishes_and_after_it_cuts(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    advance, close = Lanes.advance, LocalEngine.close

    def waiting(self: Lanes) -> Any:
        stopped.wait(60)  # nothing is finished before the engine is asked to stop
        return advance(self)

    def closing(self: LocalEngine) -> None:
        close(self)
        # Only now, when a grace of 0 has passed and the cut has been asked for too.
        threading.Timer(0.2, stopped.set).start()

    monkeypatch.setattr(Lanes, "advance", waiting)
    monkeypatch.setattr(LocalEngine, "close", closing)

    async def go(grace: float) -> Any:
        stopped.clear()
        engine = LocalEngine(lm)
        engine.start()
        task = asyncio.ensure_future(whole(engine, Work(None, "a", greedy(100))))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop, grace)
        with pytest.raises(ShuttingDown):
            await whole(engine, Work(None, "a", greedy()))
        return (await asyncio.gather(task, return_exceptions=True))[0]

    assert asyncio.run(go(30.0)) == alone(lm, "a", greedy(100))
    assert isinstance(asyncio.run(go(0.0)), ShuttingDown)
    LocalEngine(lm).stop()  # one that never began


def test_a_long_text_is_read_between_the_steps_of_others_and_changes_nothing(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sizes: list[int] = []
    has_company = threading.Event()
    advance, join = Lanes.advance, Lanes.join

    def joining(self: Lanes, requests: Sequence[Request]) -> Any:
        events.extend("join" for row in requests if len(row.row.marks) > len(shorter))
        return join(self, requests)

    def stepping(self: Lanes) -> Any:
        events.append("step")
        has_company.wait(60)  # however the two threads are scheduled
        return advance(self)

    def reading(lm: FrozenLM, row: PrefillRow, positions: int) -> PrefillRow:
        events.append("part")
        if len(row.marks) > len(shorter):
            sizes.append(positions)
        return read_on(lm, row, positions)

    shorter = compile_prompt(lm, prompt_of(lm, 2)).marks(lm, TEXTS[0])  # of the shorter text
    monkeypatch.setattr(Lanes, "advance", stepping)
    monkeypatch.setattr(Lanes, "join", joining)
    monkeypatch.setattr(scheduler, "KNOWN_AS_ONE", 40)
    monkeypatch.setattr(scheduler, "read_on", reading)
    prompt = prompt_of(lm, 2)

    async def go(engine: LocalEngine) -> list[str]:
        first = asyncio.ensure_future(whole(engine, Work(None, "a", greedy(60))))
        while "step" not in events:
            await asyncio.sleep(0.001)
        rest = [asyncio.ensure_future(whole(engine, Work("d", text, greedy()))) for text in (LONG, TEXTS[0])]
        await asyncio.sleep(0)
        has_company.set()
        return await asyncio.gather(first, *rest)

    with LocalEngine(lm, read_beside=8) as engine:
        engine.load(prompt, "d")
        found = asyncio.run(go(engine))
    wanted = [alone(lm, LONG, greedy(), prompt), alone(lm, TEXTS[0], greedy(), prompt)]
    assert found == [alone(lm, "a", greedy(60)), *wanted]
    parts = [place for place, event in enumerate(events) if event == "part"]
    assert len(parts) >= 4
    assert all("step" in events[a:b] for a, b in itertools.pairwise(parts))
    # What is left of it is read as it joins, not between the same two steps as the last part.
    joined = events.index("join")
    assert "step" in events[max(part for part in parts if part < joined) : joined]
    assert sizes == sorted(sizes, reverse=True)  # attending to what is known takes time too
    assert sizes[-1] < sizes[0] <= 8


@pytest.mark.parametrize("architecture", ["Llama", "BLOOM (ALiBi)", "Gemma 2 (sliding window)"])
def test_rows_of_unlike_length_run_in_lanes_each_as_alone(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "LANE_COST_CPU", 60)
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer())
    compiled = [compile_prompt(lm, prompt) for prompt in (None, prompt_of(lm, 1), prompt_of(lm, 2))]
    rng, most, everyone = random.Random(0), 0, []
    running = Lanes(lm, max_rows=7)
    waiting = [
        request(lm, rng.choice(compiled), rng.choice([*TEXTS, LONG]), greedy(rng.randint(1, 25)))
        for _ in range(40)
    ]
    everyone = list(waiting)
    while waiting or len(running):
        joining = [
            waiting.pop()
            for _ in range(min(len(waiting), running.max_rows - len(running), rng.randint(0, 3)))
        ]
        assert running.fits(joining)
        running.join(joining)
        if len(running) and rng.random() < 0.1:
            gone = rng.choice(running.requests)
            running.cancel(gone)
            everyone.remove(gone)
        running.advance()
        most = max(most, len(running.sizes))
    assert most > 1
    assert running.bytes == 0
    for row in everyone:
        solo = Running(lm, max_rows=1)
        again = request(
            lm,
            compiled[0],
            row.row.marks,
            row.settings,
            row=PrefillRow(row.row.state, row.row.marks, row.row.vectors_PD),
        )
        solo.admit([again])
        while len(solo):
            solo.step()
        assert again.token_ids == row.token_ids


@pytest.mark.parametrize("long_first", [True, False])
def test_many_short_rows_leave_a_long_one_alone_however_they_come(lm: FrozenLM, long_first: bool) -> None:
    """Each short row alone would add little padding; together they would compute the long one's columns 30 times."""
    running = Lanes(lm, max_rows=64, lane_cost=1_000)
    base = compile_prompt(lm, None)
    long = [request(lm, base, LONG, greedy(60))]
    short = [[request(lm, base, "a", greedy(3))] for _ in range(60)]
    for joining in [long, *short] if long_first else [*short, long]:
        running.join(joining)
    assert len(running.sizes) == 2
    assert min(running.sizes) <= 1 + 1_000 // 60
    together = Lanes(lm, max_rows=64, lane_cost=1_000)
    together.join(
        [request(lm, base, row.row.marks, row.settings) for row in [*long, *(each[0] for each in short)]]
    )
    assert sorted(together.sizes) == [1, 60]


def test_buffers_shrink_when_a_long_row_has_left(lm: FrozenLM) -> None:
    running = Running(lm, max_rows=8)
    base = compile_prompt(lm, None)
    short = [request(lm, base, "a", greedy(12)) for _ in range(2)]
    long = [request(lm, base, LONG, greedy(3)) for _ in range(6)]
    running.admit([*short, *long])
    before = running.bytes
    while any(row.finish_reason is None for row in long):
        running.step()
    assert running.bytes * 4 < before
    while len(running):
        running.step()
    assert {row.text for row in short} == {alone(lm, "a", greedy(12))}


@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_a_text_read_in_parts_is_the_text(lm: FrozenLM, positions: int) -> None:
    prompt = compile_prompt(lm, prompt_of(lm, 1, "{text}{soft:4}!"))
    row = prompt.row(prompt.marks(lm, LONG))
    while row.rest > 1:
        before = row.rest
        row = read_on(lm, row, positions)
        assert before > row.rest >= 1
    read = request(lm, prompt, row.marks, greedy(), row=row)
    solo = Running(lm, max_rows=1)
    solo.admit([read])
    while len(solo):
        solo.step()
    assert read.text == generate(lm, [LONG], prompt, greedy())[0].text


def test_a_prompt_of_one_request_does_not_wait_for_another_prompts_many(lm: FrozenLM) -> None:
    """Without keys everybody is one owner; prompts take turns all the same."""
    order: list[str] = []

    async def go(engine: LocalEngine) -> None:
        async def ask(digest: str) -> None:
            await whole(engine, Work(digest, "a", greedy(6)))
            order.append(digest)

        many = [asyncio.ensure_future(ask("many")) for _ in range(20)]
        await asyncio.sleep(0)
        few = asyncio.ensure_future(ask("few"))
        await asyncio.sleep(0)
        engine.start()  # when all of them wait, however the two threads are scheduled
        await asyncio.gather(few, *many)

    engine = LocalEngine(lm, max_rows=1)
    for seed, digest in enumerate(("many", "few")):
        engine.load(prompt_of(lm, seed), digest)
    asyncio.run(go(engine))
    engine.stop()
    assert order.index("few") <= 2


def test_a_cancelled_work_ends_with_what_it_has_and_frees_its_place(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count()
    is_cancelled = threading.Event()
    advance = Lanes.advance

    def waiting(self: Lanes) -> Any:
        if next(steps) > 8:
            is_cancelled.wait(60)  # it does not end by itself before it is cancelled
        return advance(self)

    monkeypatch.setattr(Lanes, "advance", waiting)

    async def go(engine: LocalEngine) -> None:
        long, waits = (Work(None, TEXTS[0], greedy(200)) for _ in range(2))
        pieces: list[str] = []

        async def follow(work: Work) -> list[Finished]:
            ended: list[Finished] = []
            async for answer in engine.submit(work):
                if isinstance(answer, Finished):
                    ended.append(answer)
                else:
                    pieces.append(answer.text)
            return ended

        tasks = [asyncio.ensure_future(follow(work)) for work in (long, waits)]
        while len(pieces) < 3:
            await asyncio.sleep(0.001)
        engine.cancel(waits)
        engine.cancel(long)
        is_cancelled.set()
        # Each stream's own end: which of two streams is read first is the event loop's affair.
        [ran], [waited] = await asyncio.gather(*tasks)
        assert [ran.reason, waited.reason] == ["cancelled", "cancelled"]
        assert waited.token_ids == ()
        assert 3 <= len(ran.token_ids) < 200
        assert alone(lm, TEXTS[0], greedy(200)).startswith(ran.text)
        assert "".join(pieces) == ran.text
        engine.cancel(long)  # over already
        engine.cancel(Work(None, "a", greedy()))  # unknown
        assert await whole(engine, Work(None, "a", greedy())) == alone(lm, "a", greedy())
        assert engine.health()["running"] == engine.health()["waiting"] == 0

    with LocalEngine(lm, max_rows=1) as engine:
        asyncio.run(go(engine))


def test_the_room_of_an_engine_is_what_it_still_takes(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    is_seen = threading.Event()
    advance = Lanes.advance

    def waiting(self: Lanes) -> Any:
        is_seen.wait(60)  # no row ends before the room has been looked at
        return advance(self)

    monkeypatch.setattr(Lanes, "advance", waiting)

    async def go(engine: LocalEngine) -> None:
        assert engine.room() == Room(rows=2, requests=3, bytes=10**6)
        tasks = [asyncio.ensure_future(whole(engine, Work(None, "a", greedy(60)))) for _ in range(2)]
        await asyncio.sleep(0)
        engine.start()  # both join at once
        while engine.health()["running"] < 2 or not engine.health()["kv_bytes"]:
            await asyncio.sleep(0.001)
        tasks += [asyncio.ensure_future(whole(engine, Work(None, "a", greedy(2)))) for _ in range(2)]
        while engine.health()["waiting"] < 2:
            await asyncio.sleep(0.001)
        room = engine.room()
        assert (room.rows, room.requests) == (0, 1)
        assert room.bytes == 10**6 - engine.health()["kv_bytes"] < 10**6
        is_seen.set()
        await asyncio.gather(*tasks)

    engine = LocalEngine(lm, max_rows=2, max_waiting=3, memory_bytes=10**6)
    asyncio.run(go(engine))
    engine.stop()


@pytest.mark.parametrize("max_waiting", [0, 1])
def test_requests_that_find_a_free_row_are_taken_however_short_the_queue(
    lm: FrozenLM, max_waiting: int
) -> None:
    """All come before the engine's next turn, so that none of them has its row yet."""

    async def go(engine: LocalEngine) -> list[Any]:
        tasks = [asyncio.ensure_future(whole(engine, Work(None, "a", greedy(4)))) for _ in range(6)]
        await asyncio.sleep(0)
        engine.start()
        return await asyncio.gather(*tasks, return_exceptions=True)

    engine = LocalEngine(lm, max_rows=3, max_waiting=max_waiting)
    found = asyncio.run(go(engine))
    engine.stop()
    taken = 3 + max_waiting
    assert found[:taken] == [alone(lm, "a", greedy(4))] * taken
    assert {type(each) for each in found[taken:]} == {Overloaded}


def test_scores_of_an_engine_are_those_of_scoring(lm: FrozenLM) -> None:
    prompt = prompt_of(lm, 5)
    with LocalEngine(lm) as engine:
        engine.load(prompt, "d")
        assert engine.prompts == {"d"}
        rated = asyncio.run(engine.score("d", TEXTS[0], " jumps", 2))
        (scored,) = score(lm, [TEXTS[0]], " jumps", prompt)
        assert [token.token_id for token in rated] == list(scored.token_ids)
        assert [token.log_probability for token in rated] == pytest.approx(scored.token_log_probabilities)
        assert all(len(token.likeliest) == 2 for token in rated)
        of_the_input = asyncio.run(engine.score(None, TEXTS[0]))
        assert [token.token_id for token in of_the_input] == lm.tokenizer(TEXTS[0])["input_ids"]
        with pytest.raises(PromptGone):
            asyncio.run(engine.score("gone", "a"))


def test_more_short_texts_are_read_at_a_time_where_more_requests_wait_than_rows_run(lm: FrozenLM) -> None:
    """Budgets by hand: 8 positions between two steps, times the requests that wait for each running row, at most 8 times."""
    waiting = Waiting(threading.Condition())
    rows = scheduler.Scheduler(lm, HeldPrompts(lm), waiting, max_rows=64, read_beside=8)
    loop = asyncio.new_event_loop()

    def put(count: int, length: int = 4) -> None:
        for _ in range(count):
            waiting.add(Ticket(Work(None, [5, 6, 7, 8] * (length // 4), greedy(60)), None, loop))

    put(1)
    rows.admit()
    assert len(rows.lanes) == 1
    put(20)
    rows.admit()  # 20 wait for one: 8 times 8 positions
    assert len(rows.lanes) == 1 + 16
    put(60)
    rows.admit()  # 64 wait for 17: 3 times 8 positions
    assert len(rows.lanes) == 17 + 6
    while rows.lanes.requests:
        rows.lanes.cancel(rows.lanes.requests[0])
    for ticket in waiting.all():
        rows.drop(ticket)
    put(1)
    rows.admit()
    put(8, length=32)
    rows.admit()  # a long text is read in parts of 8 however many wait
    assert len(rows.lanes) == 1
    assert [row.row.known for row in rows.reading[:1]] == [8]
    loop.close()
