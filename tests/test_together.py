"""Prompts learned side by side become what each would have become alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.errors import NotFinite, RecipeError
from softprompt.store.artifact import load_prompt
from softprompt.tune.loop import Tuned, tune
from softprompt.tune.together import Together, tune_together
from test_learn import SPLITS, learn, lm_of, recipe, vectors

UNLIKE = {
    "rate": ("tune.learning_rate=0.05",),
    "seed": ("tune.seed=3",),
    "start": ("prompt.init=random",),
    "length": ("prompt.length=7",),
    "optimiser": ("tune.optimizer=adafactor",),
    "batch": ("tune.batch_size=3",),
    "epochs": ("tune.epochs=1",),
    "clip": ("tune.clip=0.01",),
    "form": ("prompt.form=low_rank",),
    "schedule": ("tune.schedule=constant", "tune.warmup=0"),
}


def side_by_side(folder: Path, runs: dict[str, tuple[str, ...]], lm: Any = None) -> dict[str, Tuned]:
    recipes = [recipe(folder / name, *overrides) for name, overrides in runs.items()]
    return dict(zip(runs, tune_together(recipes, lm=lm or lm_of(), splits=SPLITS), strict=True))


def test_ten_unlike_runs_give_the_prompts_of_ten_runs_alone(tmp_path: Path) -> None:
    together = side_by_side(tmp_path / "together", UNLIKE)
    for name, overrides in UNLIKE.items():
        alone = learn(tmp_path / name, *overrides)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)
        for figure in ("steps", "best_step", "tokens"):
            assert together[name].record[figure] == alone.record[figure]
        assert together[name].record["nll_after"] == pytest.approx(alone.record["nll_after"], abs=1e-4)


@pytest.mark.parametrize("architecture", ["GPT-2", "BLOOM (ALiBi)", "Mixtral (experts)"])
def test_neighbours_do_not_matter_on_other_architectures_either(tmp_path: Path, architecture: str) -> None:
    lm = lm_of(architecture)
    runs = {"a": ("tune.seed=1",), "b": ("tune.learning_rate=0.02",)}
    together = side_by_side(tmp_path / "together", runs, lm)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides, lm=lm)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_deep_prompts_side_by_side_with_soft_ones(tmp_path: Path) -> None:
    runs = {"deep": ("prompt.kind=deep",), "soft": ()}
    together = side_by_side(tmp_path / "together", runs)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_the_base_is_passed_once_a_step_however_many_prompts_there_are(tmp_path: Path) -> None:
    lm = lm_of()
    token_nll, rows = lm.token_nll, []

    def counted(batch: Any, prompt: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            rows.append(len(batch.ids_BS))
        return token_nll(batch, prompt)

    lm.token_nll = counted  # type: ignore[method-assign]
    side_by_side(tmp_path, {str(seed): (f"tune.seed={seed}", "tune.epochs=1") for seed in range(5)}, lm)
    assert rows == [20, 20, 20]


def test_one_run_that_breaks_does_not_break_the_others(tmp_path: Path) -> None:
    """Its start is made infinite; what the other learns is what it learns alone."""
    together = Together([recipe(tmp_path / name) for name in "ab"], lm=lm_of(), splits=SPLITS)
    with torch.no_grad():
        next(iter(together.runs[0].learner.parameters)).fill_(math.inf)
    together.advance()
    found = together.save()
    assert list(found) == [1]
    assert isinstance(together.failed[0], NotFinite)
    alone = learn(tmp_path / "alone")
    torch.testing.assert_close(vectors(found[1]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_a_run_that_is_dropped_leaves_its_best_prompt_and_the_others_go_on(tmp_path: Path) -> None:
    together = Together([recipe(tmp_path / name) for name in "ab"], lm=lm_of(), splits=SPLITS)
    together.advance(1 / 3)
    assert [run.step for run in together.runs] == [3, 3]
    together.drop(0)
    together.advance()
    assert [run.step for run in together.runs] == [3, 9]
    together.save()
    assert load_prompt(tmp_path / "a").notes["metrics"]["stopped"] == "dropped"
    torch.testing.assert_close(
        load_prompt(tmp_path / "b").tensors["embeddings_PD"],
        vectors(learn(tmp_path / "alone")),
        atol=2e-4,
        rtol=1e-3,
    )


def test_runs_on_two_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"base: found builtin and other, .* share one base"):
        tune_together([recipe(tmp_path / "a"), recipe(tmp_path / "b", "base=other")], lm=lm_of())


def test_each_task_may_have_rows_of_its_own(tmp_path: Path) -> None:
    """Two files, one base: what comes out is what each file gives alone."""
    runs = {}
    for name, rows in (("a", SPLITS.train), ("b", SPLITS.validation + SPLITS.train[:3])):
        data = tmp_path / f"{name}.csv"
        data.write_text("text\n" + "\n".join(row.fields["text"] for row in rows) + "\n", encoding="utf-8")
        runs[name] = (f"data.source={data}", "data.column=text", "data.validation=3")
    lm = lm_of()
    recipes = [recipe(tmp_path / name, *overrides) for name, overrides in runs.items()]
    for one, (name, overrides) in zip(tune_together(recipes, lm=lm), runs.items(), strict=True):
        alone = tune(recipe(tmp_path / "alone" / name, *overrides), lm=lm)
        torch.testing.assert_close(vectors(one), vectors(alone), atol=2e-4, rtol=1e-3)


def test_prompts_behind_a_text_that_is_read_once_become_the_same(tmp_path: Path) -> None:
    """Text before the slot is kept as keys and values; neighbours and that cache change nothing."""
    template = ("data.template={text} so {soft}{text}",)
    runs = {"a": template, "b": (*template, "prompt.length=6", "tune.seed=4")}
    together = side_by_side(tmp_path / "together", runs)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides, "tune.context_cache_gigabytes=0")
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)
