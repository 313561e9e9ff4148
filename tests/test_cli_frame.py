"""The command line's frame: quick, quiet, one message for each failure, and exit codes by kind."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forked import begun
from softprompt import errors
from softprompt.cli import ending
from softprompt.cli.app import MEANT, VERBS, main
from softprompt.cli.screen import plain, size


def test_help_names_every_verb_and_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from softprompt.cli.app import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}, code {code}' if heavy or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself_without_torch(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert VERBS[verb].split(":")[0].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_importing_the_package_loads_nothing_heavy_and_offers_its_names() -> None:
    code = (
        "import sys, softprompt; assert 'FrozenLM' in dir(softprompt);"
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_imported() -> None:
    import softprompt

    assert list(softprompt.__all__) == sorted(softprompt.__all__)
    for name in softprompt.__all__:
        assert getattr(softprompt, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = softprompt.nonsense


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_help_ends_with_an_example_of_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    end = capsys.readouterr().out.rstrip().rpartition("Example:")[2]
    assert f"softprompt {verb}" in end


def test_the_help_of_all_ends_with_an_example_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.rstrip().rpartition("Example:")[2].split()[:2] == ["softprompt", "demo"]


@pytest.mark.parametrize("arguments", [["-V"], ["--version"], ["tune", "-V"]])
def test_the_version_is_told_before_and_after_a_verb(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import softprompt

    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{softprompt.__version__}\n"


def test_quiet_leaves_only_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--device", "cpu", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["info", "--device", "cpu", "-q", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["device"] == "cpu"
    assert shown.err == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("softprompt tune --optimi", []),
        ("softprompt tune --kind ", ["soft", "deep"]),
        ("softprompt generate --dtype b", ["bfloat16"]),
        ("softprompt tune --virt", ["--virtual-tokens"]),
    ],
)
def test_the_shell_completes_flags_and_choices(words: str, offered: list[str]) -> None:
    environment = {
        **os.environ,
        "_SOFTPROMPT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "softprompt"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == offered


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("verb", ["info", "recipe", "settings generate", "--help", "tune --help"])
def test_no_terminals_encoding_ends_a_command(verb: str, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    pipe = subprocess.PIPE
    command = begun(["-m", "softprompt", *verb.split()], env=environment, stdout=pipe, stderr=pipe)
    _, said = command.communicate()
    assert command.returncode == 0, said
    assert "should not happen" not in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tunee"], "Did you mean 'tune'?"),
        (["train", "x.yaml"], "Did you mean 'tune'?"),
        (["fit"], "Did you mean 'tune'?"),
        (["predict"], "Did you mean 'generate'?"),
        (["tune", "--learning-rte", "3"], "--learning-rte"),
        (["generate"], "TEXT"),
        (["generate", "--top-k", "many", "x"], "--top-k"),
        (["recipe", "--nonsense"], "`softprompt recipe --help`"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SoftPromptError("x"), 1),
        (errors.NotFinite("x"), 1),
        (errors.SaveError("x"), 1),
        (errors.RecipeError("x"), 2),
        (errors.MissingExtra("x"), 2),
        (errors.DataError("x"), 3),
        (errors.OutOfMemory("x"), 4),
        (errors.BaseError("x"), 5),
        (errors.WrongBase("x"), 5),
        (errors.DamagedPrompt("x"), 5),
        (errors.GateFailed("x"), 100),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 4),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 400 GB"
            ),
            4,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_no_traceback(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert ending.exit_code(fail) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("softprompt: ")
    assert "Traceback" not in shown.err


def test_a_full_disk_is_told_with_its_file_and_what_to_do() -> None:
    message, _ = ending.describe(OSError(errno.ENOSPC, "No space left on device", "runs/x"))
    assert message == "the system refused: runs/x: No space left on device. Free some space, and run again."


def test_a_traceback_comes_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["tune", "nowhere.yaml"]
    assert main(wrong) == 2
    assert "Traceback" not in capsys.readouterr().err
    for arguments in (["--traceback", *wrong], [*wrong, "--traceback"]):
        assert main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("SOFTPROMPT_TRACEBACK", "1")
    assert main(wrong) == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_for_machines_has_null_for_what_is_not_known() -> None:
    assert json.loads(json.dumps(plain({"nll": math.nan, "best": [1, math.inf]}))) == {
        "nll": None,
        "best": [1, None],
    }


def test_sizes_are_told_in_units_of_a_thousand() -> None:
    assert [size(999), size(25_600), size(3_500_000), size(2.5e9)] == [
        "999 bytes",
        "25.6 KB",
        "3.5 MB",
        "2.50 GB",
    ]


def test_the_starting_recipe_is_valid_and_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    from softprompt.settings.text import read_mapping
    from softprompt.tuning.recipe import Recipe

    assert main(["recipe"]) == 0
    shown = capsys.readouterr().out
    assert read_mapping(shown, "recipe")["base"].value == "builtin"
    flags = {"--data": "builtin:roles", "--column": "prompt"}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(shown)
        assert Recipe.load(path) == Recipe.from_flags(flags)


def test_a_flag_names_the_same_setting_in_every_verb() -> None:
    from softprompt.cli.settings import verbs_with_settings
    from softprompt.settings.section import joined, settings

    meanings: dict[str, set[str]] = {}
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for tables in verbs_with_settings().values():
        for each in settings(joined(tables)):
            for flag in (each.flag, *each.aliases):
                meanings.setdefault(str(flag), set()).add(each.path.split(".")[-1])
                kinds.setdefault(str(flag), set()).add((each.shape, bool(each.choices)))
    del meanings["None"], kinds["None"]
    assert {
        flag: found for flag, found in kinds.items() if len(found) > 1
    } == {}  # a number or one of some words
    assert "--resume" not in meanings  # continues killed work, in every verb that has it
    assert {flag: names for flag, names in meanings.items() if len(names) > 1} == {}
    assert meanings["--limit"] == {"limit"}  # rows that are learned from
    assert meanings["--judge-rows"] == {"judge_rows"}  # rows that are judged on
    assert meanings["--max-length"] == {"max_text_tokens"}  # transformers' meaning
    assert meanings["--max-positions"] == {"max_length"}


@pytest.mark.parametrize("verb", ["tune", "preview", "sweep", "compare", "together"])
def test_code_of_a_base_runs_only_if_the_command_line_says_so(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("trust_remote_code: true\ndata: {source: nowhere.csv}\n")
    more = ["--grid", "tune.seed=1,2"] if verb == "sweep" else []
    assert main([verb, str(recipe), *more]) == 2
    assert "r.yaml:1: trust_remote_code is set, which a file alone cannot do" in capsys.readouterr().err
    assert main([verb, str(recipe), *more, "--trust-remote-code"]) == 3  # the data is not there
    assert "nowhere.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--top-k", "1" + "0" * 29, "x"], "--top-k"),
        (["generate", "-n", "1" + "0" * 29, "x"], "--n"),
        (["generate", "--top-k", "9" * 5000, "x"], "--top-k"),
        (["tune", "--data", "x", "--virtual-tokens", "100000000"], "--virtual-tokens"),
        (["tune", "--data", "x", "--seed", str(2**64)], "--seed"),
        (["tune", "--data", "x", "--batch-size", str(10**12)], "--batch-size"),
        (["tune", "--data", "x", "--set", "prompt.form_width=1000000000"], "prompt.form_width"),
        (["tune", "--data", "x", "--set", "tune.seed=" + "[" * 100_000], "tune.seed"),
    ],
)
def test_numbers_out_of_range_are_refused_before_memory_is_asked_for(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message) < 600


def test_a_message_is_bounded_whatever_a_file_spells() -> None:
    assert str(errors.DataError("x" * 300)) == "x" * 300
    assert str(errors.SaveError("column " + "x" * 5000 + " is long")) == "column " + "x" * 297 + "... is long"
    assert len(str(errors.MissingExtra("y " * 10**6))) == errors.MAX_MESSAGE
    assert isinstance(errors.SaveError("x"), OSError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "half \udc80 a character"],
        ["evaluate", "--data", "x.csv", "--text", "\ud800"],
        ["tune", "--data", "x\udcff.csv"],
        ["preview", "--data", "x.csv", "--template", "{soft}\udc80{text}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_argument_that_is_not_utf8_is_refused_by_its_place(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 3
    assert f"argument {len(arguments)} of the command" in capsys.readouterr().err


def test_a_word_of_another_program_is_no_verb_of_ours_and_leads_to_one() -> None:
    assert not set(MEANT) & set(VERBS)
    assert set(MEANT.values()) <= set(VERBS)


CONTINUING = {
    "tune": ("softprompt.tuning.loop.tune", ["--data", "builtin:messages"]),
    "sweep": (
        "softprompt.tuning.sweep.sweep",
        ["--data", "builtin:messages", "--grid", "tune.learning_rate=0.1"],
    ),
    "together": ("softprompt.tuning.together.tune_together", ["one.yaml"]),
    "distil": ("softprompt.tuning.distil.distil", ["--context", "A long text."]),
    "compare": ("softprompt.comparison.compare.compare", ["--data", "builtin:messages"]),
    "evaluate": ("softprompt.evaluation.judge.evaluate", ["--data", "builtin:messages", "--out", "judged"]),
}
"""Every verb that can continue after an interruption: the call that does its work, and arguments that reach it."""


@pytest.mark.parametrize("verb", CONTINUING)
def test_every_verb_that_can_go_on_takes_resume_and_says_so_after_ctrl_c(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, arguments = CONTINUING[verb]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("data:\n  source: builtin:messages\nout: one\n", encoding="utf-8")

    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    module, _, name = work.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, interrupted)
    assert main([verb, *arguments]) == 130
    said = capsys.readouterr()
    assert "To continue, give the same command with --resume." in said.out, said.err
    assert main([verb, *arguments, "--resume"]) == 130  # and that command is taken


def test_an_evaluation_without_a_folder_has_nothing_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", "builtin:messages", "--resume"]) == 2
    assert "rows are kept only with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", [["--template", "{text}\\nKind: {label}"], ["--set", "data.template={text}\\nKind: {label}"]]
)
def test_a_backslash_n_in_a_template_is_a_line_break(
    flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "preview",
        "--data",
        "builtin:messages",
        "--target",
        "label",
        "--virtual-tokens",
        "2",
        "--json",
    ]
    assert main([*command, *flag]) == 0
    assert json.loads(capsys.readouterr().out)["template"] == "{soft:2}{text}\nKind: {label}"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_command_that_ignores_a_signal_is_not_ended_by_one_that_comes_after_it() -> None:
    """A follower of `serve` ends as the first process says; a launcher's SIGTERM may reach it a moment later."""

    def follow() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert ending.exit_code(lambda: None) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was before the command
        assert ending.exit_code(follow) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former)
