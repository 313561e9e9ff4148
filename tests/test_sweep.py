"""Sweeps: settings side by side, the worse half let go, the winner saved, and nothing lost on the way."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.cli.app import main
from softprompt.errors import RecipeError
from softprompt.store.artifact import load_prompt
from softprompt.tuning.sweep import SweepResult, drawn, grid, stretches, sweep
from test_learn import SPLITS, breaking_at, learn, lm_of, recipe, vectors
from tiny_models import tiny_model, tiny_tokenizer

RATES = grid({"tune.learning_rate": ["0.3", "1e-6", "0.05", "1e-5"]})


def swept(out: Path, lm: Any = None, **options: Any) -> SweepResult:
    given = {"settings": RATES, "lm": lm or lm_of(), "splits": SPLITS} | options
    return sweep(recipe(out, "tune.epochs=4"), **given)


def test_a_grid_is_every_combination() -> None:
    assert grid({"a": ["1", "2"], "b": ["x", "y"]}) == [
        ("a=1", "b=x"),
        ("a=1", "b=y"),
        ("a=2", "b=x"),
        ("a=2", "b=y"),
    ]


def test_random_settings_lie_in_their_ranges_evenly_in_the_logarithm_and_come_again() -> None:
    found = drawn(
        {"tune.learning_rate": "1e-4..1", "prompt.length": "4..32", "prompt.init": "random,text"}, 400, 7
    )
    assert found == drawn(
        {"tune.learning_rate": "1e-4..1", "prompt.length": "4..32", "prompt.init": "random,text"}, 400, 7
    )
    rates, lengths, inits = ([one.partition("=")[2] for one in column] for column in zip(*found, strict=True))
    assert all(1e-4 <= float(rate) <= 1 for rate in rates)
    assert statistics.median(map(float, rates)) == pytest.approx(1e-2, rel=0.5)
    assert {int(length) for length in lengths} <= set(range(4, 33))
    assert set(inits) == {"random", "text"}


def test_a_range_that_is_none_is_refused() -> None:
    for text in ("1..x", "3..1"):
        with pytest.raises(RecipeError, match=r"wanted low\.\.high"):
            drawn({"tune.learning_rate": text}, 1, 0)


def test_eight_settings_are_halved_at_an_eighth_a_quarter_and_half() -> None:
    assert stretches(8, True) == [1 / 8, 1 / 4, 1 / 2, 1]
    assert stretches(5, True) == [1 / 8, 1 / 4, 1 / 2, 1]
    assert stretches(1, True) == [1]
    assert stretches(8, False) == [1]


def test_the_winner_is_the_setting_with_the_lowest_held_out_loss_and_the_prompt_it_learns_alone(
    tmp_path: Path,
) -> None:
    found = swept(tmp_path / "sweep")
    alone = {setting: learn(tmp_path / setting[0], "tune.epochs=4", *setting).nll_after for setting in RATES}
    assert found.setting == min(alone, key=lambda one: alone[one]) == ("tune.learning_rate=0.3",)
    for trial in found.trials:
        assert trial.nll == pytest.approx(alone[trial.setting], abs=1e-4)
    saved = load_prompt(tmp_path / "sweep")
    assert torch.equal(vectors(found), next(iter(saved.tensors.values())))  # type: ignore[arg-type]
    assert saved.name == "sweep"
    assert saved.notes["sweep"]["setting"] == ["tune.learning_rate=0.3"]


def test_halving_lets_the_worse_half_go_and_spends_less(tmp_path: Path) -> None:
    found = swept(tmp_path / "sweep", halving=True)
    assert [trial.step for trial in found.trials] == [12, 3, 6, 3]
    assert [trial.kept for trial in found.trials] == [True, False, False, False]


def test_seeds_are_averaged_and_the_best_of_the_winner_is_saved(tmp_path: Path) -> None:
    found = swept(tmp_path / "sweep", settings=RATES[:2], seeds=3)
    mine = [trial.nll for trial in found.trials if trial.setting == found.setting]
    assert found.nll == pytest.approx(statistics.fmean(mine))
    assert found.nll_error == pytest.approx(statistics.stdev(mine) / math.sqrt(3))
    assert load_prompt(tmp_path / "sweep").notes["metrics"]["nll_after"] == min(mine)


def test_fewer_in_parallel_is_the_same(tmp_path: Path) -> None:
    one, other = (swept(tmp_path / str(parallel), parallel=parallel) for parallel in (1, 4))
    for a, b in zip(one.trials, other.trials, strict=True):
        assert a.nll == pytest.approx(b.nll, abs=1e-4)


def test_a_killed_sweep_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def end(nll_N: torch.Tensor) -> torch.Tensor:
        raise SystemExit

    whole = swept(tmp_path / "whole", halving=True)
    for moment in (2, 5, 9):  # in each of the three stretches
        out, lm = tmp_path / str(moment), lm_of()
        loss = breaking_at(lm, moment, end)
        with pytest.raises(SystemExit):
            swept(out, lm=lm, loss=loss, halving=True)
        resumed = swept(out, halving=True, resume=True)
        assert [trial.kept for trial in resumed.trials] == [trial.kept for trial in whole.trials]
        torch.testing.assert_close(vectors(resumed), vectors(whole), atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]


def test_a_finished_sweep_that_is_resumed_gives_its_outcome_again(tmp_path: Path) -> None:
    one = swept(tmp_path / "sweep", halving=True)
    lm = lm_of()
    loss = breaking_at(lm, 1, lambda nll_N: pytest.fail("nothing is left to learn"))
    again = swept(tmp_path / "sweep", lm=lm, loss=loss, halving=True, resume=True)
    assert torch.equal(vectors(one), vectors(again))  # type: ignore[arg-type]


def test_another_sweep_is_not_resumed(tmp_path: Path) -> None:
    swept(tmp_path / "sweep", settings=RATES[:2])
    with pytest.raises(RecipeError, match="holds a sweep of other settings"):
        swept(tmp_path / "sweep", settings=RATES[:3], resume=True)


def test_one_file_records_every_trial_at_every_stretch(tmp_path: Path) -> None:
    swept(tmp_path / "sweep", halving=True, seeds=2)
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["Asked", *(["Trial"] * 8 + ["Stretch"]) * 3, "Winner"]


def test_the_command_sweeps_and_says_who_won(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = tmp_path / "base", tmp_path / "rows.csv"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    data.write_text("text\n" + "\n".join(row.fields["text"] for row in SPLITS.train) + "\n", encoding="utf-8")
    given = ["sweep", "--base", str(base), "--data", str(data), "--column", "text", "--length", "4"]
    given += [
        "--epochs",
        "2",
        "--set",
        "dtype=float32",
        "--out",
        str(tmp_path / "p"),
        "--set",
        "data.validation=4",
    ]
    assert main([*given, "--grid", "tune.learning_rate=0.3,1e-6", "--seeds", "2", "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["setting"] == ["tune.learning_rate=0.3"]
    assert len(record["trials"]) == 4
    assert "tune.learning_rate=1e-6" in printed.err
    assert record["judged_on"] == "validation"
    assert "held-out loss" in printed.err
    assert "Nothing was held out" not in printed.err
    nothing_held_out = [*given[:-1], "data.validation=0", "--grid", "tune.learning_rate=0.3,1e-6", "--json"]
    assert main(nothing_held_out) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["judged_on"] == "training"
    assert "training loss" in printed.err
    assert "held-out loss" not in printed.err
    assert "Nothing was held out" in printed.err
    assert main(given) == 2
    assert "Nothing is to be varied" in capsys.readouterr().err
