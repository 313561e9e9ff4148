"""The peer suite's arithmetic, by hand, and one whole run of each kind of arm on a tiny base."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.example import Example, Splits
from softprompt.tuning.settle import make_plan
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZES = {"test_rows": 4}
LABELS = ["order", "never", "thank"]


@pytest.fixture(scope="module")
def peer() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("peer", BENCHMARKS / "peer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["peer"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def figures(
    arm: str, nll: float, numbers: int, *, rate: Any = None, seed: int = 0, valid: float = 1.0
) -> Any:
    test = {"nll": nll, "exact_match": 0.5}
    common = {"arm": arm, "rate": rate, "seed": seed, "validation_nll": valid, "test": test}
    return {**common, "trained": numbers, "bytes": 4 * numbers}


def test_gains_are_shares_of_full_fine_tunings_and_rates_are_chosen_by_validation(peer: Any) -> None:
    """Base 5 nats: full gains 4, soft (1.5 and 2.5 on two seeds) 3, of it 0.75; 1,000 numbers are 4 kB, 0.75 nats each."""
    runs = [
        figures("softprompt soft", 1.5, 1000, seed=0),
        figures("softprompt soft", 2.5, 1000, seed=1),
        figures("prompt tuning, random", 2.2, 1000, rate=0.03, valid=1.1),
        figures(
            "prompt tuning, random", 1.9, 1000, rate=0.3, valid=1.4
        ),  # better on test rows, which do not choose
        figures("full", 1.0, 100_000, rate=1e-4),
    ]
    result = peer.summary(runs, {"nll": 5.0, "exact_match": 0.0})
    soft, tuning = result["arms"]["softprompt soft"], result["arms"]["prompt tuning, random"]
    assert soft["n"] == 2
    assert soft["rate"] == "auto"
    assert (soft["nll"], soft["gain"], soft["share_of_full"]) == pytest.approx((2.0, 3.0, 0.75))
    assert soft["nll_error"] == pytest.approx(0.5)  # (2.5 - 1.5) / sqrt(2) / sqrt(2)
    assert soft["gain_per_kilobyte"] == pytest.approx(0.75)
    assert (tuning["rate"], tuning["nll"]) == (0.03, 2.2)
    assert tuning["nll_error"] is None
    assert result["bars"]["soft below every prompt tuning that was run"] is True
    assert result["bars"]["deep below every prefix that was run"] is None


@pytest.mark.parametrize(
    ("deep_nll", "deep_numbers", "holds"), [(1.0, 100, True), (1.1, 100, False), (0.9, 101, False)]
)
def test_deep_must_have_loras_gain_and_a_third_of_its_bytes(
    peer: Any, deep_nll: float, deep_numbers: int, holds: bool
) -> None:
    runs = [figures("softprompt deep", deep_nll, deep_numbers), figures("lora 32", 1.0, 300, rate=2e-3)]
    result = peer.summary(runs, {"nll": 5.0})
    assert result["bars"]["deep has lora 32's gain at a third of its bytes"] is holds
    assert result["arms"]["lora 32"]["share_of_full"] is None


@pytest.mark.parametrize(("nll", "numbers", "holds"), [(1.6, 10, True), (1.7, 10, False), (1.0, 11, False)])
def test_soft_must_have_most_of_loras_gain_at_a_200th_of_its_bytes(
    peer: Any, nll: float, numbers: int, holds: bool
) -> None:
    """LoRA gains 4 of 5 nats, so 85 % is 3.4: a loss of 1.6."""
    runs = [figures("softprompt soft", nll, numbers), figures("lora 8", 1.0, 2000, rate=2e-3)]
    bars = peer.summary(runs, {"nll": 5.0 + 1e-9})["bars"]
    assert bars["soft has 85 % of lora 8's gain at a 200th of its bytes"] is holds


def asked(**changed: Any) -> argparse.Namespace:
    settings = {"quick": False, "arms": None, "seeds": [0], "search_steps": 0, "steps": 300}
    return argparse.Namespace(**settings | {"base": "bases/tiny", "sets": ["snips"]} | changed)


def test_quick_takes_each_arm_at_one_rate(peer: Any, tmp_path: Path) -> None:
    nothing = peer.Records(tmp_path / "runs.jsonl", SIZES)
    quick = list(peer.planned(asked(quick=True), "snips", nothing))
    assert len({run.arm for run in quick}) == len(quick) < 10
    everything = list(peer.planned(asked(seeds=[0, 1]), "snips", nothing))
    assert {run.arm for run in everything} == set(peer.ARMS)
    assert len(everything) > 40


def test_short_runs_of_the_first_seed_choose_the_rate_of_all_seeds(peer: Any, tmp_path: Path) -> None:
    given = asked(arms=["softprompt soft", "prefix"], seeds=[4, 5], search_steps=7)
    records = peer.Records(tmp_path / "runs.jsonl", SIZES)
    searched = peer.searches(given, "snips", "prefix")
    assert [(run.rate, run.seed, run.steps) for run in searched] == [(0.005, 4, 7), (0.03, 4, 7), (0.3, 4, 7)]
    assert peer.searches(given, "snips", "softprompt soft") == []
    for run, nll in zip(searched, (3.0, 1.0, 2.0), strict=True):
        records.add(run, {"validation_nll": nll})
    assert [run[2:] for run in peer.planned(given, "snips", peer.Records(records.path, SIZES))] == [
        ("softprompt soft", None, 4, 300),
        ("prefix", 0.03, 4, 300),
        ("softprompt soft", None, 5, 300),
        ("prefix", 0.03, 5, 300),
    ]


def test_without_a_whole_search_the_rates_that_went_all_the_way_count(peer: Any, tmp_path: Path) -> None:
    given = asked(arms=["prefix"], seeds=[4], search_steps=7)
    records = peer.Records(tmp_path / "runs.jsonl", SIZES)
    records.add(peer.searches(given, "snips", "prefix")[0], {"validation_nll": 1.0})
    assert [run.rate for run in peer.planned(given, "snips", records)] == [0.005, 0.03, 0.3]


def test_runs_that_were_judged_on_other_rows_do_not_count(peer: Any, tmp_path: Path) -> None:
    run = peer.Run("tiny", "snips", "prefix", 0.03, 0, 300)
    peer.Records(tmp_path / "runs.jsonl", SIZES).add(run, {"validation_nll": 1.0})
    assert peer.Records(tmp_path / "runs.jsonl", SIZES).of(run)["validation_nll"] == 1.0
    with pytest.raises(peer.NotKept):
        peer.Records(tmp_path / "runs.jsonl", {"test_rows": 5}).of(run)


def test_what_was_made_is_not_repeated_and_a_run_that_fails_is_left_out(
    peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm of a rate that is searched in 7 steps, and one that fails: the second call makes that one alone."""
    calls: list[Any] = []

    def made(given: Any, run: Any) -> dict[str, Any]:
        calls.append(run)
        if run.arm == "full":
            raise ValueError("no room")
        return figures(run.arm, 1.0, 100, rate=run.rate, seed=run.seed, valid=run.rate or 1.0)

    monkeypatch.setattr(peer, "made", made)
    given = asked(arms=["prefix", "full", "softprompt deep"], search_steps=7, workers=1)
    # Base, searches of both, then the arms: full was not searched, so both of its rates. Then what failed, again.
    for wanted in (1 + 3 + 2 + 1 + 2 + 1, 2 + 2):
        calls.clear()
        peer.make_all(given, peer.Records(tmp_path / "runs.jsonl", SIZES))
        assert len(calls) == wanted
    sets = peer.summed_up(given, peer.Records(tmp_path / "runs.jsonl", SIZES))
    assert set(sets["snips"]["arms"]) == {"prefix", "softprompt deep"}
    assert sets["snips"]["arms"]["prefix"]["rate"] == 0.005
    assert "| **softprompt deep** | 1.000, 0.50 | 0 |" in peer.table(sets)


def task(peer: Any) -> Any:
    rows = [Example({"text": f"help dog {LABELS[n % 3]}", "label": LABELS[n % 3]}, row=n) for n in range(24)]
    splits = Splits(tuple(rows[:16]), tuple(rows[16:20]), tuple(rows[20:]), "made for the tests")
    return peer.Task(splits, "{soft}{text} {label}", "label", "thank you quick help")


def given() -> argparse.Namespace:
    sizes = {"steps": 3, "batch_size": 4, "positions": 64, "validation_rows": 4, "test_rows": 4}
    return argparse.Namespace(**sizes, peft_checkout=None, seeds=[0], metrics=["nll", "exact_match"])


@pytest.mark.parametrize(
    "arm",
    [
        "softprompt soft",
        "softprompt soft, before the answer",
        "softprompt deep",
        "prompt tuning, random",
        "prompt tuning, text",
        "p-tuning",
        "prefix",
        "prefix of a text",
        "lora 8",
        "ia3",
        "trainable tokens",
        "full",
    ],
)
def test_every_kind_of_arm_learns_is_judged_and_leaves_the_base_as_it_was(
    peer: Any, arm: str, tmp_path: Path
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    rate = 0.03 if peer.ARMS[arm].rates else None
    run = peer.Run("tiny", "made", arm, rate, 0, 3)
    record = peer.learned(lm, task(peer), run, given(), tmp_path / "out")
    assert 0 < record["test"]["nll"] < 20
    assert record["bytes"] == 4 * record["trained"] > 0
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_loss_of_a_peft_arm_is_that_of_the_base_without_a_prompt(peer: Any, tmp_path: Path) -> None:
    """Against transformers' own loss of one row, whose labels are its trained tokens."""
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    made = task(peer)
    plan = make_plan(peer.recipe(made, 0, given(), tmp_path), lm=lm, splits=made.splits)
    batch = collate([plan.held_out_base[0]])
    labels = batch.ids_BS.masked_fill(~batch.trained_BS, -100)
    expected = lm.model(input_ids=batch.ids_BS, labels=labels).loss
    nll, tokens = peer.peft_nll(lm.model, batch)
    assert float(nll) / tokens == pytest.approx(float(expected), rel=1e-5)


def test_pefts_evaluate_is_read_from_a_checkout_by_itself(peer: Any, tmp_path: Path) -> None:
    """The rest of the module, which would load data, is not run."""
    folder = tmp_path / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text("raise SystemExit('whole')\n\ndef evaluate(ds):\n    return ds[0:2], []\n")
    rows = peer.Rows([{"a": 1}, {"a": 2}, {"a": 3}])
    assert peer.pefts_function(tmp_path)(ds=rows)[0] == {"a": [1, 2]}


def test_of_several_tables_of_a_page_the_named_one_is_replaced(peer: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- {0} table: begin -->\n{0} was\n<!-- {0} table: end -->\n"
    page.write_text("before\n" + marks.format("one") + "between\n" + marks.format("two") + "after\n")
    peer.put_table(page, "two", "| new |")
    assert page.read_text() == (
        "before\n"
        + marks.format("one")
        + "between\n<!-- two table: begin -->\n\n| new |\n\n<!-- two table: end -->\nafter\n"
    )
    with pytest.raises(ValueError, match="unpack"):
        peer.put_table(page, "three", "| new |")
