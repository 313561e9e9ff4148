"""`tune` and `preview` as people and machines use them; and what they say to bad input: one message, a code by kind,
no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forked import begun
from softprompt.cli.app import main
from softprompt.store.artifact import load_prompt

Run = Callable[..., dict[str, Any]]
Refused = Callable[..., str]

ROWS = [
    "I want you to act as a baker. Tell me how to bake bread.",
    "I want you to act as a pilot. Tell me where we fly.",
    "I want you to act as a farmer. Tell me when to sow.",
    "I want you to act as a doctor. Tell me what I have.",
]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four rows in rows.csv, in a folder of its own that is the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.csv"
    path.write_text("prompt\n" + "".join(f"{row}\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that must succeed, with --json: the one object on its stdout."""

    def call(*arguments: str) -> dict[str, Any]:
        code = main([*arguments, "--json"])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        record: dict[str, Any] = json.loads(shown.out)
        return record

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """A command that must fail with this code: its message, which is all that it says, without a traceback."""

    def call(code: int, *arguments: str) -> str:
        assert main(list(arguments)) == code, capsys.readouterr()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        assert shown.err.count("softprompt: ") == 1
        return shown.err.removeprefix("softprompt: ").strip()

    return call


QUICK = ("--column", "prompt", "--epochs", "1", "--batch-size", "2", "--length", "3")


def test_tune_from_flags_alone_writes_a_prompt_and_tells_machines_what_came_of_it(
    rows: Path, run: Run
) -> None:
    record = run("tune", "--data", "rows.csv", *QUICK, "--out", "out", "--set", "data.validation=1")
    assert record["path"] == "out"
    assert record["steps"] == 2  # three rows are left to learn from, two a step
    assert 0 <= record["best_step"] <= 2
    assert record["nll_after"] <= record["nll_before"]
    assert record["tokens"] > 0 < record["seconds"]
    assert record["peak_memory_bytes"] > 1e6
    assert record["stopped"] == "finished"
    prompt = load_prompt("out")
    assert (prompt.kind, prompt.length, prompt.template) == ("soft", 3, "{soft:3}{text}")
    assert prompt.base.name == "builtin"
    assert record["prompt_bytes"] == Path("out/adapter_model.safetensors").stat().st_size


def test_what_tune_writes_can_be_generated_with_and_inspected(rows: Path, run: Run) -> None:
    run("tune", "--data", "rows.csv", *QUICK, "--out", "out")
    (one,) = run("generate", "--prompt", "out", "I want", "--max-new-tokens", "3")["outputs"]
    assert (one["prompt"], one["input"]) == ("out", "I want")
    told = run("inspect", "out")
    assert told["notes"]["recipe"]["tune"]["epochs"] == 1
    assert told["notes"]["metrics"]["steps"] == 2


def test_the_starting_recipe_can_be_tuned_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipe"]) == 0
    Path("my.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    record = run("tune", "my.yaml", "--steps", "1", "--limit", "8", "--validation", "2")
    assert record["path"] == "runs/prompt"
    assert load_prompt("runs/prompt").length == 20


def test_flags_win_over_set_and_set_over_the_file(rows: Path, run: Run) -> None:
    Path("r.yaml").write_text(
        "base: builtin\ndata: {source: rows.csv, column: prompt}\nprompt: {length: 2}\n"
        "tune: {epochs: 9, batch_size: 4, learning_rate: 5e-3}\nout: from_file\n"
    )
    record = run(
        "tune", "r.yaml", "--set", "tune.epochs=3", "--set", "out=from_set", "--epochs", "2", "--dry-run"
    )
    assert (record["steps"], record["batch_size"], record["learning_rate"]) == (2, 4, 0.005)
    assert (record["virtual_tokens"], record["path"]) == (2, "from_set")


def test_a_dry_run_shows_everything_and_writes_nothing(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir())
    assert main(["tune", "--data", "rows.csv", *QUICK, "--out", "out", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for told in (
        "layers",
        "fingerprint",
        "[3 virtual tokens: 0 to 2]",
        "trained",
        "steps",
        "unlabelled",
        "would write",
    ):
        assert told in shown
    assert sorted(os.listdir()) == before


def test_people_see_progress_the_losses_the_place_and_the_next_commands(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--data", "rows.csv", *QUICK, "--out", "out", "--set", "data.validation=1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for told in ("2 steps", "loss", "lr", "tokens/s", "left", "held-out loss", "base alone", "peak memory"):
        assert told in shown
    assert "softprompt generate --prompt out --side-by-side" in shown


def test_preview_tells_soft_read_and_trained_tokens_apart(rows: Path, run: Run) -> None:
    Path("kinds.csv").write_text("text,label\nwhere is it,delivery\nthank you,thanks\n")
    arguments = ["preview", "--data", "kinds.csv", "--set", "data.target=label", "--show", "1"]
    record = run(*arguments, "--set", "data.template={soft:2}Say: {text} Kind: {label}")
    (row,) = record["shown"]
    kinds = [token["kind"] for token in row["tokens"]]
    assert kinds[:2] == ["soft", "soft"]
    assert (
        "".join(token["text"] for token in row["tokens"] if token["kind"] == "context")
        == "Say: where is it Kind:"
    )
    trained = [token["text"] for token in row["tokens"] if token["kind"] == "trained"]
    assert "".join(trained[:-1]) == " delivery"
    assert (record["examples"], record["truncated"], record["unlabelled"]) == (2, 0, 0)


def test_preview_counts_what_a_run_would_refuse(rows: Path, run: Run) -> None:
    Path("uneven.csv").write_text("text\nshort\n" + "long " * 40 + "\n")
    record = run(
        "preview", "--data", "uneven.csv", "--column", "text", "--max-positions", "30", "--length", "2"
    )
    assert (record["too_long"], record["truncated"], record["dropped"]) == (1, 0, 0)
    for how, counted in (("truncate", "truncated"), ("drop", "dropped")):
        again = run(
            "preview", "--data", "uneven.csv", "--column", "text", "--max-positions", "30", "--length", "2",
            "--set", f"data.on_overflow={how}",
        )  # fmt: skip
        assert (again[counted], again["too_long"]) == (1, 0)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(rows: Path, refused: Refused) -> None:
    assert "nowhere.csv" in refused(3, "tune", "--data", "nowhere.csv", "--column", "prompt")


def test_a_missing_column_is_refused_with_the_one_that_was_meant(rows: Path, refused: Refused) -> None:
    message = refused(3, "tune", "--data", "rows.csv", "--column", "promt")
    assert "promt" in message
    assert "Did you mean 'prompt'?" in message


def test_empty_data_is_refused(rows: Path, refused: Refused) -> None:
    Path("empty.csv").write_text("prompt\n")
    assert "empty.csv" in refused(3, "tune", "--data", "empty.csv", "--column", "prompt")
    Path("nothing.csv").write_text("")
    assert "nothing.csv" in refused(3, "tune", "--data", "nothing.csv", "--column", "prompt")


def test_a_row_without_a_trained_token_is_refused_by_its_number(rows: Path, refused: Refused) -> None:
    Path("blank.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "   "}\n')
    message = refused(
        3,
        "tune",
        "--data",
        "blank.jsonl",
        "--set",
        "data.template={text} {label}",
        "--set",
        "data.target=label",
    )
    assert "rows 1, counted from 0" in message


def test_a_text_longer_than_the_limit_is_refused_with_the_ways_out(
    rows: Path, refused: Refused, run: Run
) -> None:
    arguments = ["tune", "--data", "rows.csv", *QUICK, "--max-positions", "10", "--out", "out"]
    message = refused(3, *arguments)
    assert "limit is 10" in message
    assert "truncate or drop" in message
    assert not Path("out").exists()
    assert run(*arguments, "--set", "data.on_overflow=truncate")["truncated_rows"] == 4


def test_an_unknown_base_is_refused(rows: Path, refused: Refused) -> None:
    arguments = ("--data", "rows.csv", *QUICK, "--out", "out")
    assert "no-such-model" in refused(5, "tune", "--base", "someone/no-such-model", *arguments)
    Path("hollow").mkdir()
    assert "config.json" in refused(5, "tune", "--base", "hollow", *arguments)
    assert not Path("out").exists()


def test_an_unknown_key_is_refused_with_its_file_and_line(rows: Path, refused: Refused) -> None:
    Path("r.yaml").write_text("data:\n  source: rows.csv\n  colum: prompt\n")
    assert refused(2, "tune", "r.yaml") == "r.yaml:3: data.colum: unknown setting. Did you mean data.column?"
    assert refused(2, "tune", "--set", "tune.epoch=3", "--data", "x").endswith("Did you mean tune.epochs?")


def test_a_flag_of_the_wrong_kind_is_refused_with_the_flag(rows: Path, refused: Refused) -> None:
    message = refused(2, "tune", "--data", "rows.csv", "--epochs", "many")
    assert message == "--epochs: tune.epochs: found 'many' (text), wanted a whole number of at least 1."


def test_no_data_at_all_is_refused_with_the_flag_to_give(refused: Refused) -> None:
    assert "--data" in refused(2, "tune")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_a_usable_prompt(
    rows: Path, refused: Refused
) -> None:
    arguments = ("--data", "rows.csv", *QUICK, "--epochs", "4", "--out", "out", "--set", "data.validation=1")
    message = refused(1, "tune", *arguments, "--learning-rate", "1e30")
    assert "not finite" in message
    assert "tune.learning_rate" in message
    assert load_prompt("out").length == 3


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_saving_is_one_message_and_leaves_no_half_prompt(
    rows: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", disk_is_full)
    message = refused(1, "tune", "--data", "rows.csv", *QUICK, "--out", "out")
    assert "out: could not be written (No space left on device)" in message
    left = {path.name for path in Path("out").iterdir()}
    assert left <= {"recipe.yaml", "metrics.jsonl"}  # the run's own records, no part of a prompt


def test_a_full_disk_while_saving_leaves_the_former_prompt_whole(
    rows: Path, run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("tune", "--data", "rows.csv", *QUICK, "--out", "out")
    run(*arguments)
    files = ("adapter_config.json", "adapter_model.safetensors", "softprompt.json", "README.md")
    before = [Path("out", name).read_bytes() for name in files]
    monkeypatch.setattr(os, "fsync", disk_is_full)
    refused(1, *arguments, "--seed", "5")
    assert [Path("out", name).read_bytes() for name in files] == before
    assert load_prompt("out").length == 3


def test_ctrl_c_between_two_files_of_a_prompt_waits_until_all_are_there(
    rows: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("tune", "--data", "rows.csv", *QUICK, "--out", "out")
    run(*arguments)
    before = Path("out", "adapter_model.safetensors").read_bytes()
    replace, finals = os.replace, []

    def replace_and_interrupt(draft: Path, final: Path) -> None:
        replace(draft, final)
        finals.append(Path(final).name)
        if finals[-1] == "adapter_config.json":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([*arguments, "--seed", "5"]) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    assert capsys.readouterr().err == "softprompt: interrupted.\n"
    assert {"adapter_config.json", "adapter_model.safetensors", "softprompt.json", "README.md"} <= set(finals)
    assert Path("out", "adapter_model.safetensors").read_bytes() != before
    assert load_prompt("out").length == 3
    assert not [path for path in Path("out").iterdir() if path.name.endswith(".draft")]


def test_a_place_that_cannot_be_written_is_refused_before_training(rows: Path, refused: Refused) -> None:
    Path("taken").write_text("a file, not a folder")
    assert "taken" in refused(1, "tune", "--data", "rows.csv", *QUICK, "--out", "taken")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_a_stopped_job_and_a_closed_terminal_keep_the_best_prompt_and_exit_with_130(
    rows: Path, number: signal.Signals
) -> None:
    given = [
        "--epochs",
        "100000",
        "--out",
        "out",
        "--set",
        "data.validation=1",
        "--set",
        "tune.valid_every_steps=2",
    ]
    process = begun(
        ["-u", "-m", "softprompt", "tune", "--data", "rows.csv", *QUICK, *given],
        anew=number == signal.SIGINT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        said = line if isinstance(line, str) else line.decode()
        if "best so far" in said and not said.startswith("step 0 "):
            break
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "softprompt: interrupted.\n"
    assert "The best prompt so far is kept in out" in rest
    assert "give the same command with --resume" in rest
    assert load_prompt("out").notes["metrics"]["stopped"] == "interrupted"
    assert load_prompt("out").notes["metrics"]["best_step"] >= 1


def test_the_tutorials_recipe_runs_on_local_copies(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """To the letter but for the base, which here is the bundled one in a folder, and the epochs: one of five."""
    from softprompt.base.locate import BUILTIN

    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parent.parent / "examples" / "tutorial.yaml"
    local = (
        "--set",
        f"base={BUILTIN}",
        "--set",
        f"data.source={shared_data}/awesome-chatgpt-prompts/prompts.csv",
    )
    plan = run("tune", str(recipe), *local, "--dry-run")
    assert (plan["examples"], plan["virtual_tokens"], plan["learning_rate"]) == (50, 4, 0.005)
    assert plan["steps"] == 35  # five epochs of 50 rows, 8 a step
    record = run("tune", str(recipe), *local, "--epochs", "1")
    assert record["steps"] == 7
    assert record["nll_after"] < record["nll_before"]
    arguments = ("--max-length", "100", "--repetition-penalty", "1.5", "I want you to act as a logistician. ")
    (one,) = run("generate", "--base", str(BUILTIN), "--prompt", "runs/tutorial", *arguments)["outputs"]
    assert one["prompt"] == "tutorial"
    assert one["text"]


def test_a_prompt_that_is_worse_than_no_prompt_is_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random vectors that are hardly moved disturb a wording that the base knows; vectors that learn help it in another.
    The two losses say which."""
    known, unknown = "Message: {text} Kind:{soft:8} {label}", "{text}\n{soft:8} {label}"
    for template, rate, expected in ((known, "1e-9", True), (unknown, "auto", False)):
        out = str(tmp_path / rate)
        arguments = [
            "tune", "--data", "builtin:messages", "--limit", "48", "--validation", "24", "--steps", "4", "--out", out, "--target", "label",
            "--template", template, "--set", "prompt.init=random",
            "--set", f"tune.learning_rate={rate}",
        ]  # fmt: skip
        assert main([*arguments, "--json"]) == 0
        shown = capsys.readouterr()
        record = json.loads(shown.out)
        assert (record["nll_after"] > record["nll_base"]) == expected
        assert ("The prompt is worse than the base: held-out loss" in " ".join(shown.err.split())) == expected
