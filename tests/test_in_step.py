"""Serving, generating and judging on a base that several processes hold in parts, by gloo on one machine."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import in_step_worker
from several import finished, free_port, launched, started
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.serving.local_engine import LocalEngine
from tiny_models import tiny_model, tiny_tokenizer

WORKER = str(Path(__file__).with_name("in_step_worker.py"))
every_spread = pytest.mark.parametrize("spread", ["tensor", "layers"])


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model("Llama", max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def close(found: Any, wanted: Any, where: str = "") -> None:
    """Demands equal answers, log-probabilities up to rounding."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            close(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            close(one, other, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-4), where
    else:
        assert found == wanted, where


@every_spread
def test_an_engine_in_parts_answers_as_one_over_the_whole_base(base: str, spread: str) -> None:
    lm = FrozenLM.load(base, dtype="float32", device="cpu")
    alone = in_step_worker.answers_of(LocalEngine(lm, **in_step_worker.LIMITS))
    first, second = launched(2, [WORKER, base, spread])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(second.stdout) == "followed"
    close(json.loads(first.stdout), alone)


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer of a server on this machine; None while there is none."""
    url = f"http://127.0.0.1:{port}{path}"
    try:
        answer = httpx.get(url, timeout=60) if body is None else httpx.post(url, json=body, timeout=60)
    except httpx.TransportError:
        return None
    if not answer.is_success:
        return answer.status_code
    return answer.json() if answer.content else {}


def wait_for(port: int, path: str, wanted: Any) -> None:
    for _ in range(2400):
        found = ask(port, path)
        if found == wanted or (wanted is dict and isinstance(found, dict)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not become {wanted}")


def serving(base: str, port: int) -> list[str]:
    on = ["--base", base, "--dtype", "float32", "--device", "cpu", "--port", str(port)]
    return ["-m", "softprompt", "serve", *on]


BODY: dict[str, Any] = {"model": "base", "prompt": "The quick brown", "max_tokens": 6, "temperature": 0}


@every_spread
def test_the_command_serves_in_parts_and_ends_in_order(base: str, spread: str) -> None:
    port = free_port()
    with started(2, [*serving(base, port), "--spread", spread]) as parts:
        wait_for(port, "/health", dict)
        (choice,) = ask(port, "/v1/completions", BODY)["choices"]
        for process in parts:  # as torchrun does
            process.send_signal(signal.SIGTERM)
        done = finished(parts)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    lm = FrozenLM.load(base, dtype="float32", device="cpu")
    (alone,) = generate(lm, BODY["prompt"], None, DecodeSettings(max_new_tokens=6))
    assert choice["text"] == alone.text


def test_a_process_that_is_killed_ends_the_service_and_leaves_nobody_waiting(base: str) -> None:
    port = free_port()
    with started(2, [*serving(base, port), "--spread", "layers"]) as parts:
        wait_for(port, "/health", dict)
        parts[1].kill()
        assert ask(port, "/v1/completions", BODY) in (500, 503)
        wait_for(port, "/health", 503)  # so that the first process is started again


def test_a_follower_whose_first_process_is_killed_says_so_in_one_line(base: str) -> None:
    port = free_port()
    with started(2, [*serving(base, port), "--spread", "layers"]) as parts:
        wait_for(port, "/health", dict)
        parts[0].kill()
        _, follower = finished(parts)
    assert follower.returncode not in (0, -signal.SIGKILL)
    assert "Another of the processes that work together has ended" in " ".join(follower.stderr.split())
    assert "Traceback" not in follower.stderr


def test_the_command_generates_in_parts_what_it_generates_alone(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--base", base, "--dtype", "float32", "--device", "cpu",
               "--max-new-tokens", "6", "--json", "The quick brown", "Tweet: my order"]  # fmt: skip
    first, second = launched(2, ["-m", "softprompt", *command, "--spread", "tensor"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    assert main(command) == 0
    assert json.loads(first.stdout) == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("spread", ["none", "tensor"])
def test_several_processes_judge_as_one_and_go_on_where_they_were_killed(
    tmp_path: Path, base: str, spread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--data", "builtin:messages", "--target", "label", "--judge-rows", "20", "--template", "{text} {label}"]  # fmt: skip
    on = ["--metric", "accuracy", "--metric", "nll", "--base", base, "--dtype", "float32", "--device", "cpu"]
    command = ["evaluate", *rows, *on, "--json", "--out"]
    assert main([*command, str(tmp_path / "alone")]) == 0
    alone = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "alone" / "rows.jsonl").read_bytes().splitlines(keepends=True)

    def judged_by_two() -> dict[str, Any]:
        both = ["-m", "softprompt", *command, str(tmp_path / "two"), "--spread", spread]
        first, second = launched(2, both)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert second.stdout == ""
        record: dict[str, Any] = json.loads(first.stdout)
        return record

    two = judged_by_two()
    close(two["metrics"], alone["metrics"])
    assert (two["rows"], two["reused"]) == (20, 0)
    ours = (tmp_path / "two" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    close([json.loads(line) for line in ours], [json.loads(line) for line in lines])
    # A kill leaves the rows that were judged, and the last of them unfinished.
    (tmp_path / "two" / "rows.jsonl").write_bytes(b"".join(ours[:9]) + ours[9][:20])
    again = judged_by_two()
    assert again["reused"] == 9
    close(again["metrics"], alone["metrics"])


def test_a_folder_of_another_evaluation_is_refused_by_all_processes(tmp_path: Path, base: str) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--base", base, "--data", "builtin:messages", "--target", "label",
               "--template", "{text} {label}", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main([*command, "--judge-rows", "2"]) == 0
    first, second = launched(2, ["-m", "softprompt", *command, "--judge-rows", "3"])
    assert first.returncode == 3
    assert "another evaluation" in first.stderr
    assert second.returncode != 0
    assert "Traceback" not in first.stderr + second.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", "base"}
