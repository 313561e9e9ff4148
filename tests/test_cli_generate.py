"""`generate` and `inspect` as people and machines use them, on the bundled base."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.store.artifact import save_prompt

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.load("builtin", dtype="float32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that must succeed, with --json: its one object."""

    def call(*arguments: str) -> dict[str, Any]:
        code = main([*arguments, "--json"])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        record: dict[str, Any] = json.loads(shown.out)
        return record

    return call


WORDS = "The children walked along the river to"


@pytest.fixture
def prompt_of_words(lm: FrozenLM, tmp_path: Path) -> Path:
    """A soft prompt made of the embeddings of real tokens: it must do what those words do."""
    ids = lm.tokenizer(WORDS)["input_ids"]
    vectors_PD = lm.embed(torch.tensor(ids)).float()
    prompt = SoftPrompt(vectors_PD, lm.fingerprint, f"{{soft:{len(ids)}}}{{text}}", name="words")
    return save_prompt(prompt, tmp_path / "words")


def texts(record: dict[str, Any]) -> list[str]:
    return [one["text"] for one in record["outputs"]]


def test_generate_prints_the_outputs_of_the_base_as_one_json_object(run: Run) -> None:
    record = run("generate", "Once upon a time", "The dog", "--max-new-tokens", "4", "--dtype", "float32")
    assert set(record) == {"outputs"}
    assert [set(one) for one in record["outputs"]] == [
        {"prompt", "input", "text", "tokens", "finish_reason"}
    ] * 2
    assert [one["input"] for one in record["outputs"]] == ["Once upon a time", "The dog"]
    assert all(one["prompt"] is None for one in record["outputs"])
    assert all(one["finish_reason"] in ("stop", "length") and one["tokens"] <= 4 for one in record["outputs"])


def test_a_prompt_of_real_tokens_continues_as_those_words_do(run: Run, prompt_of_words: Path) -> None:
    settings = ("--max-new-tokens", "8", "--dtype", "float32")
    by_prompt = run("generate", "--prompt", str(prompt_of_words), " school", *settings)
    by_words = run("generate", WORDS + " school", *settings)
    assert texts(by_prompt) == texts(by_words)
    assert by_prompt["outputs"][0]["prompt"] == "words"


def test_side_by_side_answers_each_input_by_the_base_and_by_the_prompt(
    run: Run, prompt_of_words: Path
) -> None:
    settings = ("--max-new-tokens", "5", "--dtype", "float32")
    both = run("generate", "--prompt", str(prompt_of_words), "--side-by-side", " the", " a", *settings)
    assert [(one["prompt"], one["input"]) for one in both["outputs"]] == [
        (None, " the"),
        ("words", " the"),
        (None, " a"),
        ("words", " a"),
    ]
    assert texts(both)[::2] == texts(run("generate", " the", " a", *settings))
    assert texts(both)[1::2] == texts(
        run("generate", "--prompt", str(prompt_of_words), " the", " a", *settings)
    )


def test_people_see_both_answers_under_their_input(
    prompt_of_words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "generate",
        "--prompt",
        str(prompt_of_words),
        "--side-by-side",
        "the hills",
        "--max-new-tokens",
        "3",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.strip()] == ["input", "base", "words"]


def test_the_same_seed_draws_the_same_text_and_another_seed_another(run: Run) -> None:
    def drawn(seed: str) -> list[str]:
        return texts(
            run(
                "generate",
                "I like",
                "--temperature",
                "1",
                "--seed",
                seed,
                "-n",
                "2",
                "--max-new-tokens",
                "12",
            )
        )

    assert drawn("1") == drawn("1") != drawn("2")
    assert len(set(drawn("1"))) == 2


def test_max_length_counts_the_input_too(run: Run, lm: FrozenLM) -> None:
    length = len(lm.tokenizer(WORDS)["input_ids"])
    record = run("generate", WORDS, "--max-length", str(length + 2))
    assert record["outputs"][0]["tokens"] <= 2


def test_a_stop_text_ends_the_continuation(run: Run) -> None:
    free = texts(run("generate", WORDS, "--max-new-tokens", "20"))[0]
    word = free.split()[1]
    stopped = run("generate", WORDS, "--max-new-tokens", "20", "--stop", word)["outputs"][0]
    assert stopped["text"] == free[: free.index(word)]
    assert stopped["finish_reason"] == "stop"


def test_text_may_come_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(WORDS))
    assert run("generate", "-", "--max-new-tokens", "2")["outputs"][0]["input"] == WORDS


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["generate", "--base", "./nowhere", "x"], 5, "nowhere"),
        (["generate", "--base", "someone/no-such-model", "x"], 5, "HF_HUB_OFFLINE"),
        (["generate", "--prompt", "nowhere", "x"], 5, "nowhere: there is no such folder"),
        (["generate", "--side-by-side", "x"], 2, "--prompt"),
        (["generate", "--temperature", "-1", "x"], 2, "--temperature: found -1 "),
        (["generate", "--device", "cuda:7", "x"], 5, "cuda:7"),
        (["generate", ""], 3, "empty"),
        (["inspect", "nowhere"], 5, "nowhere"),
    ],
)
def test_what_cannot_be_generated_is_refused_by_kind(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err


def test_a_text_that_could_be_no_path_is_a_text(run: Run) -> None:
    for text in ("word " * 80, "a\0b", "x" * 300):
        assert run("generate", text, "--max-new-tokens", "1")


def test_a_prompts_folder_in_the_place_of_a_text_or_a_recipe_is_refused_with_its_flag(
    prompt_of_words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("generate", "evaluate"):
        assert main([verb, str(prompt_of_words)]) == 2
        assert f"--prompt {prompt_of_words}" in capsys.readouterr().err


def test_a_prompt_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Fingerprint("someone/else", None, "f" * 64, 1024, 24, 250_880, 16, 64)
    save_prompt(SoftPrompt(torch.zeros(2, 1024) + 0.1, other, name="other"), tmp_path / "other")
    assert main(["generate", "--base", "builtin", "--prompt", str(tmp_path / "other"), "x"]) == 5
    message = capsys.readouterr().err
    assert "learned on someone/else (width 1024)" in message
    assert "Load someone/else, or tune again" in message


def test_a_damaged_tensor_file_is_refused(prompt_of_words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prompt_of_words / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    for arguments in (["generate", "--prompt", str(prompt_of_words), "x"], ["inspect", str(prompt_of_words)]):
        assert main(arguments) == 5
        message = capsys.readouterr().err
        assert str(prompt_of_words) in message
        assert "Traceback" not in message


def test_inspect_tells_origin_template_and_the_tokens_that_the_vectors_were_made_of(
    run: Run, lm: FrozenLM, prompt_of_words: Path
) -> None:
    record = run("inspect", str(prompt_of_words))
    ids = lm.tokenizer(WORDS)["input_ids"]
    assert (record["name"], record["kind"], record["length"]) == ("words", "soft", len(ids))
    assert record["template"] == f"{{soft:{len(ids)}}}{{text}}"
    assert record["base"]["sha256"] == lm.fingerprint.sha256
    assert record["bytes"] == (prompt_of_words / "adapter_model.safetensors").stat().st_size
    # Each vector is a real token's, so its nearest neighbour is that token, at cosine 1 and with that token's norm.
    rows = record["vectors"]["rows"]
    assert [row["nearest"][0]["token"] for row in rows] == [lm.tokenizer.decode([token]) for token in ids]
    assert all(row["nearest"][0]["cosine"] == pytest.approx(1, abs=1e-3) for row in rows)
    norms = lm.embedding_VD[torch.tensor(ids)].float().norm(dim=1).tolist()
    assert [row["norm"] for row in rows] == pytest.approx(norms, rel=1e-5)


def test_inspect_marks_the_nearest_tokens_as_a_hint(
    prompt_of_words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(prompt_of_words)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A hint only" in shown
    assert "table norms median" in shown


def test_inspect_reads_a_prompt_whose_base_is_not_here(tmp_path: Path, run: Run) -> None:
    other = Fingerprint("someone/else", None, "f" * 64, 8, 2, 100, 2, 4)
    save_prompt(SoftPrompt(torch.ones(2, 8), other, name="other"), tmp_path / "other")
    record = run("inspect", str(tmp_path / "other"))
    assert record["length"] == 2
    assert "someone/else" in record["base_unavailable"]
    assert "vectors" not in record


def test_info_says_which_number_format_and_why(run: Run) -> None:
    record = run("info", "--device", "cpu")
    assert (
        record["packages"]["torch"] == torch.__version__.split("+")[0]
        or record["packages"]["torch"] == torch.__version__
    )
    assert record["dtype"] in ("float32", "bfloat16")
    assert record["dtype_reason"]
    assert run("info", "--device", "cpu", "--dtype", "float32")["dtype"] == "float32"
