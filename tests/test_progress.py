"""Long calls from Python show how far they are: in terminals and notebooks, nowhere else, off with one argument."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.compare import compare
from softprompt.comparison.settings import CompareSettings
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import score
from softprompt.progress.bar import ShowJobs
from softprompt.progress.console import Screen, set_aside
from softprompt.progress.runs import ShowProgress
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.sweep import sweep
from softprompt.tuning.together import tune_together
from tiny_models import tiny_model, tiny_tokenizer

ROWS = [{"text": f"my order {n} never came", "label": "complaint"} for n in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("Llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name in ("train", "test"):
        lines = "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
        (folder / f"{name}.csv").write_text(f"text,label\n{lines}", encoding="utf-8")
    return folder


def recipe(base: Path, out: Path) -> Recipe:
    return Recipe(
        base=str(base / "base"),
        out=str(out),
        dtype="float32",
        data={"source": str(base), "template": "{text}{soft:2} {label}", "target": "label"},
        tune={"max_steps": 1, "batch_size": 4, "learning_rate": 0.05},
    )


def run_tune(base: Path, out: Path, progress: bool | None) -> None:
    tune(recipe(base, out), progress=progress)


def run_sweep(base: Path, out: Path, progress: bool | None) -> None:
    sweep(recipe(base, out), [("tune.learning_rate=0.1",)], progress=progress)


def run_together(base: Path, out: Path, progress: bool | None) -> None:
    tune_together([recipe(base, out / name) for name in "ab"], progress=progress)


def run_evaluate(base: Path, out: Path, progress: bool | None) -> None:
    lm = FrozenLM.load(str(base / "base"))
    settings = JudgeSettings(metrics=["nll"])
    evaluate(
        None, ROWS, base=lm, template="{text} {label}", target="label", settings=settings, progress=progress
    )


def run_compare(base: Path, out: Path, progress: bool | None) -> None:
    compare(recipe(base, out), CompareSettings(arms=["base"]), own_process=False, progress=progress)


def run_generate(base: Path, out: Path, progress: bool | None) -> None:
    settings = DecodeSettings(max_new_tokens=2)
    generate(FrozenLM.load(str(base / "base")), ["one", "two"], None, settings, progress=progress)


def run_score(base: Path, out: Path, progress: bool | None) -> None:
    score(FrozenLM.load(str(base / "base")), ["one", "two"], " more", progress=progress)


VERBS = (run_tune, run_sweep, run_together, run_evaluate, run_compare, run_generate, run_score)


@pytest.mark.parametrize("verb", VERBS)
def test_a_long_call_shows_progress_where_someone_watches_and_never_when_it_is_off(
    base: Path,
    tmp_path: Path,
    verb: Callable[[Path, Path, bool | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """FORCE_COLOR is rich's own way to take a stream for a terminal."""
    shown = {}
    for terminal in (True, False):
        monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
        assert Screen(stderr=True).is_watched is terminal
        for progress in (None, False):
            verb(base, tmp_path / f"{terminal}-{progress}", progress)
            written = capsys.readouterr()
            assert written.out == ""  # what a script prints stays its own
            shown[terminal, progress] = bool(written.err)
    assert shown == {(True, None): True, (True, False): False, (False, None): False, (False, False): False}


def test_progress_of_generating_and_scoring_counts_every_text_to_the_end(base: Path) -> None:
    lm = FrozenLM.load(str(base / "base"))
    texts = [f"text {number}" for number in range(5)]
    calls: list[tuple[int, int]] = []
    for work in (
        lambda advance: generate(
            lm, texts, None, DecodeSettings(max_new_tokens=3), batch_rows=2, progress=advance
        ),
        lambda advance: score(lm, texts, " more", batch_rows=2, progress=advance),
    ):
        calls.clear()
        assert len(work(lambda done, total: calls.append((done, total)))) == 5
        assert [total for _, total in calls] == [5] * len(calls)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert len(calls) > 1
        assert calls[-1] == (5, 5)


def test_a_streamed_text_and_a_single_one_show_no_bar(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    lm = FrozenLM.load(str(base / "base"))
    capsys.readouterr()
    generate(lm, "one", None, DecodeSettings(max_new_tokens=2))
    generate(lm, ["one", "two"], None, DecodeSettings(max_new_tokens=2), on_text=lambda number, piece: None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("show", [ShowProgress, lambda screen: ShowJobs(screen, ["soft", "deep"])])
def test_a_live_line_is_set_aside_while_another_library_draws(show: Any) -> None:
    screen = Screen(file=io.StringIO(), force_terminal=True)
    with show(screen) as shown_now:
        assert shown_now.bar.live.is_started
        with set_aside():
            assert not shown_now.bar.live.is_started
        assert shown_now.bar.live.is_started
    assert not shown_now.bar.live.is_started
    with set_aside():  # of an ended run nothing is drawn again
        pass
    assert not shown_now.bar.live.is_started
