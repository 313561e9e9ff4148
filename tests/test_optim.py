"""Optimisers and schedules against hand arithmetic and other implementations."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from softprompt.prompt.reparam import Direct
from softprompt.tune.learner import Learner
from softprompt.tune.optim import Adafactor, automatic_rate, rate_factor
from softprompt.tune.recipe import Tune


def test_the_rate_rises_over_the_warm_up_and_falls_in_a_line_to_nearly_nothing() -> None:
    """10 steps, 2 of them warm-up: a third, two thirds, then 8 equal stairs down from the top."""
    found = [rate_factor("linear", step, 10, 0.2) for step in range(1, 11)]
    wanted = [1 / 3, 2 / 3, *(1 - n / 8 for n in range(8))]
    assert found == pytest.approx(wanted)


def test_the_cosine_is_halfway_down_in_the_middle() -> None:
    assert rate_factor("cosine", 1, 8, 0) == pytest.approx(1.0)
    assert rate_factor("cosine", 5, 8, 0) == pytest.approx(0.5)
    assert rate_factor("cosine", 7, 8, 0) == pytest.approx((1 + math.cos(math.pi * 0.75)) / 2)


def test_a_constant_rate_stays() -> None:
    assert [rate_factor("constant", step, 5, 0) for step in range(1, 6)] == [1.0] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_has_a_rate_of_nothing(schedule: str) -> None:
    for steps in (1, 2, 7):
        assert all(rate_factor(schedule, step, steps, 0.06) > 0 for step in range(1, steps + 1))


def test_the_automatic_rate_follows_the_scale_of_the_table() -> None:
    table_VD = torch.full((50, 8), 0.1)
    assert automatic_rate(table_VD) == pytest.approx(0.05)
    assert automatic_rate(table_VD * 10) == pytest.approx(0.5)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator) * 10**n for n in (0, -3, 1, 0, 2)]


def test_adafactor_is_that_of_lester_et_al() -> None:
    """transformers' Adafactor with scaling off, on a vector, whose second moment it does not factor either."""
    ours, theirs = (torch.nn.Parameter(torch.ones(24)) for _ in range(2))
    one = Adafactor([ours], lr=0.3)
    other = transformers.optimization.Adafactor(
        [theirs], lr=0.3, scale_parameter=False, relative_step=False, decay_rate=-0.8
    )
    for gradient in gradients():
        ours.grad, theirs.grad = gradient.flatten(), gradient.flatten().clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_adafactors_first_step_is_the_rate_itself_whatever_the_gradients_size() -> None:
    value = torch.nn.Parameter(torch.zeros(2, 2))
    optimiser = Adafactor([value], lr=0.3)
    value.grad = torch.tensor([[5.0, -1e-3], [7.0, -2.0]])
    optimiser.step()
    torch.testing.assert_close(value.detach(), torch.tensor([[-0.3, 0.3], [-0.3, 0.3]]))


def test_adafactors_decay_takes_its_share_whatever_the_rate() -> None:
    value = torch.nn.Parameter(torch.ones(1))
    optimiser = Adafactor([value], lr=0.3, weight_decay=0.01)
    value.grad = torch.ones(1)
    optimiser.step()
    assert value.item() == pytest.approx(0.99 - 0.3)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_learner_goes_on_from_its_state_to_the_bit(optimizer: str) -> None:
    def made() -> Learner:
        return Learner(Direct(torch.ones(4, 6)), Tune(optimizer=optimizer), 0.1, 5)  # type: ignore[arg-type]

    def move(learner: Learner, gradient: torch.Tensor) -> None:
        learner.parameters[0].grad = gradient.clone()
        assert learner.move()

    whole, first, second = made(), made(), made()
    for gradient in gradients():
        move(whole, gradient)
    for gradient in gradients()[:3]:
        move(first, gradient)
    second.restore(first.state())
    for gradient in gradients()[3:]:
        move(second, gradient)
    assert torch.equal(whole.now(), second.now())  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    learner = Learner(Direct(torch.ones(2, 2)), Tune(), 0.1, 5)
    learner.parameters[0].grad = torch.tensor([[1.0, math.nan], [0.0, 0.0]])
    assert not learner.move()
    assert torch.equal(learner.now(), torch.ones(2, 2))  # type: ignore[arg-type]
    assert learner.step == 0


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    """AdamW's second step after a long gradient tells whether the first was clipped; Adafactor's first does not."""
    learner = Learner(Direct(torch.zeros(1, 2)), Tune(clip=1.0), 0.1, 5)
    learner.parameters[0].grad = torch.tensor([[30.0, 40.0]])
    learner.move()
    state = learner.optimiser.state[learner.parameters[0]]
    torch.testing.assert_close(state["exp_avg"], 0.1 * torch.tensor([[0.6, 0.8]]), rtol=1e-4, atol=0)
