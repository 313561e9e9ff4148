"""Curves of runs, and figures for other programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from softprompt.cli.app import main
from softprompt.errors import DataError, MissingExtra
from softprompt.report.curves import Curves, read_curves, smoothed
from softprompt.report.plot import draw, for_terminal, read_plotted
from test_learn import learn, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    learn(folder, "tune.valid_every_steps=3")
    return folder


def test_a_runs_curves_are_those_that_it_recorded(run: Path) -> None:
    (curves,) = read_plotted([run])
    assert curves.name == "first"
    assert [step for step, _ in curves.training] == list(range(1, 10))
    assert [step for step, _ in curves.held_out] == [0, 3, 6, 9]
    assert curves.base > 0


def test_a_line_that_was_cut_short_is_left_out(run: Path, tmp_path: Path) -> None:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(text[:4]) + '\n{"event": "Ste', encoding="utf-8")
    (curves,) = read_plotted([tmp_path])
    assert len(curves.training) + len(curves.held_out) == 3


def test_smoothing_is_the_mean_of_neighbours() -> None:
    points = tuple((float(n), float(n % 2)) for n in range(40))
    assert smoothed(points, share=0.05)[10] == (10.0, pytest.approx(2 / 3))
    assert smoothed(points[:3]) == points[:3]


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    drawn = for_terminal(
        [Curves("a", (), ((0, 4.0), (5, 2.5), (10, 1.0)), 5.0)], width=40, height=6
    ).splitlines()
    assert drawn[0].startswith("   4.000 ┤")
    assert drawn[5].startswith("   1.000 ┤")
    filled = [
        [place for place, sign in enumerate(line[10:]) if 0x2800 < ord(sign) < 0x2900] for line in drawn[:6]
    ]
    assert filled[0][0] == 0
    assert filled[5][-1] == 29
    assert [places[0] for places in filled] == sorted(places[0] for places in filled)
    assert drawn[-1] == "a: held-out loss 4.0000 at the start, 1.0000 at step 10, base alone 5.0000"


def test_a_run_without_held_out_rows_is_not_said_to_have_a_held_out_loss(tmp_path: Path) -> None:
    """The latest prompt is kept there, also where an earlier one had the lower loss."""
    started = {"event": "Started", "validation_examples": 0, "baseline_nll": 5.0}
    measured = [
        {"event": "Validated", "step": step, "nll": nll} for step, nll in ((0, 4.0), (5, 1.0), (9, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [started, *measured])))
    drawn = for_terminal([read_curves(tmp_path)]).splitlines()
    assert drawn[-1].endswith(": training loss 4.0000 at the start, 2.0000 at step 9, base alone 5.0000")


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_is_written_in_the_format_of_its_name(run: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curves.{ending}"
    draw(read_plotted([run, run]), path)
    content = path.read_bytes()
    if ending == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(content).tag.endswith("svg")


def test_without_matplotlib_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'softprompt\[plot\]'"):
        draw(read_plotted([run]), "x.png")


def test_the_command_draws_and_a_folder_without_a_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(run)]) == 0
    assert "first: held-out loss" in capsys.readouterr().out
    assert main(["plot", str(tmp_path)]) == 3
    with pytest.raises(DataError, match="Give the folder of a run"):
        read_plotted([tmp_path])


def test_trackers_get_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []
    fake: Any = SimpleNamespace(
        init=lambda **settings: logged.append((-1, settings)),
        log=lambda figures, step: logged.append((step, figures)),
        finish=lambda: ended.append(True),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tuned = learn(tmp_path / "p", "tune.trackers=[trackio]")
    assert logged[0][1]["name"] == "p"
    held_out = {step: figures["held_out/nll"] for step, figures in logged[1:] if "held_out/nll" in figures}
    assert min(held_out.values()) == tuned.nll_after
    assert sum("training/nll" in figures for _, figures in logged) == 9
    assert ended == [True]


def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match="pip install wandb"):
        learn(tmp_path / "p", "tune.trackers=[wandb]")
    assert recipe(tmp_path / "p").tune.trackers == []
