"""Work on a Ray cluster of several nodes: a killed node or worker costs time, and changes no figure.

Needs Ray (the extra `ray`): pip install -c constraints.txt -e '.[dev,ray]'. `make cluster` installs it and runs the one that
CI runs too.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'softprompt[ray]'")

import ray

from ray_nodes import Gate, GatedWorkers, Held, Nodes
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.comparison.compare import compare
from softprompt.comparison.settings import CompareSettings
from softprompt.errors import ClusterError, RecipeError
from softprompt.evaluation.judge import evaluate
from softprompt.inference.compiled import TextPrompt
from softprompt.inference.generate_file import generate_file
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.events import Event, Started, Stepped
from softprompt.scale.ray_data import RayDataWorkers
from softprompt.scale.ray_workers import RayWorkers, near_the_driver
from softprompt.tuning.sweep import sweep
from test_compare import recipe as compared_recipe
from test_compare import task as task
from test_learn import SPLITS
from test_workers import RATES, prompts_and_records, rows_file, steps_recorded, sweep_recipe
from test_workers import base as base

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


def after_20_steps(event: tuple[int, Event]) -> bool:
    return isinstance(event[1], Stepped) and event[1].step == 20


@pytest.mark.parametrize(("moment", "nodes"), [(None, 1), (after_20_steps, 2)])
def test_a_sweep_loses_nothing_with_a_node(
    tmp_path: Path, base: Path, ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch, moment: Any, nodes: int
) -> None:
    """One node dies when both groups of trials have begun, or both nodes when all trials have taken 20 steps; what was done
    there is done elsewhere."""
    recipe = sweep_recipe(base).changed(["tune.epochs=40"])
    begun: set[str] = set()

    def watch(trial: str, event: Event) -> None:
        if isinstance(event, Started):
            begun.add(trial)

    def kill(held: list[Held]) -> None:
        for part in held[:nodes]:
            ray_cluster.kill_under(part)

    with Gate(tmp_path / "gate", kill, waiting=2, moment=moment) as gate:
        workers = GatedWorkers(gate)
        for name, options in (("here", {}), ("there", {"on_event": watch, "workers": workers})):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            sweep(recipe, RATES[:4], splits=SPLITS, parallel=2, progress=False, **options)  # type: ignore[arg-type]
    ray_cluster.refill()
    assert gate.killed
    assert gate.begun == 2 + nodes  # what was on a killed node began twice
    assert len(begun) == 4
    assert prompts_and_records(tmp_path / "there") == prompts_and_records(tmp_path / "here")
    for number in range(4):
        folder = Path("swept") / "trials" / f"{number:03}-seed0"
        assert steps_recorded(tmp_path / "there" / folder) == list(range(1, 121))


def test_an_evaluation_loses_nothing_with_a_node_and_counts_nothing_twice(
    tmp_path: Path, task: Path, ray_cluster: Nodes
) -> None:
    """A node dies when rows are judged on each of the three."""
    recipe = compared_recipe(task)
    examples = [{"text": f"my order {number} never came", "label": "complaint"} for number in range(320)]

    def judged(out: Path, **options: Any) -> bytes:
        template = recipe.data.template
        given = {"template": template, "target": "label", "out": out, "progress": False}
        evaluate(TextPrompt("Is it one? "), examples, base=recipe.base, **given, **options)
        return (out / "rows.jsonl").read_bytes()

    with Gate(tmp_path / "gate", lambda held: ray_cluster.kill_under(held[0]), waiting=3) as gate:
        there = judged(tmp_path / "there", workers=GatedWorkers(gate))
    ray_cluster.refill()
    assert gate.killed
    assert gate.begun == 5 + 1  # in parts of 64 rows
    assert there == judged(tmp_path / "here")


def learns(event: tuple[str, int, int]) -> bool:
    return event[:2] == ("learning", 5)


def test_a_comparison_loses_nothing_with_a_worker(tmp_path: Path, task: Path, ray_cluster: Nodes) -> None:
    """A worker dies by SIGKILL, as when memory runs out, while it learns the soft prompt of one seed."""
    settings = CompareSettings(arms=["base", "soft"], seeds=2)
    recipe = compared_recipe(task, "tune.max_steps=60")

    def kill(held: list[Held]) -> None:
        os.kill(held[0].pid, signal.SIGKILL)

    with Gate(tmp_path / "gate", kill, waiting=1, moment=learns) as gate:
        there = compare(recipe, settings, tmp_path / "there", workers=GatedWorkers(gate), progress=False)
    here = compare(recipe, settings, tmp_path / "here", own_process=False, progress=False)
    assert gate.begun == 3 + 1
    assert gate.killed[0].pid != os.getpid()
    assert there.failed == {}
    for arm, runs in here.runs.items():
        for mine, other in zip(runs, there.runs[arm], strict=True):
            assert (other.metrics, other.curve) == (mine.metrics, mine.curve)


def test_work_that_has_lost_every_node_goes_on_where_others_come(tmp_path: Path, ray_cluster: Nodes) -> None:
    class Replaced(GatedWorkers):
        """Starts nodes when the cluster has none."""

        def _count_or_wait(self) -> int:
            known = super()._count_or_wait()
            if self.gate.killed and not any(
                node["Resources"].get("CPU") for node in ray.nodes() if node["Alive"]
            ):
                empty.append(known)
                ray_cluster.refill()
            return known

    def kill(held: list[Held]) -> None:
        for part in held:
            ray_cluster.kill_under(part)

    empty: list[int] = []
    with Gate(tmp_path / "gate", kill, waiting=3) as gate:
        assert list(Replaced(gate).map(doubled, range(4))) == [0, 2, 4, 6]
    assert empty == [1]
    assert gate.begun == 4 + 3


def doubled(part: int, tell: Any) -> int:
    return 2 * part


def test_work_for_which_no_machine_is_left_ends_with_a_sentence(
    ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = RayWorkers()
    assert workers.count == 3
    monkeypatch.setattr("ray.nodes", list)
    assert workers._count_or_wait() == 1
    monkeypatch.setattr("softprompt.scale.ray_workers.ROOMLESS_SECONDS", 0)
    with pytest.raises(ClusterError, match="all machines with room for a worker were lost"):
        workers._count_or_wait()
    with pytest.raises(ClusterError, match="no machine has 1 CPUs"):
        RayWorkers()._count_or_wait()


def test_events_go_to_the_node_of_whoever_watches(ray_cluster: Nodes) -> None:
    """Which may not be lost before it; four times, since Ray's own choice is another one in three of four."""

    class Where:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    actors = [
        ray.remote(num_cpus=0)(Where).options(scheduling_strategy=near_the_driver()).remote()
        for _ in range(4)
    ]
    assert set(ray.get([actor.node.remote() for actor in actors])) == {
        ray.get_runtime_context().get_node_id()
    }


@pytest.mark.cluster
def test_the_commands_take_a_cluster_and_leave_what_they_leave_here(
    tmp_path: Path,
    task: Path,
    ray_cluster: Nodes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = compared_recipe(task)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    for name, on in (("here", []), ("there", ["--on", "ray"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        grid = ["--grid", "tune.learning_rate=0.05,0.1", "--parallel", "1"]
        assert main(["sweep", "../recipe.yaml", "--out", "swept", *grid, *on]) == 0
        judge = ["evaluate", "--prompt", "swept", "--out", "judged", *on]
        assert main(judge) == 0, capsys.readouterr().err
    assert prompts_and_records(tmp_path / "there" / "swept") == prompts_and_records(
        tmp_path / "here" / "swept"
    )
    there, here = (tmp_path / name / "judged" / "rows.jsonl" for name in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()


def test_the_command_that_compares_takes_a_cluster(
    tmp_path: Path, task: Path, ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(compared_recipe(task).to_yaml())
    figures = {}
    for name, on in (("here", []), ("there", ["--on", "ray"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        asked = ["compare", "../recipe.yaml", "--out", "compared", "--arms", "base,soft", "--seeds", "1"]
        assert main([*asked, *on]) == 0
        record = json.loads(Path("compared/comparison.json").read_text())
        figures[name] = {arm: [run["metrics"] for run in runs] for arm, runs in record["runs"].items()}
    assert figures["there"] == figures["here"]


def test_what_a_part_raises_and_a_place_that_is_not_shared_are_said_in_one_line(
    tmp_path: Path, ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="no such thing"):
        list(RayWorkers().map(refuse, ["no such thing"]))
    with pytest.raises(ClusterError, match="Part 1 of the work was lost with its worker 2 times"):
        list(RayWorkers(retries=1).map(die, [0]))
    monkeypatch.setattr("softprompt.scale.ray_site._marker", lambda folder: b"of this machine")
    with pytest.raises(ClusterError, match="sees another folder"):
        list(RayWorkers().map(refuse, ["never reached"], folder=tmp_path))
    with pytest.raises(ClusterError, match="no machine has 64 CPUs"):
        list(RayWorkers(cpus=64).map(refuse, ["never reached"]))


def refuse(part: str, tell: Any) -> None:
    raise RecipeError(part)


def die(part: int, tell: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_the_second(part: int, tell: Any) -> int:
    if part == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_row_that_ends_its_workers_is_given_up(ray_cluster: Nodes) -> None:
    """Ray Data alone would start worker after worker for it."""
    with pytest.raises(ClusterError, match="Part 2 of the work was lost with its worker 1 times"):
        list(RayDataWorkers(retries=0).map(die_of_the_second, [0, 1]))
    with pytest.raises(RecipeError, match="no such thing"):
        list(RayDataWorkers().map(refuse, ["no such thing"]))


def stays(folder: Path, part: int, tell: Any) -> int:
    (folder / str(part)).touch()
    while True:
        time.sleep(1.0)


def test_rows_for_which_no_machine_is_left_end_with_a_sentence(
    tmp_path: Path, ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.scale.ray_workers.ROOMLESS_SECONDS", 1.0)
    monkeypatch.setattr("softprompt.scale.ray_data.LOOK_EVERY_SECONDS", 0.2)

    def kill() -> None:
        while not any(tmp_path.iterdir()):
            time.sleep(0.05)
        for node in list(ray_cluster.workers):
            ray_cluster.kill(node)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(ClusterError, match="all machines with room for a worker were lost"):
        list(RayDataWorkers().map(partial(stays, tmp_path), range(4)))
    killer.join()
    ray_cluster.refill()


def test_rows_of_a_file_lose_nothing_with_a_worker_and_stay_in_order(
    tmp_path: Path, base: Path, ray_cluster: Nodes
) -> None:
    """A worker dies by SIGKILL when the first rows are there."""
    lm = FrozenLM.load(str(base), dtype="float32")
    source = rows_file(tmp_path, 640)
    killed: list[int] = []

    def kill(done: int, rows: int) -> None:
        if done and not killed:
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if "MapWorker" in "".join(process.cmdline())
            ]
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    settings = DecodeSettings(max_new_tokens=8)
    for name, options in (("here", {}), ("there", {"workers": RayDataWorkers(), "progress": kill})):
        answers = generate_file(lm, source, tmp_path / name, [], settings, **{"progress": False, **options})  # type: ignore[arg-type]
        assert (answers.rows, answers.failed) == (640, 0)
    assert killed
    there, here = (tmp_path / name / "answers.jsonl" for name in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()
