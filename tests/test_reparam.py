"""Trained forms: each starts at its start, learns, and folds to exactly what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from softprompt.loss.fast import FastLoss
from softprompt.loss.mean import mean_nll
from softprompt.prompt.reparam import FORMS, SharedTimesLowRank, as_plain, as_rows
from softprompt.store.artifact import load_prompt
from softprompt.tuning.learner import Learner
from softprompt.tuning.loop import tune
from softprompt.tuning.optim import Muon
from softprompt.tuning.recipe import TuneSettings
from softprompt.tuning.settle import make_plan
from softprompt.tuning.together import tune_tasks
from test_learn import SPLITS, learn, lm_of, recipe, vectors

P, D = 3, 8


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plain(deep: bool) -> Any:
    if not deep:
        return (torch.randn(P, D, generator=generator()),)
    return tuple(torch.randn(2, P, 2, 4, generator=generator()) + n for n in range(2))


def made(name: str, deep: bool = False) -> Any:
    start = plain(deep)
    table_mW = torch.randn(6, as_rows(start).shape[1], generator=generator())
    return FORMS[name](start, table_mW, 4, generator())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("deep", [False, True], ids=["soft", "deep"])
def test_a_form_starts_exactly_at_its_start(name: str, deep: bool) -> None:
    start, found = plain(deep), made(name, deep)()
    for wanted, given in zip(start, found, strict=True):
        assert torch.equal(wanted, given)


def test_rows_and_plain_prompts_are_each_others_inverse() -> None:
    keys_LPHK, values_LPHK = plain(True)
    rows_PW = as_rows((keys_LPHK, values_LPHK))
    assert rows_PW.shape == (P, 2 * 2 * 4 * 2)
    back = as_plain(rows_PW, tuple(keys_LPHK.shape))
    assert torch.equal(back[0], keys_LPHK)
    assert torch.equal(back[1], values_LPHK)
    torch.testing.assert_close(rows_PW[1].sum(), keys_LPHK[:, 1].sum() + values_LPHK[:, 1].sum())


@pytest.mark.parametrize("name", FORMS)
def test_a_forms_gradient_is_that_of_finite_differences(name: str) -> None:
    form = made(name).double()
    weights_PD = torch.randn(P, D, generator=generator()).double()
    for parameter in form.parameters():  # away from the start, where much is 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator()).double()
    parameters = list(form.parameters())

    def value(*moved: torch.Tensor) -> torch.Tensor:
        named = dict(zip([name for name, _ in form.named_parameters()], moved, strict=True))
        (found,) = torch.func.functional_call(form, named)
        return (found * weights_PD).sum()

    assert torch.autograd.gradcheck(value, parameters, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_has_a_rate_of_its_own_once(name: str) -> None:
    form = made(name)
    listed = [id(one.parameter) for one in form.trained()]
    assert sorted(listed) == sorted(id(parameter) for parameter in form.parameters())
    assert all(one.factor > 0 for one in form.trained())


@pytest.mark.parametrize("steep", ["keys", "values"])
def test_keys_and_values_of_each_head_are_matrices_of_their_own(steep: str) -> None:
    """Of two layers and heads: the gradient of one matrix, however large, does not change the step of any other."""
    form = made("direct", deep=True)
    (trained,) = form.trained()
    assert trained.parts == 2 * 2 * 2
    assert form.deep_shape is not None
    shape = (*form.deep_shape[:3], 2 * form.deep_shape[3])
    places = torch.zeros(shape)  # [L, P, H, keys and values]
    width = form.deep_shape[3]
    places[0, :, 0, :width] = steep == "keys"
    places[0, :, 0, width:] = steep == "values"
    steep_PW = as_rows((places[..., :width], places[..., width:])).bool()
    steps = []
    for factor in (1.0, 100.0):
        parameter = torch.nn.Parameter(trained.parameter.detach().clone())
        parameter.grad = torch.randn(parameter.shape, generator=generator())
        parameter.grad[steep_PW] *= factor
        Muon([{"params": [parameter], "parts": trained.parts}], 0.1).step()
        steps.append(parameter.detach())
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_what_is_saved_scores_exactly_as_what_was_trained(tmp_path: Path, name: str, kind: str) -> None:
    lm = lm_of()
    settings = recipe(tmp_path / "p", f"prompt.form={name}", f"prompt.kind={kind}", "prompt.form_width=6")
    tuned = tune(settings, lm=lm, splits=SPLITS)
    assert tuned.nll_after < tuned.nll_before - 0.005
    loaded: Any = tuple(load_prompt(tmp_path / "p", base=lm.fingerprint).tensors.values())
    held_out = make_plan(settings, lm=lm, splits=SPLITS).held_out
    found = mean_nll(FastLoss(lm), held_out, tuple(loaded))
    assert found == pytest.approx(tuned.nll_after, abs=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_learns_the_same_again_and_from_its_state(name: str) -> None:
    def moved(learner: Learner, steps: int) -> Learner:
        for _ in range(steps):
            learner.form()[0].sum().backward()
            assert learner.step()
        return learner

    def fresh() -> Learner:
        return Learner(made(name), TuneSettings(), 0.1, 6)

    whole, cut, resumed = moved(fresh(), 6), moved(fresh(), 3), fresh()
    resumed.restore(cut.state())
    assert torch.equal(moved(resumed, 3).snapshot()[0], whole.snapshot()[0])


def test_tasks_share_one_part_and_keep_their_own(tmp_path: Path) -> None:
    """Two tasks side by side; each saved prompt is the shared part times the task's own."""
    recipes = []
    for name, examples in (("a", SPLITS.train), ("b", SPLITS.validation + SPLITS.train[:6])):
        data = tmp_path / f"{name}.csv"
        data.write_text("text\n" + "\n".join(row.fields["text"] for row in examples) + "\n", encoding="utf-8")
        recipes.append(
            recipe(
                tmp_path / name,
                f"data.source={data}",
                "data.column=text",
                "data.validation=4",
                "prompt.form=multitask",
                "tune.valid_every_steps=100",  # so at the start and at the end alone
            )
        )
    lm = lm_of()
    tuned = tune_tasks(recipes, lm=lm)
    for one in tuned:
        assert one.nll_after < one.nll_before
        assert one.best_step == one.steps
    ratio_PD = vectors(tuned[0]) / vectors(tuned[1])
    # A quotient of two rank-1 parts is of rank 1: what the tasks share has gone from it.
    singular = torch.linalg.svdvals(ratio_PD.double())
    assert singular[1] < 1e-4 * singular[0]
    assert not torch.equal(vectors(tuned[0]), vectors(tuned[1]))


def test_the_shared_part_moves_along_the_sum_of_the_tasks_gradients() -> None:
    forms = SharedTimesLowRank.of_tasks(plain(False), 3, 2, generator())
    optimisers = [torch.optim.SGD([one.parameter for one in form.trained()], lr=0.1) for form in forms]
    for number, form in enumerate(forms):
        (form.rows() * (number + 1)).sum().backward()
    for optimiser in optimisers:
        optimiser.step()
    torch.testing.assert_close(forms[2].shared_PW.detach(), plain(False)[0] - 0.1 * (1 + 2 + 3))


def test_the_multitask_form_is_pefts() -> None:
    """PEFT's MultitaskPromptEmbedding with the same numbers gives the same prompt."""
    from peft.tuners.multitask_prompt_tuning.model import MultitaskPromptEmbedding

    (form,) = SharedTimesLowRank.of_tasks(plain(False), 1, 2, generator())
    with torch.no_grad():
        form.right_rW += torch.randn(2, D, generator=generator())
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=D, num_tasks=1, num_ranks=2,
        num_transformer_submodules=1, prompt_tuning_init="RANDOM",
    )  # fmt: skip
    theirs = MultitaskPromptEmbedding(config, torch.nn.Embedding(4, D))
    with torch.no_grad():
        theirs.embedding.weight.copy_(form.shared_PW)
        theirs.prefix_task_cols[0] = form.left_Pr
        theirs.prefix_task_rows[0] = form.right_rW
        found = theirs(torch.arange(P)[None], torch.tensor([0]))[0]
    torch.testing.assert_close(found, form.rows().detach())


def test_a_form_is_no_part_of_what_is_stored(tmp_path: Path) -> None:
    tuned = learn(tmp_path / "p", "prompt.form=residual", "tune.epochs=1")
    assert list(tuned.prompt.tensors) == ["embeddings_PD"]
    assert vectors(tuned).shape == (4, 32)
