"""Several processes that learn one prompt together, by gloo on one machine."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

import several
from softprompt import load_prompt
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import Processes
from softprompt.cli.app import main
from softprompt.data.encoded import Encoded
from tiny_models import tiny_model, tiny_tokenizer

FLAGS = [
    "--data", "builtin:messages", "--target", "label", "--template", "{text}{soft:4} {label}", "--dtype", "float32",
    "--steps", "4", "--batch-size", "6", "--limit", "60", "--validation", "8", "--device", "cpu",
]  # fmt: skip


def row(length: int) -> Encoded:
    return Encoded([1] * length, [-1] * length, [True] * length, length, 0)


def test_every_row_is_read_by_one_process_and_long_ones_are_spread() -> None:
    rows = [row(length) for length in (9, 1, 5, 7, 3, 8, 2)]
    shares = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert sorted(len(one) for share in shares for one in share) == [1, 2, 3, 5, 7, 8, 9]
    assert [[len(one) for one in share] for share in shares] == [[1, 5, 9], [2, 7], [3, 8]]


def test_a_process_alone_reads_all_rows_as_they_are() -> None:
    rows = [row(3), row(1)]
    assert Processes().share(rows) is rows


@pytest.mark.parametrize(
    "verb",
    ["sweep", "together", "distil", "compare", "serve", "generate", "export", "demo", "chat", "publish"],
)
def test_a_verb_of_one_process_is_refused_under_torchrun(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = ["--data", "builtin:messages", "--target", "label", "--out", "runs/x"]
    words = {
        "sweep": [*data, "--grid", "tune.learning_rate=0.1,0.2"],
        "together": ["builtin.yaml"],
        "distil": [
            "--instruction",
            "Answer with one word.",
            "--data",
            "builtin:messages",
            "--column",
            "text",
        ],
        "compare": data,
        "serve": ["--port", "0"],
        "generate": ["a"],
        "export": ["runs/y", "--to", "vectors", "--out", "runs/x"],
        "publish": ["runs/y", "name@1", "--library", "runs"],
    }
    Path("builtin.yaml").write_text("data: {source: 'builtin:roles', column: prompt}\nout: runs/x\n")
    assert main([verb, *words.get(verb, [])]) == 2
    assert f"WORLD_SIZE=2: `{verb}` runs in one process." in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


def command(out: Path, *more: str) -> list[str]:
    return ["-m", "softprompt", "tune", *FLAGS, "--out", str(out), "--json", *more]


def launched(count: int, out: Path, *more: str, anew: bool = False) -> list[subprocess.CompletedProcess[str]]:
    return several.launched(count, command(out, *more), anew=anew)


def vectors(folder: Path) -> torch.Tensor:
    return load_prompt(folder).plain[0]


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_the_prompt_of_one_to_rounding(tmp_path: Path, count: int) -> None:
    (alone,) = launched(1, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    finished = launched(count, tmp_path / "several", anew=count == 2)  # as torchrun starts them
    assert [process.returncode for process in finished] == [0] * count, finished[-1].stderr
    torch.testing.assert_close(
        vectors(tmp_path / "several"), vectors(tmp_path / "alone"), rtol=1e-4, atol=1e-6
    )
    # The first speaks for all, and only one run is left.
    record = json.loads(finished[0].stdout)
    assert record["nll_after"] == pytest.approx(json.loads(alone.stdout)["nll_after"], rel=1e-5)
    assert [process.stdout for process in finished[1:]] == [""] * (count - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "several"]


@pytest.mark.parametrize("spread", ["tensor", "layers"])
def test_several_processes_that_hold_parts_of_a_base_learn_the_prompt_of_the_whole(
    tmp_path: Path, spread: str
) -> None:
    base = tmp_path / "base"
    tiny_model("Llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (alone,) = launched(1, tmp_path / "alone", "--base", str(base))
    assert alone.returncode == 0, alone.stderr
    finished = launched(2, tmp_path / "parts", "--base", str(base), "--spread", spread)
    assert [process.returncode for process in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    whole, parts = load_prompt(tmp_path / "alone"), load_prompt(tmp_path / "parts")
    torch.testing.assert_close(parts.plain[0], whole.plain[0], rtol=1e-4, atol=1e-5)
    # The digests are those of the whole base, so that the prompt fits it however it is loaded.
    assert parts.base == whole.base


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model("Llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def recorded(out: Path) -> list[tuple[int, float]]:
    """The steps of a run and their losses, in the order in which they were recorded."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["nll"]) for event in events if event["event"] == "Stepped"]


@pytest.mark.parametrize("spread", ["none", "tensor"])
def test_a_run_of_two_processes_that_are_all_killed_goes_on_to_the_same_bits(
    tmp_path: Path, base: str, spread: str
) -> None:
    long = ["--base", base, "--steps", "16", "--set", "tune.checkpoint_steps=1", "--spread", spread]
    undisturbed = launched(2, tmp_path / "undisturbed", *long)
    assert [process.returncode for process in undisturbed] == [0, 0], undisturbed[0].stderr

    with several.started(2, command(tmp_path / "killed", *long)) as killed:
        while not list((tmp_path / "killed").glob("checkpoints/0000000*.checkpoint")):
            assert all(process.poll() is None for process in killed)
            time.sleep(0.01)
        for process in killed:
            process.kill()
    steps_before = len(recorded(tmp_path / "killed"))
    assert 0 < steps_before < 16

    # As many processes give the same bits.
    resumed = launched(2, tmp_path / "killed", *long, "--resume")
    assert [process.returncode for process in resumed] == [0, 0], resumed[0].stderr
    assert torch.equal(vectors(tmp_path / "killed"), vectors(tmp_path / "undisturbed"))
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "undisturbed")
    assert [step for step, _ in recorded(tmp_path / "killed")] == list(range(1, 17))


def test_a_run_goes_on_with_another_number_of_processes_to_rounding(tmp_path: Path, base: str) -> None:
    long = ["--base", base, "--steps", "12", "--set", "tune.checkpoint_steps=4"]
    undisturbed = launched(2, tmp_path / "p", *long)
    assert [process.returncode for process in undisturbed] == [0, 0], undisturbed[0].stderr
    wanted = vectors(tmp_path / "p")
    (
        tmp_path / "p" / "checkpoints" / "000000012.checkpoint"
    ).unlink()  # as if it had been killed after step 8
    (resumed,) = launched(1, tmp_path / "p", *long, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [step for step, _ in recorded(tmp_path / "p")] == list(range(1, 13))
    torch.testing.assert_close(vectors(tmp_path / "p"), wanted, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused_by_all_processes_in_one_line(
    tmp_path: Path, base: str
) -> None:
    on = ["--base", base, "--set", "tune.checkpoint_steps=2"]
    assert launched(1, tmp_path / "p", *on)[0].returncode == 0
    first, second = launched(2, tmp_path / "p", *on, "--set", "tune.seed=7", "--resume")
    assert first.returncode == 2
    assert "its checkpoint is of another run: tune.seed was 0, is 7" in " ".join(first.stderr.split())
    assert second.returncode != 0
    assert "Traceback" not in first.stderr + second.stderr


def test_a_head_in_parts_gives_the_loss_and_gradient_of_the_whole_and_no_process_holds_all_of_it(
    base: str,
) -> None:
    done = several.launched(2, [str(Path(__file__).with_name("sharded_head_worker.py")), base])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    found = [json.loads(process.stdout) for process in done]
    assert [each["differences"] < 2e-6 for each in found] == [True, True]
    assert [(each["head_rows"], each["first"]) for each in found] == [(160, 0), (160, 160)]
    assert [(each["vocabulary"], each["logits"]) for each in found] == [(320, 320), (320, 320)]
    whole = FrozenLM.load(base, dtype="float32", device="cpu")
    for each in found:
        assert each["weights_sha256"] == whole.fingerprint.weights_sha256
        assert each["sha256"] == whole.fingerprint.sha256
        assert each["in_memory"] == whole.weights_sha256()
