"""What the command line prints: safe whatever the names and texts are, whole at every width, in every encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forked import begun
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.cli.evaluate import show_confusion
from softprompt.cli.inspect import show_vectors
from softprompt.cli.screen import fact
from softprompt.evaluation.metric import Confusion
from softprompt.progress.console import Screen, table, visible
from softprompt.progress.events import Event, Started, Stepped, Validated
from softprompt.progress.runs import ShowProgress, ShowTable
from softprompt.progress.shown import shown, shown_runs
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.store.artifact import save_prompt

HOSTILE = "x\x1b]0;owned\x07\x1b[2J[/red][bold]\u202e:smile:"
"""A title escape, a screen that is wiped, markup that rich refuses, a turned direction, an emoji's code."""

WIDTHS = (40, 80, 200)


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.load("builtin", dtype="float32")


@pytest.fixture
def hostile_prompt(lm: FrozenLM, tmp_path: Path) -> Path:
    """A prompt of the bundled base that names itself, its template and its notes with escapes and markup."""
    vectors_PD = lm.embedding_VD[:2].float().clone()
    prompt = SoftPrompt(vectors_PD, lm.fingerprint, "{soft:2}{text}" + HOSTILE, name=HOSTILE)
    return save_prompt(
        replace(prompt, notes={HOSTILE: HOSTILE, "more": {"a": HOSTILE}}), tmp_path / "hostile"
    )


def harmless(shown: str) -> None:
    assert not [character for character in shown if ord(character) < 32 and character not in "\n\t"]
    assert "\u202e" not in shown
    assert "[/red]" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "PROMPT"],
        ["generate", "--prompt", "PROMPT", "--side-by-side", HOSTILE, "--max-new-tokens", "1"],
        ["export", "PROMPT", "--to", "vectors", "--out", "OUT" + HOSTILE.replace("/", "") + "[/red]".replace("/", "")],
        ["generate", "--prompt", "nowhere" + HOSTILE, "x"],
        ["generate", "--base", "./nowhere" + HOSTILE, "x"],
        ["tune", "--data", "./" + HOSTILE],
        ["tune", "--column", HOSTILE, "--data", "ROWS"],
        ["preview", "--data", "ROWS", "--show", "1"],
        ["tune", "--data", "ROWS", "--dry-run"],
        ["evaluate", "--data", "ROWS", "--target", "label", "--template", "{text} {label}", "--name-is-unknown"],
        ["evaluate", "--data", "ROWS", "--target", "label", "--template", "{text}{soft:2} {label}",
         "--text", HOSTILE, "--max-new-tokens", "1"],
        ["tune", "x" + HOSTILE + ".yaml"],
        [HOSTILE],
    ],
    ids=lambda arguments: arguments[0].replace(HOSTILE, "hostile") + str(len(arguments)),
)  # fmt: skip
def test_escapes_and_markup_in_names_and_texts_are_shown_and_do_nothing(
    arguments: list[str], hostile_prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    text = HOSTILE.encode("unicode_escape").decode().replace("\\x", "\\u00")
    rows.write_text(f'{{"text": "{text}", "label": "a{text}"}}\n{{"text": "b", "label": "c"}}\n')
    places = {"PROMPT": str(hostile_prompt), "ROWS": str(rows)}
    given = [places.get(word, word).replace("OUT", str(tmp_path / "out")) for word in arguments]
    code = main(given)
    shown = capsys.readouterr()
    assert code in (0, 2, 3, 5), shown.err
    assert "should not happen" not in shown.err
    everything = shown.out + shown.err
    assert not [character for character in everything if ord(character) < 32 and character not in "\n\t"]
    assert "\u202e" not in everything


def test_what_is_printed_beside_ours_is_made_visible_and_never_read_as_markup() -> None:
    for printed in (HOSTILE, table(["a", HOSTILE], [[HOSTILE, 1]], width=200), visible(HOSTILE)):
        out = io.StringIO()
        Screen(file=out, width=200).print(printed)
        harmless(out.getvalue())
    assert visible("a\x1bb\tc\n\x9b") == "a\\x1bb\tc\n\\x9b"


def drawn(width: int, draw: Callable[[Screen], object], *, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    screen = Screen(file=out, width=width, force_terminal=terminal, color_system=None)
    draw(screen)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_keeps_every_number_and_word_whole_and_within_the_width(width: int) -> None:
    rows = [
        ("tune.learning_rate=0.0123456 tune.seed=1", "1000/1000", "3.1416", "stopped early"),
        ("tune.learning_rate=0.3", "10/1000", "unknown", ""),
    ]
    headers = ("setting", "step", "best held-out loss", "")
    lines = drawn(width, lambda screen: screen.print(table(headers, rows, width=width)))
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for row in rows:
        for word in " ".join(row).split():
            assert word in words, f"{word} was cut at {width} columns: {lines}"
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_fact_breaks_between_words_on_a_terminal_and_not_in_a_pipe(width: int) -> None:
    value = "6,851,520 weights, all frozen: 4 layers, width 320, and a long reason for the dtype"
    lines = drawn(width, lambda screen: fact(screen, "size", value))
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == f"size {value}"
    assert len(drawn(width, lambda screen: fact(screen, "size", value), terminal=False)) == 1


def test_a_name_longer_than_its_column_does_not_touch_its_value() -> None:
    (shown,) = drawn(120, lambda screen: fact(screen, "tune.context_cache_gigabytes", 1.0))
    assert shown.split() == ["tune.context_cache_gigabytes", "1.0"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_live_line_shows_whole_figures_at_every_width(width: int) -> None:
    events: list[Event] = [
        Started(100, 5, 8, 1, 0.0123, 50, 10, 5249, 6400),
        Stepped(10, 100, 0.5, 3.58212, 0.0123456, 12345.6, 83),
        Validated(10, 3.41234, True),
        Stepped(11, 100, 0.5, 3.58212, 0.0123456, 12345.6, 83),
    ]

    def draw(screen: Screen) -> None:
        with ShowProgress(screen) as show:
            for event in events:
                show(event)
            show.bar.refresh()

    lines = drawn(width, draw)
    assert "loss 3.582" in "\n".join(lines)
    assert "…" not in "".join(lines)


def test_a_sweeps_table_at_its_end_is_sorted_with_the_lowest_loss_first() -> None:
    shown = ShowTable(Screen(file=io.StringIO(), width=100), "setting", ["a", "b", "c", "d"])
    for line, nll in enumerate((2.0, 1.0, 3.0)):
        shown.event(line, Validated(1, nll, True))
    lines = drawn(100, lambda screen: screen.print(shown.ranked()))
    assert [line.split()[0] for line in lines[1:]] == ["b", "a", "c", "d"]
    assert lines[-1].split()[2] == "unknown"


def test_progress_is_shown_where_someone_watches_and_silent_elsewhere_or_when_it_is_off() -> None:
    heard: list[Event] = []
    event = Stepped(1, 2, 0.5, 3.5, 0.01, 10.0, 1.0)
    for terminal, progress, expected in (
        (True, None, True),
        (True, False, False),
        (False, None, False),
        (False, True, True),
    ):
        out = io.StringIO()
        screen = Screen(file=out, force_terminal=terminal, width=100)
        with shown(heard.append, progress, console=screen) as show:
            show(Started(2, 1, 1, 1, 0.01, 2, 0, 10, 10))
            show(event)
        with shown_runs(["a"], lambda name, event: heard.append(event), progress, console=screen) as show_run:
            show_run("a", event)
        assert bool(out.getvalue()) is expected
    assert heard.count(event) == 8


KNOWN_WITHOUT_TORCH = [
    (["generate", "--prompt", "nowhere", "x"], "nowhere: there is no such folder"),
    (["inspect", "nowhere"], "nowhere: there is no such folder"),
    (["export", "nowhere", "--to", "vectors", "--out", "x"], "nowhere: there is no such folder"),
    (["tune", "--data", "nowhere.csv"], "nowhere.csv: no such file"),
    (["sweep", "--data", "nowhere.csv", "--grid", "tune.seed=1,2"], "nowhere.csv: no such file"),
    (["sweep", "--data", "builtin:roles"], "Nothing is to be varied"),
    (["preview", "--data", "nowhere.csv"], "nowhere.csv: no such file"),
    (["generate", "--side-by-side", "x"], "--side-by-side needs a prompt"),
    (["tune", "--data", "builtin:roles", "--out", "a.file"], "a.file: found a file of 2 bytes"),
    (["tune", "--data", "builtin:roles", "--out", "a.file/x"], "a.file is a file"),
    (["compare", "--data", "builtin:roles", "--out", "a.file/x"], "a.file is a file"),
    (
        ["sweep", "--data", "builtin:roles", "--out", "a.file/x", "--grid", "tune.seed=1"],
        "a.file is a file",
    ),
    (["tune", "--data", "builtin:roles", "--base", "./nowhere"], "./nowhere: there is no such folder"),
    (
        ["preview", "--data", "builtin:roles", "--base", "no/such/base"],
        "no/such/base: there is no such folder",
    ),
    (["sweep", "--data", "builtin:roles", "--grid", "tune.sed=1,2"], "Did you mean tune.seed?"),
    (["sweep", "--data", "builtin:roles", "--grid", "tune.seed=1,two"], "found 'two'"),
    (["tune", "--epochs", "many", "--data", "x"], "--epochs: tune.epochs: found 'many'"),
    (["generate", "--dtype", "float3", "x"], "--dtype"),
]


def test_what_can_be_known_without_torch_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.file").write_text("ab")
    code = """
import contextlib, io, json, sys
from softprompt.cli.app import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""
    asked = json.dumps([arguments for arguments, _ in KNOWN_WITHOUT_TORCH])
    run = [sys.executable, "-c", code, asked]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, expected), (status, said, torch_is_loaded) in zip(
        KNOWN_WITHOUT_TORCH, found, strict=True
    ):
        assert expected in said, arguments
        assert status != 0, arguments
        assert not torch_is_loaded, arguments


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_whole_run_and_its_plot_can_be_printed_in_any_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "Grüße 中文 😀 — “x”\n" * 4, encoding="utf-8")
    commands = [
        "tune --data rows.csv --column text --steps 2 --virtual-tokens 2 --out out",
        "plot out",
        "inspect out",
        "preview --data rows.csv --column text",
        "generate --prompt out --max-new-tokens 1 中文😀",
        "generate --prompt out --max-new-tokens 1 --side-by-side 中文😀",
    ]
    # One process: each command by itself would load the same libraries again.
    code = "import sys; from softprompt.cli.app import main; sys.exit(any([main(c.split()) for c in sys.argv[1:]]))"
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with (tmp_path / "said").open("wb") as said, (tmp_path / "errors").open("wb") as errors:
        done = begun(["-c", code, *commands], env=environment, stdout=said, stderr=errors)
        assert done.wait(200) == 0, (tmp_path / "errors").read_text(encoding)
    assert "\x1b" not in (tmp_path / "said").read_text(encoding)  # and it is text in that encoding


def test_input_that_is_not_utf8_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe"), encoding="utf-8"))
    assert main(["generate", "-", "--max-new-tokens", "1"]) == 3
    assert "standard input: byte 2 is not UTF-8" in capsys.readouterr().err


def test_a_terminal_gets_a_text_while_it_is_generated(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Terminal())
        given = ["generate", "Once upon a time", "--max-new-tokens", "8", "--dtype", "float32"]
        assert main(given) == 0
    assert sum(map(bool, pieces)) > 4
    assert main(given) == 0
    assert "".join(pieces) == capsys.readouterr().out


def test_a_prompt_alone_downloads_no_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lm: FrozenLM
) -> None:
    foreign = replace(lm.fingerprint, name="someone/elses-model")
    folder = save_prompt(SoftPrompt(torch.ones(2, lm.width), foreign, name="p"), tmp_path / "p")
    assert main(["generate", "--prompt", str(folder), "x"]) == 5
    message = capsys.readouterr().err
    assert "names the base someone/elses-model, which is not on this machine" in message
    assert "--base someone/elses-model" in message


def test_a_prompt_alone_downloads_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lm: FrozenLM
) -> None:
    prompt = SoftPrompt(torch.ones(2, lm.width), lm.fingerprint, "{soft:2}{text}", name="p")
    notes = {"recipe": {"data": {"source": "someone/rows", "column": "text"}}}
    folder = save_prompt(replace(prompt, notes=notes), tmp_path / "p")
    assert main(["evaluate", "--prompt", str(folder)]) == 3
    message = capsys.readouterr().err
    assert "p was learned on someone/rows, which is not on this machine" in message
    assert "--data someone/rows" in message


SEVEN = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "neg",
)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_confusion_table_keeps_its_rows_on_a_screen_of_any_width(width: int) -> None:
    """A row a label, one figure for each label and one for other answers, in the order of the labels."""
    counts = tuple(tuple(10 * row + column for column in range(1, 8)) for row in range(1, 8))
    confusion = Confusion(SEVEN, counts, tuple(range(91, 98)))
    lines = drawn(width, lambda screen: show_confusion(screen, confusion))
    assert all(len(line) <= width for line in lines)
    wanted = [[*map(str, row), str(other)] for row, other in zip(counts, range(91, 98), strict=True)]
    assert [line.split()[-8:] for line in lines[-7:]] == wanted
    words = " ".join(lines).replace(",", " ").replace(".", " ").split()
    assert set(SEVEN) <= set(words)
    if width > 40:
        assert all(label in line for label, line in zip(SEVEN, lines[-7:], strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_near_a_vector_is_never_broken_at_its_own_blank(width: int) -> None:
    near = [
        {"token": token, "cosine": 0.5}
        for token in (" same", " greatest", "such", " internet", " gay", "\u00a0x")
    ]
    vectors = {
        "rows": [{"norm": 12.25, "nearest": near}] * 2,
        "table_norm_range": (1.0, 2.0),
        "table_norm_median": 1.5,
    }
    lines = drawn(width, lambda screen: show_vectors(screen, vectors))
    for entry in near:
        assert sum(f"{entry['token']!r} 0.50" in line for line in lines) == 2
    assert all(len(line) <= width for line in lines if "0.50" in line)
