"""A comparison of all arms on a small random base: costs, the base untouched, taken up again where it stopped."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.comparison import arms, forgetting, run_arm, weights
from softprompt.comparison.arm import ARMS, ArmName
from softprompt.comparison.assignment import Assignment, PreparedArm
from softprompt.comparison.compare import compare
from softprompt.comparison.records import ArmResult, Comparison
from softprompt.comparison.settings import CompareSettings, Job
from softprompt.comparison.summary import summarise
from softprompt.data.batch import Batch
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import DataError, NotFinite, RecipeError, SoftPromptError
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.rows import Row
from softprompt.evaluation.settings import JudgedData, JudgeSettings
from softprompt.loss import gradient
from softprompt.report import charts
from softprompt.report.verdict import verdict
from softprompt.store.artifact import load_prompt
from softprompt.tuning.recipe import Recipe
from tiny_models import tiny_model, tiny_tokenizer

TEMPLATE = "{soft:3}Tweet: {text} Complaint? {label}"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on disk, and a folder of labelled rows with a training row among the judged ones."""
    folder = tmp_path_factory.mktemp("task")
    tiny_model("Llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [(f"my order {n} never came", "complaint") for n in range(6)]
    rows += [(f"thank you for help {n}", "no complaint") for n in range(6)]
    for name, part in (
        ("train", rows[::2] + rows[1::4]),
        ("validation", rows[3::4]),
        ("test", [*rows[3::4], rows[0]]),
    ):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return folder


def recipe(task: Path, *overrides: str) -> Recipe:
    return Recipe(
        base=str(task / "base"),
        dtype="float32",
        data={"source": str(task), "template": TEMPLATE, "target": "label"},
        tune={"max_steps": 3, "batch_size": 4, "learning_rate": 0.05, "valid_every_steps": 2},
    ).changed(overrides)


def settings(**changes: Any) -> CompareSettings:
    values: dict[str, Any] = {"arms": list(ARMS), "text": "Is it one?\n", "shots": 2, "seeds": 1}
    return CompareSettings(**(values | changes))


@pytest.fixture(scope="module")
def compared(task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    pytest.importorskip("peft", reason="the arm lora needs PEFT")
    out = tmp_path_factory.mktemp("compared")
    return compare(recipe(task), settings(seeds=2), out, own_process=False), out


def test_every_arm_comes_to_an_end_and_is_judged_on_the_same_rows(
    compared: tuple[Comparison, Path],
) -> None:
    record, _ = compared
    assert record.failed == {}
    assert list(record.summary.arms) == list(ARMS)
    for arm, results in record.runs.items():
        assert len(results) == (1 if arm in ("base", "wording", "prompt", "context") else 2)
        assert {one.rows for one in results} == {4}


def test_trained_parameters_and_bytes_are_those_of_what_is_kept(
    compared: tuple[Comparison, Path],
) -> None:
    found = compared[0].summary.arms
    base = tiny_model("Llama")
    width, layers, heads, head_width = 32, 2, 2, 8
    assert found["base"].trained_parameters == found["base"].stored_bytes == 0
    assert found["soft"].trained_parameters == 3 * width
    assert found["deep"].trained_parameters == 3 * layers * 2 * heads * head_width
    # The first position of a distilled prompt does not move.
    assert found["distil"].trained_parameters == 2 * layers * 2 * heads * head_width
    assert found["distil"].stored_bytes > 4 * 3 * layers * 2 * heads * head_width
    assert found["full"].trained_parameters == sum(one.numel() for one in base.parameters())
    assert found["full"].stored_bytes == 4 * found["full"].trained_parameters
    linears = [
        one for name, one in base.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"
    ]
    assert found["lora"].trained_parameters == sum(
        8 * (one.in_features + one.out_features) for one in linears
    )
    assert 4 * found["soft"].trained_parameters < found["soft"].stored_bytes < 1000
    assert found["prompt"].stored_bytes == len("Is it one?\n")


def test_added_tokens_are_those_a_request_reads_more(compared: tuple[Comparison, Path]) -> None:
    found = compared[0].summary.arms
    text = len(tiny_tokenizer()("Is it one?\n")["input_ids"])
    added = {"base": 0, "prompt": text, "soft": 3, "deep": 3, "distil": 3, "lora": 0, "full": 0}
    assert {arm: found[arm].added_tokens for arm in added} == added
    assert found["few-shot"].added_tokens > text
    assert found["context"].added_tokens > text


def test_every_arm_but_full_leaves_the_base_bit_for_bit_as_it_was(
    compared: tuple[Comparison, Path],
) -> None:
    found = compared[0].summary.arms
    assert {arm: one.base_unchanged for arm, one in found.items()} == {arm: arm != "full" for arm in ARMS}


def test_forgetting_is_measured_with_the_task_on_and_off(compared: tuple[Comparison, Path]) -> None:
    found = compared[0].summary.arms
    for arm, one in found.items():
        if arm == "full":
            assert one.general_off == one.general_on != one.general_before
        else:
            assert one.general_off == one.general_before, arm
        assert (one.general_on == one.general_before) == (arm in ("base", "wording")), arm


def test_learned_arms_took_the_same_steps_and_keep_their_curves(
    compared: tuple[Comparison, Path],
) -> None:
    for arm in ("soft", "deep", "lora", "full"):
        for one in compared[0].runs[arm]:
            assert one.learning.steps == 3
            assert [point.step for point in one.curve] == [1, 2, 3]
            assert [point.step for point in one.validation] == [0, 2, 3]
            best = min(one.validation, key=lambda point: point.nll)
            assert one.learning.best_step == best.step


def test_the_data_health_names_a_judged_row_that_was_learned(compared: tuple[Comparison, Path]) -> None:
    health = compared[0].health
    assert health is not None
    assert health.judged_also_trained == 1
    assert health.judged_also_validated == 3
    assert health.splits["train"].labels == {"complaint": 5, "no complaint": 4}
    assert health.contradictions == 0


def test_what_is_done_is_not_done_again_and_arms_can_be_added(
    compared: tuple[Comparison, Path], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, former = compared
    out = tmp_path / "former"
    shutil.copytree(former, out)
    monkeypatch.setattr(run_arm, "MAKERS", {})  # any arm that ran would fail
    again = compare(recipe(task), settings(seeds=1, arms=["soft", "base"], text=None), out, own_process=False)
    assert again.runs["soft"][0].to_record() == record.runs["soft"][0].to_record()
    assert len(again.runs["soft"]) == 1
    other = settings(arms=["soft"], text=None, rates={"soft": 0.2})
    with pytest.raises(KeyError, match="soft"):  # it would run again, since its rate is another
        compare(recipe(task), other, out, own_process=False)


def test_an_arm_that_a_version_with_another_default_rate_made_is_done_again(
    compared: tuple[Comparison, Path], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, former = compared
    out = tmp_path / "former"
    shutil.copytree(former, out)
    monkeypatch.setattr(run_arm, "MAKERS", {})  # any arm that ran would fail
    wanted = settings(seeds=1, arms=["full"], text=None)
    again = compare(recipe(task), wanted, out, own_process=False)
    assert again.runs["full"][0].to_record() == record.runs["full"][0].to_record()
    monkeypatch.setitem(ARMS, "full", replace(ARMS["full"], default_rate=1e-5))
    with pytest.raises(KeyError, match="full"):
        compare(recipe(task), wanted, out, own_process=False)


def test_an_arm_of_a_version_without_a_newer_setting_is_not_done_again(
    compared: tuple[Comparison, Path], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, former = compared
    out = tmp_path / "former"
    shutil.copytree(former, out)
    job = json.loads((out / "arms/soft-0/job.json").read_text(encoding="utf-8"))
    del job["recipe"]["prompt"]["upper_layers"], job["recipe"]["tune"]["keep"]
    (out / "arms/soft-0/job.json").write_text(json.dumps(job), encoding="utf-8")
    monkeypatch.setattr(run_arm, "MAKERS", {})  # any arm that ran would fail
    wanted = settings(seeds=1, arms=["soft"], text=None)
    again = compare(recipe(task), wanted, out, own_process=False)
    assert again.runs["soft"][0].to_record() == record.runs["soft"][0].to_record()


def test_a_comparison_that_was_killed_goes_on_at_the_arm_that_was_running(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(arms=["base", "few-shot"], text=None)
    ran: list[str] = []

    def counted(name: str, arm: Callable[[Assignment], PreparedArm]) -> Callable[[Assignment], PreparedArm]:
        def run(given: Assignment) -> PreparedArm:
            ran.append(name)
            if name == "few-shot" and ran.count(name) == 1:
                raise KeyboardInterrupt
            return arm(given)

        return run

    monkeypatch.setattr(run_arm, "MAKERS", {name: counted(name, arm) for name, arm in arms.MAKERS.items()})
    with pytest.raises(KeyboardInterrupt):
        compare(recipe(task), wanted, tmp_path, own_process=False)
    compare(recipe(task), wanted, tmp_path, own_process=False)
    assert ran == ["base", "few-shot", "few-shot"]


def test_an_arm_that_fails_is_named_with_its_reason_and_the_others_stand(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: Assignment) -> PreparedArm:
        raise NotFinite("the loss is not finite")

    monkeypatch.setattr(run_arm, "MAKERS", {**arms.MAKERS, "soft": broken})
    record = compare(recipe(task), settings(arms=["base", "soft"], text=None), tmp_path, own_process=False)
    assert record.failed == {"soft": "the loss is not finite"}
    assert list(record.summary.arms) == ["base"]


def test_an_arm_in_a_process_of_its_own_gives_the_same_figures(
    compared: tuple[Comparison, Path], task: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    wanted = settings(arms=["soft"], text=None)
    record = compare(recipe(task), wanted, tmp_path, tell=lambda job, what, done, of: told.append(what))
    here, there = record.runs["soft"][0], compared[0].runs["soft"][0]
    assert here.metrics["nll"].value == pytest.approx(there.metrics["nll"].value, rel=1e-4)
    assert list(dict.fromkeys(told)) == ["loading", "learning", "judging", "measuring"]
    assert here.memory.peak_learning >= here.memory.loaded * 0.9 > 0


def test_running_text_is_judged_by_its_loss_and_continued_for_reading(task: Path, tmp_path: Path) -> None:
    running = Recipe(
        base=str(task / "base"),
        dtype="float32",
        data={"source": str(task), "column": "text", "template": "{soft:3}{text}"},
        tune={"max_steps": 1, "batch_size": 4, "learning_rate": 0.05},
    )
    wanted = settings(arms=["base", "prompt", "soft", "deep"], text="thank you. ")
    record = compare(running, wanted, tmp_path, own_process=False)
    assert record.failed == {}
    assert record.metrics[0] == "nll"
    assert {one.n for arm in record.summary.arms.values() for one in arm.metrics.values()} == {4}
    assert all(len(results[0].samples) == 4 for results in record.runs.values())


def test_a_time_budget_becomes_steps_at_each_arms_own_pace(task: Path, tmp_path: Path) -> None:
    wanted = settings(arms=["soft", "full"], text=None, seconds=0.15)
    record = compare(recipe(task), wanted, tmp_path, own_process=False)
    for arm in ("soft", "full"):
        assert record.runs[arm][0].learning.steps >= 1
        assert len(record.runs[arm][0].curve) == record.runs[arm][0].learning.steps


def test_weights_are_moved_by_adamw_where_prompts_are_by_muon(task: Path, tmp_path: Path) -> None:
    """The recipe's default is muon; the arm that trains weights does as with adamw, its warm-up included."""
    losses = []
    for name in ("muon", "adamw", "adafactor"):
        wanted = settings(arms=["full"], text=None)
        record = compare(recipe(task, f"tune.optimizer={name}"), wanted, tmp_path / name, own_process=False)
        losses.append([point.nll for point in record.runs["full"][0].curve])
    assert losses[0] == losses[1] != losses[2]


def test_data_without_held_out_rows_is_refused(task: Path, tmp_path: Path) -> None:
    alone = recipe(task, f"data.source={task / 'train.csv'}", "data.validation=0", "data.test=0")
    wanted = settings(arms=["base"], text=None)
    with pytest.raises(SoftPromptError, match="neither test nor validation"):
        compare(alone, wanted, tmp_path, own_process=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": ["base", "sofft"]}, "sofft"),
        ({"arms": ["base", "base"]}, "each arm once"),
        ({"text": None}, "Give it with --text"),
        ({"arms": ["base"], "text": None, "document": "long.txt"}, "neither context nor distil"),
        ({"arms": ["base"]}, "not among --arms"),
        ({"rates": {"loro": 1.0}}, "rates"),
        ({"calibrate": True}, "rank"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settings(**changes)


def test_a_job_comes_back_from_its_file_with_the_same_digest(task: Path, tmp_path: Path) -> None:
    job = Job(recipe(task), settings(rates={"lora": 1e-3}), "lora", 1, tmp_path)
    (tmp_path / "job.json").write_text(job.to_json())
    assert Job.load(tmp_path).digest == job.digest
    assert replace(job, settings=settings(rates={"lora": 2e-3})).digest != job.digest
    assert replace(job, settings=settings(rates={"lora": 1e-3}, seeds=5, text="Other")).digest == job.digest


def test_a_distilled_arm_needs_no_labels_and_reads_fewer_positions(task: Path, tmp_path: Path) -> None:
    """The same prompt whatever the labels say."""
    (tmp_path / "long.txt").write_text("my order never came, thank you", "utf-8")
    prompts = []
    for name, swap in (
        ("as-given", {}),
        ("swapped", {"complaint": "no complaint", "no complaint": "complaint"}),
    ):
        data = tmp_path / name
        data.mkdir()
        for part in ("train", "validation", "test"):
            rows = list(csv.reader((task / f"{part}.csv").read_text().splitlines()))
            with (data / f"{part}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([[text, swap.get(label, label)] for text, label in rows])
        record = compare(
            recipe(task, f"data.source={data}", "tune.max_steps=8"),
            settings(arms=["context", "distil"], text=None, document=str(tmp_path / "long.txt")),
            tmp_path / f"out-{name}",
            own_process=False,
        )
        assert record.failed == {}
        prompts.append(load_prompt(Path(record.runs["distil"][0].about["path"])))
        assert record.runs["context"][0].added_tokens > record.runs["distil"][0].added_tokens == 3
    assert all(torch.equal(a, b) for a, b in zip(prompts[0].plain, prompts[1].plain, strict=True))


def test_a_long_text_that_is_missing_empty_or_short_fails_its_arm_with_the_reason(
    task: Path, tmp_path: Path
) -> None:
    for content, reason in (
        (None, "cannot be read"),
        (" ", "found no text"),
        ("a", "which fit into 40 virtual tokens"),
    ):
        path = tmp_path / "long.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content, "utf-8")
        with pytest.raises(SoftPromptError, match=reason):
            compare(
                recipe(task, "data.template={soft:40}{text} {label}"),
                settings(arms=["distil"], text=None, document=str(path)),
                tmp_path / "out",
                own_process=False,
            )


def test_few_shot_examples_take_each_label_in_turn_and_follow_the_seed() -> None:
    layout = Template.parse(TEMPLATE, target="label")
    train = [Example({"text": f"t{n}", "label": "a" if n < 9 else "b"}, row=n) for n in range(11)]
    chosen = arms.draw_examples(train, layout, 4, seed=0)
    assert sorted(one.fields["label"] for one in chosen) == ["a", "a", "b", "b"]
    assert chosen == arms.draw_examples(train, layout, 4, seed=0)
    assert chosen != arms.draw_examples(train, layout, 4, seed=1)
    assert len(arms.draw_examples(train, layout, 99, seed=0)) == 11


def test_general_text_comes_in_passages_from_the_bundled_file_or_ones_own(tmp_path: Path) -> None:
    assert len(forgetting.passages()) == forgetting.PASSAGES
    path = tmp_path / "own.txt"
    path.write_text("short\n\n" + "five words are just enough. " * 200)
    (one,) = forgetting.passages(path)
    assert len(one.fields["text"]) == forgetting.PASSAGE_CHARACTERS
    path.write_text("nothing")
    with pytest.raises(DataError, match="no paragraph"):
        forgetting.passages(path)


def test_real_held_out_text_serves_as_general_text(task: Path, shared_data: Path) -> None:
    lm = FrozenLM.load(str(task / "base"), dtype="float32")
    found = forgetting.fitted(lm, forgetting.passages(shared_data / "heldout-text" / "wikitext2_valid.txt"))
    loss = forgetting.general_loss(lm, forgetting.before_general_text(lm, None), found[:2])
    assert len(found) == forgetting.PASSAGES
    assert math.isfinite(loss.value)


def test_arms_on_other_rows_are_not_compared() -> None:
    ours = [Row(0, 0, "a", "x", "x"), Row(1, 1, "b", "x", "y")]
    theirs = [Row(0, 0, "a", "x", "x"), Row(1, 1, "other", "x", "y")]
    with pytest.raises(SoftPromptError, match="different rows"):
        summarise(
            {"one": [ArmResult("one")], "two": [ArmResult("two")]},
            {"one": [ours], "two": [theirs]},
            ["accuracy"],
        )


def test_a_record_is_plain_json_without_nan(compared: tuple[Comparison, Path]) -> None:
    text = (compared[1] / "comparison.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["kind"] == "comparison"


def test_the_command_writes_the_report_says_the_verdict_and_fails_a_gate_with_100(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = [
        "compare",
        "--base",
        str(task / "base"),
        "--data",
        str(task),
        "--out",
        out,
        "--batch-size",
        "4",
    ]
    arguments += [
        "--set",
        f"data.template={TEMPLATE}",
        "--set",
        "data.target=label",
        "--set",
        "tune.max_steps=1",
    ]
    arguments += ["--arms", "base,soft", "--seeds", "1", "--rate", "soft=0.01", "--in-process", "--json"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    record = Comparison.from_record(json.loads(shown.out))
    assert record.runs["soft"][0].learning.rate == 0.01
    assert verdict(record) in shown.err
    assert {path.name for path in (tmp_path / "out").glob("report.*")} == {
        f"report.{one}" for one in ("html", "md", "csv", "json")
    }
    assert main([*arguments, "--fail-under", "accuracy=1.1"]) == 100
    assert main([*arguments, "--fail-under", "bleu=1"]) == 2
    assert main([*arguments, "--rate", "soft=fast"]) == 2


@pytest.mark.parametrize(
    "slot", ["{soft:3}Tweet: {text} Complaint? {label}", "Tweet: {text} Complaint?{soft:3} {label}"]
)
def test_every_learned_arm_sees_the_same_positions_of_rows_that_are_cut(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot: str
) -> None:
    """data.max_length is above the base's context, and rows are longer than both: the same text is cut for all arms."""
    pytest.importorskip("peft", reason="the arm lora needs PEFT")
    long = [(f"{n} " + "my order never came " * 90, "complaint") for n in range(4)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *long])
    sets = [f"data.template={slot}", f"data.source={tmp_path / 'train.csv'}", "data.validation=0"]
    sets += [
        f"data.test={task / 'test.csv'}",
        "data.max_length=100000",
        "data.on_overflow=truncate",
        "tune.max_steps=1",
    ]
    base = FrozenLM.load(str(task / "base"), dtype="float32")
    most = base.config.max_position_embeddings
    seen: set[tuple[int, ...]] = set()
    collate = weights.collate

    def watched(rows: Sequence[Encoded]) -> Batch:
        for row in rows:
            assert len(row) <= most
            seen.add(tuple(token for token, place in zip(row.ids, row.soft, strict=True) if place < 0))
        return collate(rows)

    monkeypatch.setattr(weights, "collate", watched)
    monkeypatch.setattr(gradient, "collate", watched)
    learned = {}
    for arm in ("soft", "lora", "full"):
        seen.clear()
        wanted = settings(arms=[arm], text=None)
        record = compare(recipe(task, *sets), wanted, tmp_path / arm, own_process=False)
        assert record.failed == {}
        learned[arm] = set(seen)
    assert learned["soft"] == learned["lora"] == learned["full"]
    assert all(
        most - 3 - 2 <= len(row) <= most - 3 for row in learned["soft"]
    )  # cut between tokens that join


def test_judged_rows_that_cannot_fit_are_refused_before_anything_is_learned(
    task: Path, tmp_path: Path
) -> None:
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("my order never came " * 200, "complaint")])
    asked = recipe(task, f"data.test={tmp_path / 'test.csv'}", f"data.source={task / 'train.csv'}")
    with pytest.raises(DataError, match="positions with the prompt"):
        compare(asked, settings(arms=["soft"], text=None), tmp_path / "out", own_process=False)
    assert not (tmp_path / "out").exists()


def test_the_base_is_also_shown_under_the_wording_that_suits_it_best(
    task: Path, compared: tuple[Comparison, Path]
) -> None:
    """The losses by which it is chosen are those that `evaluate` gives on the training rows."""
    about = compared[0].runs["wording"][0].about
    assert about["template"] == min(about["losses"], key=about["losses"].__getitem__)
    own = Template.parse(TEMPLATE, target="label").without_slots()
    assert {str(own), "{text} -> {label}", "{text} Label: {label}"} < set(about["losses"])
    for template in (str(own), about["template"]):
        judged = evaluate(
            None,
            task / "train.csv",
            base=FrozenLM.load(str(task / "base"), dtype="float32"),
            template=template,
            target="label",
            settings=JudgeSettings(metrics=["nll"], split="train"),
            reading=JudgedData(validation=0, test=0),
            progress=False,
        )
        assert about["losses"][template] == pytest.approx(judged.estimates["nll"].value, rel=1e-5)
    assert compared[0].summary.arms["wording"].stored_bytes == 0


def test_own_wordings_are_tried_too_and_running_text_has_but_one() -> None:
    layout = Template.parse(TEMPLATE, target="label")
    tried = arms.candidate_wordings(layout, ["{text} = {label}", "Tweet: {text} Complaint? {label}"])
    assert Template.parse("{text} = {label}", target="label") in tried
    assert len(set(map(str, tried))) == len(tried) == 5
    running = Template.parse("{soft:3}{text}")
    assert arms.candidate_wordings(running) == [Template.parse("{text}")]


def test_the_table_of_arms_is_whole() -> None:
    assert set(ARMS) == set(arms.MAKERS) == set(get_args(ArmName))
    page = (Path(charts.__file__).parent / "page.html.j2").read_text()
    for name, arm in ARMS.items():
        assert f"arm-{name}" in page
        assert arm.name == name
        assert arm.seeded or not arm.learned
        assert math.isnan(arm.default_rate) or arm.learned


def test_the_rate_of_full_fine_tuning_falls_with_the_bases_width_and_loras_does_not() -> None:
    """As 1/width, from 3e-4 at 256: at 4096 it is 1.9e-5, near the 2e-5 that models of 7 B weights are fine-tuned at."""
    assert ARMS["full"].rate_at(256) == pytest.approx(3e-4)
    assert ARMS["full"].rate_at(4096) == pytest.approx(3e-4 / 16)
    assert ARMS["lora"].rate_at(256) == ARMS["lora"].rate_at(4096) == 2e-3
