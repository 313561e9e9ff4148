"""Work in parts that other processes may do: the same records, to the byte, as in one process, also where parts are done twice."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt.base.from_settings import kept_base
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.workers import Here
from softprompt.cli.app import main
from softprompt.comparison.compare import compare
from softprompt.comparison.records import Comparison
from softprompt.comparison.settings import CompareSettings
from softprompt.errors import DataError, RecipeError, SoftPromptError
from softprompt.evaluation.judge import evaluate
from softprompt.inference.compiled import TextPrompt
from softprompt.inference.generate import generate
from softprompt.inference.generate_file import generate_file
from softprompt.inference.settings import DecodeSettings
from softprompt.scale.ray_site import Site
from softprompt.scale.ray_workers import _done
from softprompt.settings.base_settings import BaseSettings
from softprompt.store.lock import FolderLock
from softprompt.tuning.learner import Learner
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.sweep import SweepResult, grid, sweep
from test_compare import recipe as compared_recipe
from test_compare import task as task
from test_learn import SPLITS
from test_learn import recipe as learned_recipe
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

RATES = grid({"tune.learning_rate": ["0.3", "1e-6", "0.05", "1e-5", "0.1"]})


class Elsewhere:
    """Workers that share nothing with this process but files: all that goes there and back is pickled.

    Each part is done `times` times, and the last outcome counts: a machine may be lost when its work was nearly done."""

    are_here = False

    def __init__(self, count: int = 3, times: int = 1) -> None:
        self.count, self.times = count, times
        self.parts: list[Any] = []

    def map(
        self,
        do: Callable[[Any, Any], Any],
        parts: Iterable[Any],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Any]:
        for number, part in enumerate(parts):
            self.parts.append(part)
            for _ in range(self.times):
                sent: Any = pickle.loads(pickle.dumps((do, part)))
                outcome = sent[0](sent[1], lambda event, number=number: tell(number, event) if tell else None)
            yield pickle.loads(pickle.dumps(outcome))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base on disk, which other processes can load."""
    tiny_model("Llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sweep_recipe(base: Path) -> Recipe:
    return learned_recipe(Path("swept"), f"base={base}", "dtype=float32", "tune.epochs=4")


def swept(folder: Path, base: Path, **options: Any) -> SweepResult:
    """A sweep that writes into `folder`/swept, by a relative path as in every other folder."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return sweep(
            sweep_recipe(base), RATES, **{"halving": True, "parallel": 2, "splits": SPLITS, **options}
        )
    finally:
        os.chdir(before)


def prompts_and_records(folder: Path) -> dict[str, bytes]:
    """The files of a sweep that hold no times: its records, and every prompt's numbers."""
    names = ("sweep.jsonl", "adapter_model.safetensors", "prefix.safetensors")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name in names
    }


@pytest.mark.parametrize("times", [1, 2])
def test_a_spread_sweep_leaves_the_records_and_prompts_of_one_process(
    tmp_path: Path, base: Path, times: int
) -> None:
    here = swept(tmp_path / "here", base)
    there = swept(tmp_path / "there", base, workers=(elsewhere := Elsewhere(times=times)))
    found = prompts_and_records(tmp_path / "here")
    assert len(found) == 1 + len(RATES) + 1
    assert prompts_and_records(tmp_path / "there") == found
    assert (there.setting, there.nll, there.trials) == (here.setting, here.nll, here.trials)
    # 5 trials in groups of two in four stretches: 3 + 2 + 1 + 1 groups; and three times some are dropped.
    assert len(elsewhere.parts) == 3 + 2 + 1 + 1 + 3
    for trial in RATES:
        steps = steps_recorded(tmp_path / "there" / "swept" / "trials" / f"{RATES.index(trial):03}-seed0")
        assert steps == sorted(set(steps))  # no step is recorded twice


def steps_recorded(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["event"] == "Stepped"]


def test_a_spread_sweep_that_was_stopped_continues_to_the_same_end(tmp_path: Path, base: Path) -> None:
    class Stops(Elsewhere):
        def map(self, do: Any, parts: Any, *rest: Any, **options: Any) -> Iterator[Any]:
            if len(self.parts) >= 4:  # in the second stretch
                raise KeyboardInterrupt
            yield from super().map(do, parts, *rest, **options)

    swept(tmp_path / "whole", base)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "stopped", base, workers=Stops())
    swept(tmp_path / "stopped", base, workers=Elsewhere(), resume=True)
    assert prompts_and_records(tmp_path / "stopped") == prompts_and_records(tmp_path / "whole")


def test_a_fresh_sweep_does_not_continue_from_what_a_former_one_left(tmp_path: Path, base: Path) -> None:
    for _ in range(2):
        swept(tmp_path / "there", base, workers=Elsewhere())
    assert prompts_and_records(tmp_path / "there") == prompts_and_records_of_one_process(tmp_path, base)
    notes = (tmp_path / "there" / "swept" / "trials" / "000-seed0" / "metrics.jsonl").read_text()
    assert notes.count("Continues after step") == 3  # the three stretches behind the first


def prompts_and_records_of_one_process(tmp_path: Path, base: Path) -> dict[str, bytes]:
    swept(tmp_path / "here", base)
    return prompts_and_records(tmp_path / "here")


def test_without_a_number_every_worker_gets_some_trials_and_at_most_eight_share_a_pass(
    tmp_path: Path, base: Path
) -> None:
    elsewhere = Elsewhere(count=3)
    swept(tmp_path / "there", base, workers=elsewhere, parallel=None, halving=False)
    assert [len(part.recipes) for part in elsewhere.parts] == [2, 2, 1]


def test_a_trial_that_breaks_on_a_worker_ends_alone(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def breaking(learner: Learner, nll: float) -> bool:
        """Refuses the sixth step of the rate 0.05 as one that is not finite."""
        return not (learner.length.learning_rate == 0.05 and learner.steps_done == 5) and step(learner, nll)

    monkeypatch.setattr(Learner, "step", breaking)
    settings = grid({"tune.learning_rate": ["0.3", "0.05"]})
    results = []
    for name, options in (("here", {}), ("there", {"workers": Elsewhere()})):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        results.append(sweep(sweep_recipe(base), settings, splits=SPLITS, parallel=2, **options))  # type: ignore[arg-type]
    here, there = results
    assert [trial.nll == trial.nll for trial in there.trials] == [True, False]
    assert repr(there.trials) == repr(here.trials)
    assert prompts_and_records(tmp_path / "there") == prompts_and_records(tmp_path / "here")


def test_what_lies_in_memory_cannot_be_sent(tmp_path: Path, base: Path) -> None:
    from test_learn import lm_of

    with pytest.raises(RecipeError, match="Name the base in the recipe"):
        swept(tmp_path / "there", base, workers=Elsewhere(), lm=lm_of())


@pytest.mark.parametrize("prompt", [None, TextPrompt("Is it one? ")])
def test_spread_rows_are_kept_in_the_bytes_of_one_process(tmp_path: Path, task: Path, prompt: Any) -> None:
    def judged(out: Path, workers: Any) -> bytes:
        recipe = compared_recipe(task)
        evaluate(
            prompt,
            task,
            base=recipe.base,
            template=recipe.data.template,
            target="label",
            out=out,
            workers=workers,
            progress=False,
        )
        return (out / "rows.jsonl").read_bytes()

    rows = judged(tmp_path / "here", Here())
    assert judged(tmp_path / "there", Elsewhere(times=2)) == rows
    # An interrupted evaluation continues, here what was begun there, and there what was begun here.
    kept = rows.splitlines(keepends=True)
    for name, workers in (("here", Elsewhere()), ("there", Here())):
        (tmp_path / name / "rows.jsonl").write_bytes(b"".join(kept[:2]) + kept[2][:-9])
        summary = json.loads((tmp_path / name / "evaluation.json").read_text())
        (tmp_path / name / "evaluation.json").write_text(json.dumps({**summary, "complete": False}))
        assert judged(tmp_path / name, workers) == rows


def test_a_part_on_a_cluster_waits_for_a_worker_that_was_lost_and_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = FolderLock(tmp_path, "a run")
    lost.take()
    monkeypatch.setattr("softprompt.store.lock.time.sleep", lambda seconds: lost.release())

    def part(number: int, tell: Any) -> int:
        with FolderLock(tmp_path, "the same run"):
            return number

    assert _done(part, 3, 0, None, Site.here(tmp_path)) == (3, None, [])


def test_a_base_that_differs_on_another_machine_is_refused(tmp_path: Path, task: Path) -> None:
    class Another(Elsewhere):
        def map(self, do: Any, parts: Any, *rest: Any, **options: Any) -> Iterator[Any]:
            import torch

            model = tiny_model("Llama")
            with torch.no_grad():
                model.model.norm.weight += 1  # type: ignore[union-attr, operator]
            model.save_pretrained(task / "base")
            yield from super().map(do, parts, *rest, **options)

    recipe = compared_recipe(task)
    try:
        with pytest.raises(SoftPromptError, match=r"is another base on .* Give all machines of the cluster"):
            evaluate(
                None, task, base=recipe.base, template=recipe.data.template, target="label", workers=Another()
            )
    finally:
        tiny_model("Llama").save_pretrained(task / "base")


def test_a_process_that_works_for_long_reads_a_base_again_whose_files_were_replaced(base: Path) -> None:
    settings = BaseSettings(base=str(base), dtype="float32")
    before = kept_base(settings)
    assert kept_base(settings) is before
    model = tiny_model("Llama")
    model.get_parameter("model.norm.weight").data += 1
    model.save_pretrained(base)
    after = kept_base(settings)
    assert after.fingerprint.digest != before.fingerprint.digest
    assert kept_base(settings, after.fingerprint) is after


def test_a_spread_comparison_has_the_figures_of_one_process(tmp_path: Path, task: Path) -> None:
    settings = CompareSettings(arms=["base", "few-shot", "soft"], seeds=2, shots=2)

    def compared(name: str, **options: Any) -> Comparison:
        return compare(
            compared_recipe(task), settings, tmp_path / name, own_process=False, progress=False, **options
        )

    here = compared("here")
    there = compared("there", workers=Elsewhere(times=2))
    assert list(there.runs) == list(here.runs)
    for arm, runs in here.runs.items():
        for mine, other in zip(runs, there.runs[arm], strict=True):
            assert (other.metrics, other.curve, other.validation) == (
                mine.metrics,
                mine.curve,
                mine.validation,
            )
            rows = "arms", f"{arm}-{mine.seed}", "rows.jsonl"
            assert (
                tmp_path.joinpath("there", *rows).read_bytes()
                == tmp_path.joinpath("here", *rows).read_bytes()
            )
    again = Elsewhere()
    compared("there", workers=again)
    assert again.parts == []  # what is done is not done again


def test_an_arm_that_fails_on_a_worker_is_recorded_and_the_others_come_to_their_end(
    tmp_path: Path, task: Path
) -> None:
    settings = CompareSettings(arms=["base", "few-shot"], seeds=2, shots=999)
    comparison = compare(
        compared_recipe(task),
        settings,
        tmp_path / "there",
        own_process=False,
        progress=False,
        workers=Elsewhere(),
    )
    assert list(comparison.runs) == ["base"]
    assert list(comparison.failed) == ["few-shot"]


def rows_file(folder: Path, rows: int = 150) -> Path:
    """A file of rows, each unlike the others."""
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"my order {number} never"}) + "\n" for number in range(rows))
    )
    return path


def test_the_rows_of_a_file_are_continued_in_order_here_and_elsewhere(tmp_path: Path, base: Path) -> None:
    lm = FrozenLM.load(str(base), dtype="float32")
    prompt = prompt_of(lm, 1, "soft")
    settings = DecodeSettings(max_new_tokens=4)
    source = rows_file(tmp_path)

    def answered(name: str, workers: Any) -> bytes:
        found = generate_file(
            lm, source, tmp_path / name, [prompt], settings, with_base=True, workers=workers, progress=False
        )
        assert (found.rows, found.lines) == (150, 300)
        return found.path.read_bytes()

    here = answered("here", Here())
    lines = [json.loads(line) for line in here.splitlines()]
    assert [line["row"] for line in lines] == [number // 2 for number in range(300)]
    assert [line["prompt"] for line in lines] == [None, "soft"] * 150
    alone = generate(
        lm, [f"my order {number} never" for number in range(150)], prompt, settings, progress=False
    )
    assert [line["text"] for line in lines[1::2]] == [each.text for each in alone]
    assert answered("there", elsewhere := Elsewhere(times=2)) == here
    assert [len(part) for part in elsewhere.parts] == [64, 64, 22]
    # A kill in the middle of a row's second line: the rows are read in the same company again, and none is written twice.
    for killed_at, parts in ((67, [64, 64, 22]), (64 * 2 + 1, [64, 22])):
        lines_there = here.splitlines(keepends=True)[:killed_at]
        (tmp_path / "there" / "answers.jsonl").write_bytes(b"".join(lines_there)[:-9])
        again = Elsewhere()
        assert answered("there", again) == here
        assert [len(part) for part in again.parts] == parts
    with pytest.raises(DataError, match="holds other answers"):
        generate_file(lm, source, tmp_path / "there", [], settings, progress=False)


def test_rows_that_cannot_be_continued_are_counted_and_hinder_no_other(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows that exceed the base's positions, one of them alone in its part."""
    lm = FrozenLM.load(str(base), dtype="float32")
    settings = DecodeSettings(max_new_tokens=4, n=2, temperature=1.0)
    texts = [f"my order {number} never" for number in range(64)] + ["word " * 5000]
    texts[3] = "word " * 4000

    def answered(name: str, workers: Any) -> bytes:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        answers = generate_file(
            lm, tmp_path / "rows.jsonl", tmp_path / name, [], settings, workers=workers, progress=False
        )
        assert (answers.rows, answers.lines, answers.failed) == (65, 130, 2)
        return answers.path.read_bytes()

    here = answered("here", Here())
    lines = [json.loads(line) for line in here.splitlines()]
    assert [line["row"] for line in lines] == [number // 2 for number in range(130)]
    assert [line["row"] for line in lines if "error" in line] == [3, 3, 64, 64]
    assert all("positions" in line["error"] and "text" not in line for line in lines if "error" in line)
    able = [text for text in texts if len(text) < 100]
    alone = generate(lm, able, None, settings, progress=False)
    assert [line["text"] for line in lines if "error" not in line] == [each.text for each in alone]
    assert answered("there", Elsewhere(times=2)) == here
    assert answered("there", again := Elsewhere()) == here  # those of an earlier run are counted too
    assert again.parts == []
    command = ["generate", str(tmp_path / "rows.jsonl"), "--base", str(base), "--max-new-tokens", "4"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == DataError.exit_code
    found = capsys.readouterr()
    assert json.loads(found.out)["failed"] == 2
    assert "2 of 65 rows could not be continued" in found.err


def test_generate_takes_a_file_where_it_is_told_a_folder_for_the_answers(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--base", str(base), "--max-new-tokens", "3"]
    assert (
        main(["generate", str(rows_file(tmp_path, 3)), *given, "--out", str(tmp_path / "out"), "--json"]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["lines"], record["reused"]) == (3, 3, 0)
    assert len(Path(record["path"]).read_text().splitlines()) == 3
    assert main(["generate", "a", "b", *given, "--out", str(tmp_path / "out")]) == 2
    assert "wanted one file" in capsys.readouterr().err
    assert main(["generate", "a", *given, "--on", "ray"]) == 2
    assert "--out FOLDER" in capsys.readouterr().err


def test_without_ray_every_verb_says_what_to_install(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.scale.ray_cluster.find_spec", lambda name: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(compared_recipe(task).to_yaml())
    folder, out = str(rows_file(tmp_path, 3)), str(tmp_path / "out")
    for arguments in (
        ["sweep", str(recipe), "--grid", "tune.learning_rate=0.1,0.2", "--out", out],
        ["compare", str(recipe), "--out", out],
        ["evaluate", "--data", str(task), "--base", str(task / "base")],
        ["generate", folder, "--base", str(task / "base"), "--out", out],
        ["serve", "--base", str(task / "base")],
    ):
        assert main([*arguments, "--on", "ray"]) == 2, arguments
        assert "pip install 'softprompt[ray]'" in capsys.readouterr().err
    assert main(["evaluate", "--on", "rays"]) == 2
    assert "--on" in capsys.readouterr().err
