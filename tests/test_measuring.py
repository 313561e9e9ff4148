"""How often and on how many rows held-out loss is measured: never for longer than a run learns, and said where rows are left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data.example import Example, Splits
from softprompt.progress.events import Event, Note, Started, Validated
from softprompt.tuning.loop import tune
from softprompt.tuning.measuring import measurements, rows_measured
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.settle import make_plan
from test_default_template import base

LABELS = ("praise", "complaint", "question")


def rows(count: int, first: int = 0) -> tuple[Example, ...]:
    """Rows of three labels: a half, a third and a sixth of them."""
    share = (0, 0, 0, 1, 1, 2)
    return tuple(
        Example({"text": f"word {n}", "label": LABELS[share[n % 6]]}, row=first + n) for n in range(count)
    )


def recipe(*overrides: str) -> Recipe:
    given = ["data.source=x", "data.target=label", "prompt.length=3", "tune.batch_size=4"]
    return Recipe.from_flags({}, [*given, *overrides])


def plan(train: int, validation: int, *overrides: str) -> Plan:
    return make_plan(
        recipe(*overrides), lm=base(), splits=Splits(rows(train), rows(validation, train), (), "x")
    )


@pytest.mark.parametrize(
    ("available", "learned", "measured", "times"),
    [
        (90, 10_000, 90, 10),  # 12 x 90 rows are fewer than were learned from
        (872, 1_600, 133, 10),  # 1,600 / 12
        (872, 400, 64, 4),  # a twelfth would be 33, too few to choose by; 400 / 64 less two
        (10_000, 500, 64, 5),
        (872, 200, 64, 2),  # in the middle and at the end
        (872, 8, 64, 2),
        (10, 48, 10, 2),  # 48 / 10 less two
        (10, 60, 10, 4),
    ],
)
def test_the_rows_and_times_of_a_run_by_hand(available: int, learned: int, measured: int, times: int) -> None:
    assert rows_measured(available, learned) == measured
    assert measurements(measured, learned) == times


@given(st.integers(1, 10**6), st.integers(1, 10**7))
def test_measuring_reads_no_more_rows_than_are_learned_from_but_for_the_fewest_that_say_something(
    available: int, learned: int
) -> None:
    count = rows_measured(available, learned)
    times = measurements(count, learned)
    assert count == available or count >= 64
    assert 2 <= times <= 10
    assert (times + 2) * count <= max(learned, 4 * 64)


def test_a_short_run_measures_a_part_of_the_sources_own_split_with_its_share_of_each_label() -> None:
    short = plan(400, 300, "tune.max_steps=10")
    assert len(short.held_out) == len(short.held_out_base) == short.validation_examples == 64
    own = {example.row: example for example in short.splits.validation}
    labels = Counter(own[row.row].fields["label"] for row in short.held_out)
    assert labels == {"praise": 32, "complaint": 21, "question": 11}  # 32, 21.3 and 10.7
    assert [row.row for row in short.held_out] == [row.row for row in short.held_out_base]
    assert short.valid_every_steps == 5  # twice in ten steps
    (said,) = (text for text in short.remarks() if "measured" in text)
    assert said.startswith("Loss is measured on 64 of 300 validation rows")
    again = plan(400, 300, "tune.max_steps=10", "tune.seed=5")
    assert [row.row for row in again.held_out] == [row.row for row in short.held_out]
    other = plan(400, 300, "tune.max_steps=10", "data.seed=1")
    assert [row.row for row in other.held_out] != [row.row for row in short.held_out]


@pytest.mark.parametrize(
    "overrides", [("data.validation=own",), ("data.validation=0.1",), ("data.validation=300",)]
)
def test_what_is_named_is_measured_whole(overrides: tuple[str, ...]) -> None:
    named = plan(400, 300, "tune.max_steps=10", *overrides)
    assert len(named.held_out) == 300
    assert not any("is measured on" in text for text in named.remarks())


def test_a_run_that_is_long_enough_measures_all_of_it_ten_times() -> None:
    long = plan(400, 100, "tune.epochs=3")  # 1,200 rows; 12 x 100 are as many
    assert len(long.held_out) == 100
    assert long.valid_every_steps == 30
    assert not any("is measured on" in text for text in long.remarks())


def test_training_rows_stand_in_for_held_out_ones_in_part_too(tmp_path: Path) -> None:
    none = plan(400, 0, "tune.max_steps=10")
    assert none.judged_on == "training"
    assert len(none.held_out) == 64
    assert none.validation_examples == 0
    assert any(text.startswith("Loss is measured on 64 of 400 training rows") for text in none.remarks())
    assert len(plan(400, 0, "tune.epochs=3").held_out) == 400  # 1,200 / 3


def test_the_run_says_what_it_measures(tmp_path: Path) -> None:
    seen: list[Event] = []
    tune(
        recipe(f"out={tmp_path / 'p'}", "tune.max_steps=8"),
        lm=base(),
        splits=Splits(rows(100), rows(80, 100), (), "x"),
        on_event=seen.append,
        progress=False,
    )
    (started,) = (event for event in seen if isinstance(event, Started))
    assert started.validation_examples == 64
    assert [event.step for event in seen if isinstance(event, Validated)] == [0, 4, 8]
    assert any("64 of 80 validation rows" in event.text for event in seen if isinstance(event, Note))


def test_a_run_of_few_steps_reads_the_rows_that_it_comes_to_and_no_others() -> None:
    few = plan(400, 100, "tune.max_steps=10")
    assert len(few.train.encoded) == len(few.learned_from) == 40
    assert len(few.splits.train) == 400  # labels of all rows count for a start from them
    assert few.steps == few.steps_per_epoch == 10
    assert any(
        text.startswith("40 of 400 rows are learned from, drawn by tune.seed: 10 steps")
        for text in few.remarks()
    )
    drawn = [row.row for row in few.train.encoded]
    assert drawn == [example.row for example in few.learned_from] == sorted(set(drawn))
    assert drawn == [
        row.row for row in few.task.to_learn(few.learned_from, slots=False).encoded
    ]  # as LoRA's arm reads them
    assert drawn == [row.row for row in plan(400, 100, "tune.max_steps=10").train.encoded]
    assert drawn != [row.row for row in plan(400, 100, "tune.max_steps=10", "tune.seed=1").train.encoded]
    assert max(drawn) > 100  # not the first ones: files are sorted


@pytest.mark.parametrize("overrides", [("tune.max_steps=100",), ("tune.max_steps=150",), ("tune.epochs=1",)])
def test_a_run_that_comes_to_all_rows_reads_all(overrides: tuple[str, ...]) -> None:
    whole = plan(400, 100, *overrides)
    assert len(whole.train.encoded) == 400
    assert not any("are learned from" in text for text in whole.remarks())


def test_where_rows_may_be_dropped_all_are_read_since_their_lengths_decide() -> None:
    dropping = plan(400, 100, "tune.max_steps=10", "data.on_overflow=drop")
    assert len(dropping.train.encoded) == 400
    assert dropping.steps == 10
