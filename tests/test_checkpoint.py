"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import begun
from kill_nine import needs_fork, runs_killed_and_undisturbed
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.errors import RecipeError, SaveError
from softprompt.progress.events import Event, Note, Stepped
from softprompt.report.read import read_runs
from softprompt.store import artifact
from softprompt.store.artifact import load_prompt
from softprompt.store.lock import FolderLock, patient
from softprompt.tuning.checkpoint import demand_same, identity
from softprompt.tuning.loop import tune
from softprompt.tuning.result import TuneResult
from test_learn import SPLITS, breaking_at, lm_of, recipe, vectors
from tiny_models import tiny_model, tiny_tokenizer

OFTEN = ("tune.checkpoint_steps=2", "tune.epochs=4")


def learn(
    out: Path, *overrides: str, resume: bool = False, lm: Any = None, loss: Any = None
) -> tuple[TuneResult, list[Event]]:
    seen: list[Event] = []
    settings = recipe(out, *OFTEN, *overrides)
    tuned = tune(settings, lm=lm or lm_of(), splits=SPLITS, loss=loss, on_event=seen.append, resume=resume)
    return tuned, seen


def cut_short(out: Path, *overrides: str, step: int = 8, resume: bool = False) -> None:
    """A run that ends without warning in the middle of its `step`-th step."""

    def end(nll_N: torch.Tensor) -> torch.Tensor:
        raise SystemExit

    lm = lm_of()
    loss = breaking_at(lm, step, end)
    with pytest.raises(SystemExit):
        learn(out, *overrides, lm=lm, loss=loss, resume=resume)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("prompt.kind=deep",),
        ("tune.optimizer=adafactor",),
        ("tune.schedule=cosine", "tune.valid_every_steps=2"),
        ("tune.patience=1",),
        ("data.template={text} so {soft}{text}",),
        ("prompt.form=lstm",),
        ("tune.gradient_checkpointing=true",),
    ],
    ids=["soft", "deep", "Adafactor", "cosine", "patience", "kept contexts", "LSTM", "recomputing"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    whole, _ = learn(tmp_path / "whole", *overrides)
    cut_short(tmp_path / "cut", *overrides)
    resumed, events = learn(tmp_path / "cut", *overrides, resume=True)
    assert torch.equal(vectors(whole), vectors(resumed))
    assert "Continues after step 6 of 12" in said(events)
    same = ("nll_base", "nll_before", "nll_after", "best_step", "steps", "tokens", "accumulation")
    assert {name: getattr(resumed, name) for name in same} == {name: getattr(whole, name) for name in same}
    steps = [event.step for event in events if isinstance(event, Stepped)]
    assert steps == list(range(7, whole.steps + 1))


def test_the_record_of_a_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    learn(tmp_path / "whole")
    cut_short(tmp_path / "cut")
    learn(tmp_path / "cut", resume=True)
    counts = [
        (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").count('"event": "Stepped"')
        for name in ("whole", "cut")
    ]
    assert counts == [12, 12]


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    learn(tmp_path / "p")
    found = sorted(path.name for path in (tmp_path / "p" / "checkpoints").iterdir())
    assert found == ["000000010.checkpoint", "000000012.checkpoint"]


def test_a_resume_that_waits_for_another_process_reads_what_that_one_wrote_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on from an older step, beside a newer checkpoint of other records."""
    whole, _ = learn(tmp_path / "whole")
    cut_short(tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "000000006.checkpoint"
    content = newest.read_bytes()
    newest.unlink()
    other = FolderLock(tmp_path / "cut", "a run")
    other.take()

    def write_and_end(seconds: float) -> None:
        newest.write_bytes(content)
        other.release()

    with patient(600), monkeypatch.context() as patched:
        patched.setattr("softprompt.store.lock.time.sleep", write_and_end)
        resumed, events = learn(tmp_path / "cut", resume=True)
    assert "Continues after step 6 of 12" in said(events)
    assert torch.equal(vectors(whole), vectors(resumed))


def test_resuming_what_is_finished_gives_it_again(tmp_path: Path) -> None:
    whole, _ = learn(tmp_path / "p")
    again, events = learn(tmp_path / "p", resume=True)
    assert torch.equal(vectors(whole), vectors(again))
    assert not [event for event in events if isinstance(event, Stepped)]


def test_resuming_where_nothing_is_starts_anew_and_says_so(tmp_path: Path) -> None:
    _, events = learn(tmp_path / "p", resume=True)
    assert "holds no checkpoint, so the run starts from the beginning" in said(events)
    assert sum(isinstance(event, Stepped) for event in events) == 12


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes", "foreign"])
def test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    whole, _ = learn(tmp_path / "whole")
    cut_short(tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "000000006.checkpoint"
    content = newest.read_bytes()
    newest.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "other bytes": content[:-9] + b"\0" * 9,
            "foreign": b"something else",
        }[damage]
    )
    resumed, events = learn(tmp_path / "cut", resume=True)
    assert f"{newest} is damaged" in said(events)
    assert "the one before is taken" in said(events)
    assert "Continues after step 4" in said(events)
    assert torch.equal(vectors(whole), vectors(resumed))
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    assert [one["step"] for one in recorded if one["event"] == "Stepped"] == list(range(1, 13))
    assert [one["event"] for one in recorded].count("Started") == 2
    assert sum("is damaged" in one.get("text", "") for one in recorded) == 1


def test_when_all_are_damaged_the_run_starts_anew(tmp_path: Path) -> None:
    whole, _ = learn(tmp_path / "whole")
    cut_short(tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        path.write_bytes(b"")
    resumed, events = learn(tmp_path / "cut", resume=True)
    assert "the run starts from the beginning" in said(events)
    assert torch.equal(vectors(whole), vectors(resumed))
    text = (tmp_path / "cut" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (text.count('"event": "Stepped"'), text.count('"event": "Started"')) == (12, 1)


def test_damaged_checkpoints_do_not_push_out_those_of_the_run_that_starts_anew(tmp_path: Path) -> None:
    """They are of later steps than its first, and only the two newest are kept."""
    cut_short(tmp_path / "p")
    for path in (tmp_path / "p" / "checkpoints").iterdir():
        path.write_bytes(b"")
    cut_short(tmp_path / "p", step=4, resume=True)
    _, events = learn(tmp_path / "p", resume=True)
    assert "Continues after step 2" in said(events)


def test_a_checkpoint_of_another_run_is_refused_and_what_differs_named(tmp_path: Path) -> None:
    cut_short(tmp_path / "p")
    with pytest.raises(RecipeError) as error:
        learn(tmp_path / "p", "tune.learning_rate=0.1", "tune.seed=3", resume=True)
    assert "tune.learning_rate was 0.2, is 0.1" in str(error.value)
    assert "tune.seed was 0, is 3" in str(error.value)
    assert "leave out --resume" in str(error.value)


def test_rows_that_a_setting_chose_are_not_named_beside_it() -> None:
    then, seed, rows = {"tune.seed": "0", "the data": "a"}, {"tune.seed": "1"}, {"the data": "b"}
    with pytest.raises(RecipeError, match=r"another run: tune\.seed was 0, is 1\. Set"):
        demand_same(then, {**then, **seed, **rows}, "out")
    with pytest.raises(RecipeError, match=r"another run: the data was a, is b\. Set"):
        demand_same(then, {**then, **rows}, "out")
    demand_same(then, dict(then), "out")


def test_settings_that_are_newer_than_a_run_count_where_they_change_something(tmp_path: Path) -> None:
    """A run of before knew neither, and learned in every layer and kept nothing."""

    def parts(*changes: str) -> set[str]:
        return {*identity(recipe(tmp_path, *changes), lm_of().fingerprint, "rows")}

    assert not {"prompt.upper_layers", "tune.keep"} & parts()
    assert "prompt.upper_layers" in parts("prompt.kind=deep", "prompt.upper_layers=0.5")
    assert "tune.keep" in parts("tune.keep=1")


def test_a_refused_resume_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    """Also where the newest checkpoint is damaged, which is told before the refusal."""
    for name in ("whole", "damaged"):
        cut_short(tmp_path / name)
    (tmp_path / "damaged" / "checkpoints" / "000000006.checkpoint").write_bytes(b"")
    before = contents(tmp_path)
    for name in ("whole", "damaged"):
        with pytest.raises(RecipeError, match="seed"):
            learn(tmp_path / name, "tune.seed=3", resume=True)
    assert contents(tmp_path) == before


def test_a_checkpoint_made_on_other_rows_is_refused(tmp_path: Path) -> None:
    cut_short(tmp_path / "p")
    other = type(SPLITS)(SPLITS.train[:-1] + SPLITS.validation[:1], SPLITS.validation, (), "x")
    with pytest.raises(RecipeError, match="the data was"):
        tune(recipe(tmp_path / "p", *OFTEN), lm=lm_of(), splits=other, resume=True)


def test_a_new_run_leaves_a_former_ones_checkpoints_until_its_own_first(tmp_path: Path) -> None:
    cut_short(tmp_path / "p", step=8)
    cut_short(tmp_path / "p", step=2)
    names = {path.name for path in (tmp_path / "p" / "checkpoints").iterdir()}
    assert names == {"000000004.checkpoint", "000000006.checkpoint"}
    cut_short(tmp_path / "p", step=3)
    names = {path.name for path in (tmp_path / "p" / "checkpoints").iterdir()}
    assert names == {"000000002.checkpoint"}


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = learn(tmp_path / "whole")

    def full(folder: Path, files: Any) -> None:
        raise SaveError(f"{folder}: could not be written (No space left on device).")

    monkeypatch.setattr("softprompt.tuning.checkpoint.write_together", full)
    tuned, events = learn(tmp_path / "p")
    assert "No checkpoint of step 2: " in said(events)
    assert "No space left on device" in said(events)
    assert torch.equal(vectors(whole), vectors(tuned))


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt could not be written, but the last checkpoint could: free space, resume."""
    whole, _ = learn(tmp_path / "whole")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(artifact, "card", full)
        with pytest.raises(OSError, match="No space left"):
            learn(tmp_path / "p")
    resumed, events = learn(tmp_path / "p", resume=True)
    assert not [event for event in events if isinstance(event, Stepped)]
    assert torch.equal(vectors(whole), vectors(resumed))


def begin_run(out: Path) -> Callable[[], object]:
    lm = FrozenLM.load(str(out.parent / "base"), dtype="float32")
    settings = recipe(out, "tune.checkpoint_steps=1", "tune.epochs=12", "tune.valid_every_steps=5")
    return lambda: tune(settings, lm=lm, splits=SPLITS, resume=True)


@needs_fork
def test_a_run_killed_many_times_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9 to a real process, at moments drawn at random: while loading, learning, writing or saving."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    found = [load_prompt(out) for out in runs_killed_and_undisturbed(begin_run, tmp_path, seconds=5)]
    assert torch.equal(*(next(iter(prompt.tensors.values())) for prompt in found))
    figures = [prompt.notes["metrics"] for prompt in found]
    assert figures[0]["nll_after"] == figures[1]["nll_after"]


def test_the_command_goes_on_with_resume_after_kill_9(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = tmp_path / "base", tmp_path / "rows.csv"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows = [example.fields["text"] for example in (*SPLITS.train, *SPLITS.validation)]
    data.write_text("text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    given = ["tune", "--base", str(base), "--data", str(data), "--column", "text", "--length", "4"]
    given += ["--epochs", "12", "--set", "tune.checkpoint_steps=2", "--set", "dtype=float32"]
    given += ["--set", "data.validation=4"]
    killed = [*given, "--out", str(tmp_path / "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = begun(["-m", "softprompt", *killed], env=environment, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("killed/checkpoints/*.checkpoint")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*killed, "--resume"]) == 0
        assert "Continues after step" in capsys.readouterr().out
        assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    finally:
        torch.set_num_threads(threads)
    one, other = (next(iter(load_prompt(tmp_path / name).tensors.values())) for name in ("killed", "whole"))
    assert torch.equal(one, other)


def killed_in_its_fifth_step(out: Path) -> None:
    """A run that ends by kill -9 while it learns; for a process of its own."""

    def kill(nll_N: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return nll_N

    lm = lm_of()
    learn(out, "prompt.length=3", lm=lm, loss=breaking_at(lm, 5, kill))


def test_the_report_of_a_killed_second_run_shows_nothing_of_the_firsts_prompt(tmp_path: Path) -> None:
    out = tmp_path / "p"
    first, _ = learn(out)
    script = "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"  # it imports this very file
    script += "import test_checkpoint as t; t.killed_in_its_fifth_step(pathlib.Path(sys.argv[1]))"
    process = begun(["-c", script, str(out), str(Path(__file__).parent)])
    assert process.wait(timeout=200) == -signal.SIGKILL
    # The first run's prompt is whole and usable; the recipe and the events are the second's.
    assert torch.equal(next(iter(load_prompt(out).tensors.values())), vectors(first))
    assert "length: 3" in (out / "recipe.yaml").read_text(encoding="utf-8")
    (shown,) = read_runs([out])
    assert shown.tuning is not None
    assert "the prompt in this folder is of a former run" in shown.title
    assert shown.tuning.length is None
    assert shown.tuning.metrics == {}
    assert "length: 3" in shown.tuning.recipe
    assert {step for series in shown.training for step, _ in series.points} == {1, 2, 3, 4}
    # A run that ends has all of one kind again, and so has one that was resumed.
    learn(out, "prompt.length=3", resume=True)
    (shown,) = read_runs([out])
    assert shown.title == "p"
    assert shown.tuning is not None
    assert shown.tuning.length == 3
    assert shown.tuning.metrics["steps"] == 12
