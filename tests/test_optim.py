"""Optimisers and schedules against hand arithmetic and other implementations."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from softprompt.prompt.reparam import Direct
from softprompt.tuning.learner import Learner, prepare_each
from softprompt.tuning.optim import (
    MOMENTUM,
    Adafactor,
    Muon,
    automatic_rate,
    orthogonalised,
    rate_factor,
)
from softprompt.tuning.recipe import TuneSettings


def test_the_rate_rises_over_the_warm_up_and_falls_in_a_line_to_nearly_nothing() -> None:
    """10 steps, 2 of them warm-up: a third, two thirds, then 8 equal stairs down from the top."""
    found = [rate_factor("linear", step, 10, 0.2) for step in range(1, 11)]
    wanted = [1 / 3, 2 / 3, *(1 - n / 8 for n in range(8))]
    assert found == pytest.approx(wanted)


def test_the_cosine_is_halfway_down_in_the_middle() -> None:
    assert rate_factor("cosine", 1, 8, 0) == pytest.approx(1.0)
    assert rate_factor("cosine", 5, 8, 0) == pytest.approx(0.5)
    assert rate_factor("cosine", 7, 8, 0) == pytest.approx((1 + math.cos(math.pi * 0.75)) / 2)


def test_the_warm_up_is_the_optimisers_own_unless_given() -> None:
    assert [TuneSettings(optimizer=name).warmup_share for name in ("muon", "adamw", "adafactor")] == [
        0.0,
        0.06,
        0.06,
    ]
    assert TuneSettings(warmup=0.1).warmup_share == 0.1


def test_a_constant_rate_stays() -> None:
    assert [rate_factor("constant", step, 5, 0) for step in range(1, 6)] == [1.0] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_has_a_rate_of_nothing(schedule: str) -> None:
    for steps in (1, 2, 7):
        assert all(rate_factor(schedule, step, steps, 0.06) > 0 for step in range(1, steps + 1))


def test_the_automatic_rate_follows_the_scale_of_the_table() -> None:
    table_VD = torch.full((50, 8), 0.1)
    assert automatic_rate(table_VD, 0.5) == pytest.approx(0.05)
    assert automatic_rate(table_VD * 10, 0.5) == pytest.approx(0.5)


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


def test_muons_first_step_is_the_polar_factor_of_the_gradient() -> None:
    """By hand: diag(3, -4) rotated is the rotation and a reflection times sizes; only the sizes go."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    value = torch.nn.Parameter(torch.zeros(2, 2))
    value.grad = turn @ torch.diag(torch.tensor([3.0, -4.0]))
    Muon([value], lr=0.1).step()
    wanted = -0.1 * 2**0.5 * turn @ torch.diag(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(value.detach(), wanted, atol=1e-4, rtol=0)


def test_muon_goes_the_way_of_torchs() -> None:
    """torch.optim.Muon comes near the polar factor by five products; its steps are 0.2 of a root mean square of 1."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(8, 24)) for _ in range(2))
    one = Muon([ours], lr=0.2)
    other = torch.optim.Muon(
        [theirs], lr=1.0, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ours.grad = torch.randn(8, 24, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    alike = torch.cosine_similarity(ours.detach().flatten(), theirs.detach().flatten(), dim=0)
    assert alike > 0.97
    torch.testing.assert_close(ours.detach().norm(), theirs.detach().norm(), rtol=0.2, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 6), (6,)])
def test_a_step_of_muon_has_the_rate_as_its_root_mean_square(shape: tuple[int, ...]) -> None:
    value = torch.nn.Parameter(torch.zeros(shape))
    value.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6
    Muon([value], lr=0.3).step()
    assert value.detach().square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-2)


def test_muon_goes_nowhere_where_the_gradient_says_nothing() -> None:
    """A gradient of rank one moves along that direction alone; none at all moves nothing."""
    down, across = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    value = torch.nn.Parameter(torch.zeros(2, 3))
    value.grad = torch.outer(down, across)
    Muon([value], lr=1.0).step()
    wanted = -(3**0.5) * torch.outer(down / 5, across / 3)
    torch.testing.assert_close(value.detach(), wanted, atol=1e-3, rtol=0)
    still = torch.nn.Parameter(torch.ones(2, 3))
    still.grad = torch.zeros(2, 3)
    Muon([still], lr=1.0).step()
    assert torch.equal(still.detach(), torch.ones(2, 3))


def test_muon_does_not_blow_up_rounding() -> None:
    """Noise of a millionth, which is what sums in another order differ by, hardly changes a step."""
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(8, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    noise = torch.randn(8, 24, generator=generator)
    noise *= 1e-6 * thin.norm() / noise.norm()
    torch.testing.assert_close(orthogonalised(thin), orthogonalised(thin + noise), atol=2e-3, rtol=0)


def test_parts_side_by_side_are_matrices_of_their_own() -> None:
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) * 10**n for n in range(2)]
    apart = torch.cat([orthogonalised(one) for one in gradients], 1)
    torch.testing.assert_close(orthogonalised(torch.cat(gradients, 1), parts=2), apart)
    torch.testing.assert_close(apart[:, :4] @ apart[:, :4].T, 4 * torch.eye(3), atol=0.01, rtol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_a_learner_goes_on_from_its_state_to_the_bit(optimizer: str) -> None:
    def made() -> Learner:
        return Learner(Direct((torch.ones(4, 6),)), TuneSettings(optimizer=optimizer), 0.1, 5)  # type: ignore[arg-type]

    def move(learner: Learner, gradient: torch.Tensor) -> None:
        learner.parameters[0].grad = gradient.clone()
        assert learner.step()

    whole, first, second = made(), made(), made()
    for gradient in gradients():
        move(whole, gradient)
    for gradient in gradients()[:3]:
        move(first, gradient)
    second.restore(first.state())
    for gradient in gradients()[3:]:
        move(second, gradient)
    assert torch.equal(whole.snapshot()[0], second.snapshot()[0])


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    learner = Learner(Direct((torch.ones(2, 2),)), TuneSettings(), 0.1, 5)
    learner.parameters[0].grad = torch.tensor([[1.0, math.nan], [0.0, 0.0]])
    assert not learner.step()
    assert torch.equal(learner.snapshot()[0], torch.ones(2, 2))
    assert learner.steps_done == 0


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    """AdamW's second step after a long gradient tells whether the first was clipped; Adafactor's first does not."""
    learner = Learner(Direct((torch.zeros(1, 2),)), TuneSettings(optimizer="adamw", clip=1.0), 0.1, 5)
    learner.parameters[0].grad = torch.tensor([[30.0, 40.0]])
    learner.step()
    state = learner.optimiser.state[learner.parameters[0]]
    torch.testing.assert_close(state["exp_avg"], 0.1 * torch.tensor([[0.6, 0.8]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("parts", "rows", "columns"), [(5, 4, 6), (3, 6, 4), (2, 1, 8)])
def test_a_matrix_is_as_even_as_its_singular_values_say(parts: int, rows: int, columns: int) -> None:
    drawn = torch.Generator().manual_seed(4)
    apart = torch.randn(parts, rows, columns, generator=drawn)
    apart[0, -1] = 1e-3 * apart[0, -1]  # a faint direction
    apart[-1] = 0.0
    left, sizes, right = torch.linalg.svd(apart.double(), full_matrices=False)
    shares = sizes / torch.hypot(sizes, 1e-2 * sizes[:, :1]).clamp(min=1e-300)
    wanted = max(rows, columns) ** 0.5 * left @ torch.diag_embed(shares) @ right
    side_by_side = apart.transpose(0, 1).reshape(rows, parts * columns)
    even = orthogonalised(side_by_side, parts).reshape(rows, parts, columns).transpose(0, 1)
    torch.testing.assert_close(even, wanted.float(), atol=1e-5, rtol=1e-5)


def test_steps_side_by_side_are_those_of_each_alone() -> None:
    """Prompts of two lengths, deep and plain, one gradient that is not finite, and optimisers that have no matrices."""

    def learners() -> list[Learner]:
        forms = [Direct((torch.ones(rows, 6),)) for rows in (4, 4, 3, 4)]
        plain = [Learner(form, TuneSettings(), 0.1, 5) for form in forms]
        deep = Direct((torch.ones(2, 4, 2, 3), torch.ones(2, 4, 2, 3)))
        rest = [Direct((torch.ones(4, 6),)), deep]
        adamw = [Learner(form, TuneSettings(optimizer="adamw"), 0.1, 5) for form in rest[:1]]
        return [*plain, *adamw, *(Learner(form, TuneSettings(), 0.1, 5) for form in rest[1:])]

    together, alone = learners(), learners()
    for step in range(3):
        for group in (together, alone):
            drawn = torch.Generator().manual_seed(step)
            for number, learner in enumerate(group):
                for parameter in learner.parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=drawn)
                    if number == step:
                        parameter.grad[0] = math.nan
        prepare_each(together, [1.0] * len(together))
        done = [[learner.step(1.0) for learner in group] for group in (together, alone)]
        assert done == [[n != step for n in range(len(alone))]] * 2
    for learner, other in zip(together, alone, strict=True):
        assert learner.steps_done == other.steps_done
        for one, two in zip(learner.snapshot(), other.snapshot(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
