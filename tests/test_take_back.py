"""A step that led over an edge is taken back, a hard batch is not mistaken for one, and a kill changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.errors import NotFinite
from softprompt.loss.gradient import Loss
from softprompt.progress.events import Event, Note, Stepped
from softprompt.prompt.reparam import Direct
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.learner import Learner
from softprompt.tuning.loop import tune
from softprompt.tuning.plan import Plan
from softprompt.tuning.rate import TRIED_STEPS, take_back_last_step
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from softprompt.tuning.step_length import StepLength
from softprompt.tuning.together import tune_together
from test_learn import SPLITS, lm_of, recipe, vectors

# Every number of the prompt moves by the rate at each step, along a loss of one slope everywhere.
EVEN_STEPS = ("tune.optimizer=adamw", "tune.schedule=constant", "tune.warmup=0", "tune.clip=1e9")
SEVEN = (
    *EVEN_STEPS,
    "prompt.kind=deep",
    "tune.max_steps=7",
    "tune.epochs=99",
    "tune.checkpoint_steps=1",
    "tune.valid_every_steps=7",
)


def cliff(before: torch.Tensor, edge: float, height: float) -> Loss:
    """10 nats and the mean way from `before`; `height` more where the first number has gone further down than `edge`."""

    def loss(batch: Any, prompt: Any = None) -> torch.Tensor:
        trained = int(batch.trained_BS[:, 1:].sum())
        if prompt is None:
            return torch.full((trained,), 10.0)
        way = prompt[0] - before
        is_beyond = bool(way.flatten()[0] < -edge)
        level: torch.Tensor = 10.0 + way.mean() + (height if is_beyond else 0.0)
        return level.expand(trained)

    return loss


def ran(
    folder: Path,
    height: float,
    *overrides: str,
    edge_rates: float = 16.9,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[list[Event], Any, float]:
    """Seven steps towards an edge, `edge_rates` away, that the sixth would cross: the events, the result, and the first step's rate."""
    lm, settings = lm_of(), recipe(folder, "tune.learning_rate=auto", *SEVEN, *overrides)
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    before, rate = start(plan)()[0].detach(), plan.learning_rate
    events: list[Event] = []

    def note(event: Event) -> None:
        events.append(event)
        on_event(event)

    resume = any((folder / "checkpoints").glob("*"))
    # The bound of keys and values is so low that 10 nats are never promised: the rate is that bound.
    loss = cliff(before, edge_rates * rate, height)
    return events, tune(settings, lm=lm, splits=SPLITS, loss=loss, on_event=note, resume=resume), rate


def steps(events: list[Event]) -> list[Stepped]:
    return [event for event in events if isinstance(event, Stepped)]


@pytest.fixture(autouse=True)
def _to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are text, but the losses of these tests are made, and fall all the way."""
    monkeypatch.setattr(Plan, "loss_falls_to_zero", True)


@pytest.mark.parametrize("height", [50.0, math.inf, math.nan])
def test_a_step_over_an_edge_is_taken_back_and_later_ones_are_half_as_long(
    tmp_path: Path, height: float
) -> None:
    """By hand, in rates of the first step: 1, 2 and 2 (doubled), 4, 4 and 4 (doubled again) come to 17; the edge is at
    16.9. Of the sixth a quarter is left, 14, and the seventh is 2 long: 16, where the loss is 10 less 16 rates."""
    events, result, rate = ran(tmp_path / "p", height)
    assert [event.learning_rate for event in steps(events)] == pytest.approx(
        [rate * factor for factor in (1, 2, 2, 4, 4, 4, 2)]
    )
    levels = [0, 1, 3, 5, 9, 13, 14]  # where each step began
    assert [event.nll for event in steps(events)] == pytest.approx(
        [10 - rate * level for level in levels], rel=1e-5
    )
    assert result.nll_after == pytest.approx(10 - 16 * rate, rel=1e-5)
    (said,) = [event.text for event in events if isinstance(event, Note) and "taken back" in event.text]
    assert said.startswith("Step 6: ")
    assert f"lowered to {2 * rate:.2g}" in said


def test_without_an_edge_nothing_is_said_and_no_step_is_shorter(tmp_path: Path) -> None:
    events, _, rate = ran(tmp_path / "p", 0.0)
    assert steps(events)[-1].learning_rate == pytest.approx(4 * rate)
    assert not [event for event in events if isinstance(event, Note) and "taken back" in event.text]


def test_a_rate_that_was_given_is_kept_whatever_the_loss_does(tmp_path: Path) -> None:
    events = ran(tmp_path / "p", 50.0, "tune.learning_rate=1.0", edge_rates=5.5)[0]
    assert [event.learning_rate for event in steps(events)] == pytest.approx([1.0] * 7)
    assert max(event.nll for event in steps(events)) > 50


def test_a_loss_that_is_not_finite_on_either_side_still_ends_the_run(tmp_path: Path) -> None:
    """Not an endless hunt for a shorter step: that quarter of the sixth step is not finite either."""
    lm, settings = lm_of(), recipe(tmp_path / "p", "tune.learning_rate=auto", *SEVEN)
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    before = start(plan)()[0].detach()
    with pytest.raises(NotFinite, match="Step 7"):
        tune(settings, lm=lm, splits=SPLITS, loss=cliff(before, 13.5 * plan.learning_rate, math.nan))


def test_a_run_that_was_killed_before_a_step_is_taken_back_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole", 50.0)[1]

    def kill(event: Event) -> None:
        if isinstance(event, Note) and "taken back" in event.text:
            raise SystemExit

    with pytest.raises(SystemExit):
        ran(tmp_path / "cut", 50.0, on_event=kill)
    events, again, _ = ran(tmp_path / "cut", 50.0)
    assert [event.step for event in steps(events)] == [7]
    assert torch.equal(vectors(again), vectors(whole))


def test_side_by_side_a_step_is_taken_back_as_alone(tmp_path: Path) -> None:
    _, alone, rate = ran(tmp_path / "alone", 50.0)
    lm, settings = lm_of(), recipe(tmp_path / "first", "tune.learning_rate=auto", *SEVEN)
    before = start(make_plan(settings, lm=lm, splits=SPLITS))()[0].detach()
    recipes = [settings, settings.changed([f"out={tmp_path / 'second'}"])]
    results = tune_together(recipes, lm=lm, splits=SPLITS, loss=cliff(before, 16.9 * rate, 50.0))
    for result in results:
        assert torch.equal(vectors(result), vectors(alone))


def stepped(folder: Path) -> Learner:
    """A learner that has moved each number from 0 to -0.25, where batches had 1 nat."""
    learner = Learner(Direct((torch.zeros(4, 8),)), recipe(folder, *EVEN_STEPS).tune, 0.25, 100)
    learner.length.tried_steps = TRIED_STEPS
    learner.form.value_PW.grad = torch.ones(4, 8)  # type: ignore[union-attr]
    assert learner.step(1.0)
    return learner


@pytest.mark.parametrize(
    ("quarter", "caused"),
    # By hand: of a rise by 4 nats, a third is 1.333.
    [(3.66, True), (3.67, False), (5.5, False), (math.nan, False), (math.inf, False)],
)
def test_a_step_is_the_cause_where_a_quarter_of_it_leaves_two_thirds_of_the_rise(
    tmp_path: Path, quarter: float, caused: bool
) -> None:
    learner = stepped(tmp_path)
    there = learner.snapshot()[0]

    def nll_of(prompt: Plain) -> float:
        torch.testing.assert_close(prompt[0], torch.full((4, 8), -0.0625))
        return quarter

    assert take_back_last_step(learner, 5.0, nll_of) is caused
    assert learner.length.times_doubted == 1  # also where the rows were to blame
    assert learner.length.learning_rate == (0.125 if caused else 0.25)
    if caused:
        torch.testing.assert_close(learner.snapshot()[0], torch.full((4, 8), -0.0625))
    else:
        assert torch.equal(learner.snapshot()[0], there)


def length(folder: Path, usual_nll: float) -> StepLength:
    length = StepLength(0.1, recipe(folder).tune, 30)
    length.tried_steps, length.usual_nll = TRIED_STEPS, usual_nll
    return length


@pytest.mark.parametrize(
    ("usual", "nll", "is_doubted"),
    [(1.0, 2.4, False), (1.0, 2.6, True), (0.01, 0.5, False), (0.01, 0.6, True), (1.0, math.nan, True)],
)
def test_a_batch_far_above_the_usual_loss_doubts_the_step_before(
    tmp_path: Path, usual: float, nll: float, is_doubted: bool
) -> None:
    assert length(tmp_path, usual).is_doubted(5, nll) is is_doubted


def test_the_first_steps_are_tried_instead_and_a_tenth_of_all_may_be_doubted(tmp_path: Path) -> None:
    early = length(tmp_path, 1.0)
    assert [early.is_doubted(done, 9.0) for done in (3, 4, 5)] == [False, False, True]
    early.lower(10)  # after a return the first ones are tried again
    early.usual_nll = 1.0
    assert [early.is_doubted(done, 9.0) for done in (14, 15)] == [False, True]
    early.times_doubted = 3  # of 30 steps
    assert not early.is_doubted(20, 9.0)
    without = length(tmp_path, 1.0)
    without.tried_steps = ()
    assert not without.is_doubted(20, 9.0)


def test_the_rate_is_halved_four_times_at_most(tmp_path: Path) -> None:
    halved = length(tmp_path, 1.0)
    for _ in range(4):
        assert halved.is_doubted(20, 9.0)
        halved.halve()
    assert halved.learning_rate == pytest.approx(0.1 / 16)
    assert not halved.is_doubted(20, 9.0)


def test_doubts_are_counted_on_after_a_kill(tmp_path: Path) -> None:
    killed, again = length(tmp_path, 1.0), length(tmp_path, math.nan)
    killed.times_doubted = 3
    killed.halve()
    again.restore(killed.state())
    assert (again.times_doubted, again.times_taken_back, again.usual_nll) == (3, 1, 1.0)
    assert not again.is_doubted(20, 9.0)


def test_after_a_return_rates_rise_again_to_half_of_what_they_were_where_a_step_was_taken_back(
    tmp_path: Path,
) -> None:
    """Or the rate would rise again to where the edge was."""
    rising = length(tmp_path, 1.0)
    rising.highest_rate = 0.8
    rising.note_taken(0.8, 1.0)
    rising.lower(10)
    rising.halve()
    for _ in range(30):
        rising.note_taken(rising.highest_rate, 1.0)
    assert rising.highest_rate == pytest.approx(0.4)
