"""Several processes that learn one prompt together, by gloo on one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt import load_prompt
from softprompt.base.processes import Processes
from softprompt.cli.app import main
from softprompt.data.encoded import Encoded
from tiny_models import tiny_model, tiny_tokenizer

FLAGS = [
    "--data", "builtin:messages", "--target", "label", "--template", "{text}{soft:4} {label}", "--dtype", "float32",
    "--steps", "4", "--batch-size", "6", "--limit", "60", "--device", "cpu",
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


@pytest.mark.parametrize("verb", ["sweep", "together", "distil", "compare", "serve"])
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
    }
    Path("builtin.yaml").write_text("data: {source: 'builtin:roles', column: prompt}\nout: runs/x\n")
    assert main([verb, *words[verb]]) == 2
    assert f"WORLD_SIZE=2: `{verb}` runs in one process." in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


def launched(
    count: int, out: Path, *more: str, module: str = "softprompt"
) -> list[subprocess.CompletedProcess[str]]:
    """Starts the command `count` times as torchrun does: by its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        environment = {
            **os.environ, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", module, "tune", *FLAGS, "--out", str(out), "--json", *more]
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    finished = []
    for process in running:
        stdout, stderr = process.communicate(timeout=500)
        finished.append(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    return finished


def vectors(folder: Path) -> torch.Tensor:
    return load_prompt(folder).plain[0]


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_the_prompt_of_one_to_rounding(tmp_path: Path, count: int) -> None:
    (alone,) = launched(1, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    finished = launched(count, tmp_path / "several")
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
    torch.testing.assert_close(parts.plain[0], whole.plain[0], rtol=1e-4, atol=1e-6)
    # The digests are those of the whole base, so that the prompt fits it however it is loaded.
    assert parts.base == whole.base
