"""Nothing of the user's is replaced, and one process at a time writes into a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import begun
from softprompt.cli.app import main
from softprompt.errors import SaveError
from softprompt.evaluation.rows import RowFile
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.report.render import write_reports
from softprompt.store import artifact, ownership
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.lock import FolderLock, patient
from softprompt.store.ownership import claim, folder_named, remove_ours, run_of, written_by_us
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.records import RunFolder
from tiny_models import tiny_model, tiny_tokenizer

BASE = Fingerprint("tiny/base", width=4, layers=2)


def prompt(fill: float = 0.0, length: int = 2) -> SoftPrompt:
    return SoftPrompt(torch.full((length, 4), fill), BASE, f"{{soft:{length}}}{{text}}", name="greet")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begin_run(folder: Path) -> RunFolder:
    run = RunFolder(folder, Recipe.from_flags({}, ["data.source=builtin:messages", f"out={folder}"]))
    try:
        run.begin()
    except BaseException:
        run.close()
        raise
    return run


def run(folder: Path) -> None:
    begin_run(folder).close()


def evaluation(folder: Path) -> None:
    RowFile(folder, "digest").close()


def report(folder: Path) -> None:
    record = Path(__file__).parent / "records_0_1" / "tuned"
    write_reports([record], folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a prompt": lambda folder: save_prompt(prompt(), folder),
    "a run": run,
    "an evaluation": evaluation,
    "a report": report,
}


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        ("a prompt", "README.md"),
        ("a prompt", "adapter_config.json"),
        ("a prompt", "adapter_model.safetensors"),
        ("a prompt", "softprompt.json"),
        ("a run", "recipe.yaml"),
        ("a run", "metrics.jsonl"),
        ("a run", "README.md"),
        ("an evaluation", "rows.jsonl"),
        ("an evaluation", "evaluation.json"),
        ("a report", "report.html"),
        ("a report", "report.md"),
        ("a report", "report.csv"),
        ("a report", "report.json"),
    ],
)
def test_a_users_file_of_the_same_name_is_never_replaced(writer: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}\n')
    before = files_of(tmp_path)
    with pytest.raises(SaveError, match=rf"did not write: {name} \(a file of 12 bytes\)"):
        WRITERS[writer](tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_with_a_model_takes_nothing_else(writer: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = files_of(tmp_path)
    with pytest.raises(SaveError, match="holds a model"):
        WRITERS[writer](tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_what_softprompt_wrote_is_replaced_and_files_beside_it_stay(writer: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    WRITERS[writer](tmp_path)
    WRITERS[writer](tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        ("a prompt", "README.md"),
        ("a run", "recipe.yaml"),
        ("an evaluation", "rows.jsonl"),
        ("a report", "report.md"),
    ],
)
def test_a_link_in_the_place_of_a_file_is_not_followed(writer: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "out"
    WRITERS[writer](folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "precious")
    with pytest.raises(SaveError, match="a link"):
        WRITERS[writer](folder)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_device_or_a_file_is_no_folder(writer: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="a file of 4 bytes"):
        WRITERS[writer](tmp_path / "file")
    with pytest.raises(SaveError, match="a device"):
        WRITERS[writer](Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_an_empty_path_is_refused_and_not_taken_for_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        with pytest.raises(SaveError, match="empty"):
            save_prompt(prompt(), empty)
        with pytest.raises(SaveError, match="empty"):
            folder_named(empty)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb",
    [
        ["tune", "--data", "rows.csv", "--column", "text"],
        ["sweep", "--data", "rows.csv", "--column", "text", "--grid", "tune.seed=1,2"],
        ["compare", "--data", "rows.csv", "--column", "text", "--arms", "base"],
        ["evaluate", "--prompt", "learned"],
        ["export", "learned", "--to", "vectors"],
        ["report", "tuned"],
        ["plot", "tuned"],
    ],
    ids=lambda verb: verb[0],
)
def test_no_verb_takes_an_empty_out_for_the_working_folder(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text\n" + "a row of text\n" * 4)
    shutil.copytree(Path(__file__).parent / "records_0_1" / "tuned", "tuned")
    save_prompt(prompt(), "learned")
    if verb[0] == "evaluate":  # the check is judging's own, in front of any work
        verb = ["evaluate", "--data", "rows.csv", "--column", "text"]
    before = files_of(tmp_path)
    assert main([*verb, "--out", ""]) == 1
    assert "path to write to is empty" in capsys.readouterr().err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["mine.png", "mine.svg", "mine.pdf", "mine.txt", "mine", "/dev/null"])
def test_a_picture_replaces_only_pictures_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = str(Path(__file__).parent / "records_0_1" / "tuned")
    if not Path(name).exists():
        Path(name).write_bytes(b"mine")
    assert main(["plot", run, "--out", name]) == 1
    assert "did not write" in capsys.readouterr().err
    assert not Path(f"{name}.png").exists()
    if name != "/dev/null":
        assert Path(name).read_bytes() == b"mine"
        Path(name).unlink()
    if Path(name).suffix in (".png", ".svg", ".pdf"):
        assert main(["plot", run, "--out", name]) == 0
        first = Path(name).read_bytes()
        assert main(["plot", run, "--out", name]) == 0  # ours: replaced
        assert len(Path(name).read_bytes()) > 1000 < len(first)


def test_folders_of_version_0_1_are_ours_without_a_marker(tmp_path: Path) -> None:
    save_prompt(prompt(), tmp_path)
    ours = json.loads((tmp_path / "softprompt.json").read_text())
    for key in ("files", "folder", "shape", "peft"):
        del ours[key]
    (tmp_path / "softprompt.json").write_text(json.dumps(ours))
    (tmp_path / "README.md").write_text("---\nbase_model: a/b\nlibrary_name: softprompt\n---\n# greet\n")
    (tmp_path / "metrics.jsonl").write_text('{"event": "Started", "steps": 1}\n')
    (tmp_path / "recipe.yaml").write_text("base: builtin\n")
    (tmp_path / "evaluation.json").write_text('{"digest": "d", "complete": true}')
    (tmp_path / "rows.jsonl").write_text("")
    assert load_prompt(tmp_path) == prompt()
    for writer in ("a prompt", "a run"):
        WRITERS[writer](tmp_path)
    assert {"evaluation.json", "rows.jsonl"} <= written_by_us(tmp_path)


def test_nothing_is_replaced_where_that_is_asked(tmp_path: Path) -> None:
    save_prompt(prompt(1.0), tmp_path, overwrite=False)
    with pytest.raises(
        SaveError, match=r"wrote softprompt.json, .* before\. Pass overwrite=True \(--overwrite\)"
    ):
        save_prompt(prompt(2.0), tmp_path, overwrite=False)
    assert load_prompt(tmp_path) == prompt(1.0)


def test_a_folder_is_removed_only_if_it_is_marked_as_that_kind(tmp_path: Path) -> None:
    foreign, arm, linked = tmp_path / "foreign", tmp_path / "arm", tmp_path / "linked"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    linked.symlink_to(foreign)
    claim(arm, "arm", ("job.json",))
    remove_ours(arm, "arm", "job.json")
    assert not arm.exists()
    for folder in (foreign, linked):
        with pytest.raises(SaveError, match="did not write"):
            remove_ours(folder, "arm", "job.json")
    assert (foreign / "thesis.tex").read_text() == "mine"
    claim(arm, "run", ("recipe.yaml",))
    with pytest.raises(SaveError):
        remove_ours(arm, "arm", "job.json")


def test_every_run_has_an_id_of_its_own_in_its_folder(tmp_path: Path) -> None:
    run(tmp_path)
    first = run_of(tmp_path, "run")
    run(tmp_path)
    assert first
    assert run_of(tmp_path, "run") not in ("", first)


@pytest.mark.parametrize(
    "marker", ["{", "[]", '{"holds": {"run": {"files": [1]}}}', '{"holds": 7}', "[" * 100_000]
)
def test_a_broken_marker_owns_nothing(marker: str, tmp_path: Path) -> None:
    (tmp_path / ".softprompt.json").write_text(marker)
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(SaveError, match="did not write"):
        run(tmp_path)


def test_new_files_have_the_users_umask(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        save_prompt(prompt(), tmp_path / "p")
        run(tmp_path / "r")
        evaluation(tmp_path / "e")
    finally:
        os.umask(former)
    for path in tmp_path.rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# One writer


def test_a_second_run_into_a_folder_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    first = begin_run(tmp_path)
    try:
        with pytest.raises(
            SaveError, match=rf"another process \(a run: process {os.getpid()} on "
        ) as refused:
            begin_run(tmp_path)
        assert "\n" not in str(refused.value)
    finally:
        first.close()
    run(tmp_path)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


OWNER = """
import sys, time
from pathlib import Path
from softprompt.store.lock import FolderLock
FolderLock(Path(sys.argv[1]), "a run").take()
print("taken", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_live_process_holds_and_that_of_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    owner = python(OWNER, tmp_path)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "taken\n"
    lock = FolderLock(tmp_path, "another run")
    with pytest.raises(SaveError, match=f"process {owner.pid} "):
        lock.take()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert (tmp_path / ".softprompt.lock").exists()  # left behind by the kill
    lock.take()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_patient_process_waits_for_the_end_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = python(OWNER, tmp_path)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "taken\n"

    def end(seconds: float) -> None:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()

    monkeypatch.setattr("softprompt.store.lock.time.sleep", end)
    with patient(600):
        lock = FolderLock(tmp_path, "another run")
        lock.take()
        lock.take()  # nothing happens to whoever has it
    with pytest.raises(SaveError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path, "a third run").take()
    lock.release()


SAVER = """
import sys, time
import torch
torch.set_num_threads(1)
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.store.artifact import save_prompt
folder, fill, saves = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for number in range(saves):
    length = 2 + number % 3
    template = "{soft:%d}{text}" % length if number % 2 else "Say: {soft:%d}{text}" % length
    save_prompt(SoftPrompt(torch.full((length, 4), fill), Fingerprint("b", width=4), template), folder)
"""


def test_two_savers_and_a_reader_never_meet_a_damaged_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    save_prompt(prompt(1.0), folder)
    savers = [
        begun(["-c", SAVER, str(folder), str(fill), "8"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for fill in (1.0, 2.0)
    ]
    reads = 0
    deadline = time.monotonic() + 120
    while any(saver.poll() is None for saver in savers) and time.monotonic() < deadline:
        found = load_prompt(folder)
        assert isinstance(found, SoftPrompt)
        # One prompt wholly: one saver's number everywhere, in a template of as many slots.
        assert len(found.embeddings_PD.unique()) == 1
        assert f"{{soft:{found.length}}}" in found.template
        reads += 1
    for saver in savers:
        _, errors = saver.communicate(timeout=60)
        assert saver.returncode == 0, errors
    assert reads > 10
    load_prompt(folder)
    assert not [path for path in folder.iterdir() if path.name.endswith((".draft", ".lock"))]


# Every ending


def test_drafts_that_a_killed_save_left_are_gone_after_the_next(tmp_path: Path) -> None:
    save_prompt(prompt(), tmp_path)
    for name in (artifact.OURS, artifact.TENSORS, artifact.CARD):
        (tmp_path / f".{name}.0123456789abcdef.draft").write_bytes(b"half")
    (tmp_path / ".mine.draft").write_bytes(b"mine")
    save_prompt(prompt(1.0), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".draft")] == [".mine.draft"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 64 kB; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    return folder


FULL = """
import subprocess, sys
from pathlib import Path
import torch
disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
    sys.exit(77)
from softprompt.cli.app import main
from softprompt.errors import SaveError
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.store.artifact import load_prompt, save_prompt
small = SoftPrompt(torch.ones(2, 4), Fingerprint("b", width=4), "{soft:2}{text}")
save_prompt(small, disk / "p")
before = sorted((path.name, path.read_bytes()) for path in (disk / "p").iterdir())
big = SoftPrompt(torch.ones(20_000, 4), Fingerprint("b", width=4), "{soft:20000}{text}")
for target in (disk / "p", disk / "new"):
    try:
        save_prompt(big, target)
    except SaveError as error:
        assert "No space left" in str(error), error
    else:
        raise AssertionError("saved")
assert sorted((path.name, path.read_bytes()) for path in (disk / "p").iterdir()) == before
assert load_prompt(disk / "p") == small
assert not (disk / "new").exists()
"""


def test_a_disk_that_is_really_full_keeps_what_was_there(small_disk: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", FULL, str(small_disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("writer", "name"), [(run, "recipe.yaml"), (evaluation, "rows.jsonl")])
@pytest.mark.parametrize("whole", range(3))
def test_a_full_disk_never_cuts_a_runs_recipe_or_rows(
    writer: Callable[[Path], None], name: str, whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`whole` files can be written before the disk is full."""
    writer(tmp_path)
    before = (tmp_path / name).read_bytes()
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > whole:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):  # the first failure leaves no lock behind
        with contextlib.suppress(SaveError):
            writer(tmp_path)
    assert len(calls) > whole
    assert (tmp_path / name).read_bytes() == before


# The verbs


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and rows."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    Path("rows.csv").write_text("text\n" + "".join(f"my order {number} never came\n" for number in range(20)))
    return tmp_path


TUNE = ["tune", "--base", "base", "--data", "rows.csv", "--column", "text", "--length", "4", "--epochs", "1"]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("base", "holds a model"),
        ("mine", "did not write: README.md"),
        ("rows.csv", "wanted a folder"),
        ("", ""),
    ],
)
def test_tune_replaces_neither_its_base_nor_a_readme_nor_its_data(
    out: str, reason: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/README.md").write_text("mine")
    before = files_of(workplace)
    assert main([*TUNE, "--set", "dtype=float32", "--out", out]) in (1, 2)
    assert reason in capsys.readouterr().err
    assert files_of(workplace) == before


def test_tune_never_replaces_the_recipe_that_it_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("exp").mkdir()
    Path("exp/recipe.yaml").write_text(
        "base: base  # the small one\ndtype: float32\nout: exp\ndata: {source: rows.csv}\nprompt: {length: 4}\ntune: {epochs: 1}\n"
    )
    before = files_of(workplace)
    assert main(["tune", "exp/recipe.yaml"]) == 1
    assert "did not write: recipe.yaml" in capsys.readouterr().err
    assert files_of(workplace) == before


def test_compare_removes_no_folder_that_it_did_not_make(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = Path("out/arms/base-0/thesis.tex")
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    arguments = ["compare", *TUNE[1:], "--set", "dtype=float32", "--set", "data.test=4", "--out", "out"]
    assert main([*arguments, "--arms", "base"]) == 1
    assert "did not write" in capsys.readouterr().err
    assert thesis.read_text() == "mine"


def test_a_file_that_is_away_for_the_moment_of_another_saves_rename_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two savers: one looks at the folder just while the other has moved a file out and not yet in again."""
    save_prompt(prompt(), tmp_path / "p")
    is_plain = ownership._is_plain_file
    asked: list[Path] = []

    def away_at_first(path: Path) -> bool:
        asked.append(path)
        return len(asked) > 2 and is_plain(path)

    monkeypatch.setattr(ownership, "_is_plain_file", away_at_first)
    save_prompt(prompt(), tmp_path / "p")
    assert len(asked) > 2
