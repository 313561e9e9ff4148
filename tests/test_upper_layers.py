"""Deep prompts that learn in the upper layers alone: loss and gradient against transformers' body, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example, Splits
from softprompt.errors import RecipeError
from softprompt.loss.fast import FastLoss
from softprompt.loss.packed_body import PackedBody
from softprompt.progress.events import Event, Started, Stepped
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from softprompt.tuning.together import tune_together
from tiny_models import tiny_model, tiny_tokenizer

P = 4
ROWS = [
    Encoded([*range(20, 44)], [-1] * 24, [index >= 22 for index in range(24)], 0, 0),
    Encoded([*range(60, 67)], [-1] * 7, [index >= 2 for index in range(7)], 0, 0),
    Encoded([*range(90, 100)], [-1] * 10, [index >= 9 for index in range(10)], 0, 0),
]
WORDS = ["order", "never", "came", "thank", "you", "quick", "help", "lazy", "dog", "nobody"]
SPLITS = Splits(
    tuple(
        Example({"text": " ".join(WORDS[(n + i) % 10] for i in range(3 + n % 4))}, row=n) for n in range(12)
    ),
    (),
    (),
    "made for the tests",
)


def base(architecture: str = "Llama") -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)


def prompt_for(lm: FrozenLM, seed: int = 3) -> Plain:
    drawn = torch.Generator().manual_seed(seed)
    shape = (lm.num_layers, P, lm.fingerprint.kv_heads, lm.fingerprint.head_width)
    return tuple(torch.randn(shape, generator=drawn).requires_grad_() for _ in range(2))


def expected(lm: FrozenLM, prompt: Plain) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss and whole gradient by transformers' own body."""
    nll_N = lm.token_nll(collate(ROWS), prompt)
    return nll_N.detach(), torch.autograd.grad(nll_N.mean(), prompt)


def assert_of_upper_layers(loss: FastLoss, lm: FrozenLM, prompt: Plain, first: int) -> None:
    nll_N, whole = expected(lm, prompt)
    ours_N = loss(collate(ROWS), prompt)
    ours = torch.autograd.grad(ours_N.mean(), prompt)
    torch.testing.assert_close(ours_N.detach(), nll_N, rtol=1e-5, atol=1e-5)
    for our_gradient, gradient in zip(ours, whole, strict=True):
        torch.testing.assert_close(our_gradient[first:], gradient[first:], rtol=1e-4, atol=2e-5)
        assert not our_gradient[:first].any()
        assert gradient[:first].any()  # else the line above would say nothing


@pytest.mark.parametrize(
    "architecture",
    ["Llama", "Mistral (sliding window)", "Qwen2 (sliding window)", "Qwen3", "BLOOM (ALiBi)", "GPT-2"],
)
def test_loss_and_gradient_above_the_cut_are_those_of_all_layers(architecture: str) -> None:
    lm = base(architecture)
    prompt, loss = prompt_for(lm), FastLoss(lm, first_layer=1)
    for _ in range(2):  # the second time from the states that were kept
        assert_of_upper_layers(loss, lm, prompt, 1)
    if isinstance(loss.body, PackedBody):
        assert loss.cut_states.read == len(ROWS)


def test_losses_without_a_gradient_keep_states_that_learning_can_use() -> None:
    lm = base()
    prompt, loss = prompt_for(lm), FastLoss(lm, first_layer=1)
    with torch.inference_mode():
        judged_N = loss(collate(ROWS), prompt)
    torch.testing.assert_close(judged_N, expected(lm, prompt)[0], rtol=1e-5, atol=1e-5)
    assert_of_upper_layers(loss, lm, prompt, 1)
    assert loss.cut_states.read == len(ROWS)


def test_another_prompt_below_the_cut_has_states_of_its_own() -> None:
    lm = base()
    loss, one, two = FastLoss(lm, first_layer=1), prompt_for(lm, 3), prompt_for(lm, 4)
    for prompt in (one, two, one, two):
        assert_of_upper_layers(loss, lm, prompt, 1)
    assert loss.cut_states.read == 2 * len(ROWS)


@pytest.mark.parametrize("recompute", [False, True])
def test_states_beyond_the_budget_are_read_again_and_the_loss_is_the_same(recompute: bool) -> None:
    lm = base()
    prompt = prompt_for(lm)
    one_row = len(ROWS[0]) * lm.width * 4  # float32
    loss = FastLoss(lm, first_layer=1, context_bytes=one_row, recompute=recompute)
    for _ in range(2):
        assert_of_upper_layers(loss, lm, prompt, 1)
    assert loss.cut_states.bytes == one_row
    assert loss.cut_states.read == len(ROWS) + 2


def settings(out: Path, *overrides: str) -> Recipe:
    tree = {"source": "x", "column": "text", "template": "{soft}{text}"}
    whole = Recipe(base="x", out=str(out), data=tree)  # type: ignore[arg-type]
    common = ["prompt.kind=deep", "prompt.length=4", "tune.epochs=3", "tune.batch_size=4"]
    return whole.changed([*common, *overrides])


def values(result: TuneResult) -> Plain:
    return result.prompt.plain


@pytest.mark.parametrize("form", ["direct", "low_rank", "mlp"])
def test_a_run_moves_the_upper_layers_and_leaves_those_below_at_their_start(
    tmp_path: Path, form: str
) -> None:
    lm = base()
    recipe = settings(tmp_path / "p", "prompt.upper_layers=0.5", f"prompt.form={form}")
    begun = start(make_plan(recipe, lm=lm, splits=SPLITS))()
    learned = values(tune(recipe, lm=lm, splits=SPLITS, progress=False))
    cut = lm.num_layers // 2
    for before, after in zip(begun, learned, strict=True):
        assert torch.equal(after[:cut], before[:cut])
        assert not torch.equal(after[cut:], before[cut:])


def test_the_run_counts_the_numbers_that_it_learns(tmp_path: Path) -> None:
    lm = base()
    seen: list[Event] = []
    recipe = settings(tmp_path / "p", "prompt.upper_layers=0.5")
    tune(recipe, lm=lm, splits=SPLITS, on_event=seen.append, progress=False)
    (begun,) = [event for event in seen if isinstance(event, Started)]
    shape = lm.fingerprint
    assert begun.prompt_values == 2 * (lm.num_layers // 2) * 4 * shape.kv_heads * shape.head_width


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The resumed one reads other rows first, and in other company."""
    lm = base()
    overrides = ("prompt.upper_layers=0.5", "tune.checkpoint_steps=1")
    whole = tune(settings(tmp_path / "whole", *overrides), lm=lm, splits=SPLITS, progress=False)

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise SystemExit

    cut = settings(tmp_path / "cut", *overrides)
    with pytest.raises(SystemExit):
        tune(cut, lm=lm, splits=SPLITS, on_event=kill, progress=False)
    resumed = tune(cut, lm=lm, splits=SPLITS, resume=True, progress=False)
    assert all(map(torch.equal, values(resumed), values(whole)))


def test_a_soft_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ValidationError), match=r"upper_layers is 0\.5, but a soft prompt"):
        settings(tmp_path, "prompt.kind=soft", "prompt.upper_layers=0.5")


def test_runs_side_by_side_with_unlike_cuts_are_refused(tmp_path: Path) -> None:
    recipes = [settings(tmp_path / str(share), f"prompt.upper_layers={share}") for share in (0.5, 1)]
    with pytest.raises(RecipeError, match=r"prompt\.upper_layers: found 0\.5 and 1"):
        tune_together(recipes, lm=base(), splits=SPLITS)


def test_runs_side_by_side_learn_what_each_learns_alone(tmp_path: Path) -> None:
    """Their starts differ, and so do the states that are kept."""
    lm = base()
    recipes = [
        settings(tmp_path / str(seed), "prompt.upper_layers=0.5", f"tune.seed={seed}") for seed in (0, 1)
    ]
    together = tune_together(recipes, lm=lm, splits=SPLITS)
    for recipe, result in zip(recipes, together, strict=True):
        alone = tune(recipe.changed([f"out={recipe.out}-alone"]), lm=lm, splits=SPLITS, progress=False)
        for ours, theirs in zip(values(result), values(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
