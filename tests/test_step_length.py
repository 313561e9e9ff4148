"""How far a step goes where the loss can fall to zero, as that of labels, and where most of it stays, as that of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt.data.example import Example, Splits
from softprompt.loss.divergence import DivergenceLoss
from softprompt.loss.fast import FastLoss
from softprompt.tuning.plan import Plan
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.run import Run
from softprompt.tuning.settle import make_plan
from softprompt.tuning.step_length import StepLength
from test_learn import SPLITS, lm_of
from test_learn import recipe as text_recipe


def length(nlls: list[float], *, promises_all: bool = False) -> StepLength:
    """After batches of these losses, with rates from 0.01 to 10."""
    made = StepLength(0.01, Recipe.from_flags({}, ["data.source=x"]).tune, 100)
    made.highest_rate, made.promises_all = 10.0, promises_all
    for nll in nlls:
        made.note_taken(0.1, nll)
    return made


SIXTEEN = [9.0] * 4 + [2.0] * 4 + [1.5] * 8


def test_of_text_a_step_promises_what_as_many_more_would_take_away_by_hand() -> None:
    assert length(SIXTEEN).share_to_fall == pytest.approx(1 / 3)  # from 2 to 1.5, of 1.5
    # A slope of 2 nats a unit of rate: a third of 1.2 nats are 0.4, at a rate of 0.2.
    assert length(SIXTEEN).measured(1.2, 2.0) == pytest.approx(0.2)
    assert length(SIXTEEN, promises_all=True).measured(1.2, 2.0) == pytest.approx(0.6)


def test_text_that_falls_no_further_takes_the_lowest_rate() -> None:
    assert length([2.0] * 20).measured(2.0, 0.001) == 0.01
    assert length([2.0] * 10 + [2.5] * 10).measured(2.0, 0.001) == 0.01
    assert length([0.0] * 20).measured(2.0, 0.001) == 0.01
    assert length([2.0] * 20, promises_all=True).measured(2.0, 0.001) == 10.0


def test_a_few_batches_say_nothing_of_how_a_loss_falls() -> None:
    assert length([2.0] * 7).share_to_fall == 1.0
    assert length([2.0] * 8).share_to_fall == 0.0
    returned = length(SIXTEEN)
    returned.lower(16)
    assert returned.share_to_fall == 1.0  # the losses on the way that was left are not those of this one


def test_a_longer_step_raises_the_lowest_rate_only_where_the_whole_loss_may_be_promised() -> None:
    labels, text = length([], promises_all=True), length([])
    for made in (labels, text):
        made.lengthen(2)
        assert made.highest_rate == 20.0
    assert (labels.learning_rate, text.learning_rate) == (0.02, 0.01)
    for made in (labels, text):
        made.lengthen(0.5)
        assert made.highest_rate == 10.0
    assert (labels.learning_rate, text.learning_rate) == (0.01, 0.005)


def test_another_process_goes_on_with_what_was_seen_of_the_losses() -> None:
    first, second = length(SIXTEEN), length([])
    second.restore(first.state())
    assert second.share_to_fall == first.share_to_fall
    second.note_taken(0.1, 1.0)
    assert len(first.summed_nlls) == 17  # its own are not touched
    older = {name: value for name, value in first.state().items() if name != "summed_nlls"}
    second.restore(older)  # of a version that did not keep them
    assert second.share_to_fall == pytest.approx(1 / 3, abs=0.1)


def rows(targets: list[str]) -> Splits:
    train = tuple(Example({"text": f"word {n}", "label": target}, row=n) for n, target in enumerate(targets))
    return Splits(train, train[:2], (), "made for the tests")


def plan(splits: Splits, *overrides: str) -> Plan:
    given = ["data.source=x", "data.target=label", "prompt.length=3", "tune.batch_size=4"]
    return make_plan(Recipe.from_flags({}, [*given, *overrides]), lm=lm_of(), splits=splits)


def test_labels_are_targets_that_most_rows_share_with_others() -> None:
    assert plan(rows(["thank you", "order", "never"] * 4)).loss_falls_to_zero
    assert not plan(rows([f"order {n} never came" for n in range(12)])).loss_falls_to_zero
    # Few rows of many labels: 8 of 12 rows have one that another has too.
    assert plan(rows([f"{n}" for n in range(4)] * 2 + [f"{n}" for n in range(4, 8)])).loss_falls_to_zero
    assert not plan(rows(["0"] * 5 + [f"{n}" for n in range(1, 8)])).loss_falls_to_zero
    # Running text without a target, and the same rows where a teacher's probabilities are learned.
    text = make_plan(text_recipe(Path("p")), lm=lm_of(), splits=SPLITS)
    assert not text.loss_falls_to_zero
    taught = make_plan(
        text_recipe(Path("p")), lm=text.lm, splits=SPLITS, loss=DivergenceLoss(FastLoss(text.lm), {})
    )
    assert taught.loss_falls_to_zero


LABELS, TEXT = ["thank you", "order"] * 6, [f"order {n}" for n in range(12)]


@pytest.mark.parametrize(
    ("targets", "kind", "all_of_it"),
    [(LABELS, "deep", True), (TEXT, "deep", False), (LABELS, "soft", True), (TEXT, "soft", True)],
)
def test_only_a_deep_prompts_steps_on_text_may_not_promise_the_whole_loss(
    tmp_path: Path, targets: list[str], kind: str, all_of_it: bool
) -> None:
    run = Run(plan(rows(targets), f"out={tmp_path / 'p'}", f"prompt.kind={kind}"), lambda event: None)
    assert run.learner.length.promises_all == all_of_it
