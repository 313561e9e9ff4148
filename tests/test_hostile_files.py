"""Files that anyone may have written: pipes, devices and files without end are refused at once, by every reader."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from softprompt.cli.app import main
from softprompt.comparison.forgetting import passages
from softprompt.comparison.settings import CompareSettings
from softprompt.data.source import load_splits
from softprompt.errors import DamagedPrompt, RecipeError, SoftPromptError
from softprompt.evaluation.record import read_json
from softprompt.evaluation.rows import read_rows
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.report.curves import read_curves
from softprompt.report.read import read_runs
from softprompt.serving.keys import Keys
from softprompt.serving.settings import ServeSettings
from softprompt.settings.section import Section, sections
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.library import Library
from softprompt.store.plain_file import read_bytes
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.sweep import _Records

RECORDS = Path(__file__).parent / "records_0_1"
pytestmark = pytest.mark.timeout(60)  # what waits for a pipe waits for ever


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(folder)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)  # sparse: it takes no disk


def placed(name: str, read: Callable[[Path], object]) -> Callable[[Path, Callable[[Path], None]], object]:
    """A reader of a run's folder in which the file `name` is something else."""

    def run(folder: Path, make: Callable[[Path], None]) -> object:
        shutil.copytree(RECORDS / name.partition("/")[0], folder / "run")
        path = folder / "run" / name.partition("/")[2]
        path.unlink()
        make(path)
        return read(path)

    return run


def alone(read: Callable[[Path], object], name: str = "file") -> Callable[..., object]:
    def run(folder: Path, make: Callable[[Path], None]) -> object:
        make(folder / name)
        return read(folder / name)

    return run


def resumed_sweep(path: Path) -> object:
    (path.parent / ".softprompt.json").write_text(
        '{"format": 1, "holds": {"sweep": {"run": "a", "files": ["sweep.jsonl"]}}}'
    )
    return _Records(path.parent, {}).begin(resume=True)


READERS: dict[str, Callable[..., object]] = {
    "keys": alone(Keys.load),
    "a recipe": alone(Recipe.load, "recipe.yaml"),
    "the text of an arm": alone(lambda path: CompareSettings(arms=["prompt"], text_file=str(path)).settled_text()),
    "general text": alone(passages),
    "the index of a library": alone(lambda path: Library(path.parent).entries(), "index.json"),
    "csv": alone(lambda path: load_splits(path, validation=0), "rows.csv"),
    "jsonl": alone(lambda path: load_splits(path, validation=0), "rows.jsonl"),
    "a comparison": placed("compared/comparison.json", read_json),
    "an evaluation": placed("judged/evaluation.json", lambda path: read_runs([path.parent])),
    "judged rows": placed("judged/rows.jsonl", read_rows),
    "events": placed("tuned/metrics.jsonl", lambda path: read_curves(path.parent)),
    "a prompt's record": placed("tuned/softprompt.json", lambda path: load_prompt(path.parent)),
    "a sweep's record": alone(resumed_sweep, "sweep.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("make", [pipe, device, bound_socket], ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_pipes_devices_and_sockets_are_refused_at_once_by_every_reader(
    reader: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(SoftPromptError) as refused:
        READERS[reader](tmp_path, make)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"csv", "jsonl"}))
def test_a_file_of_64_gigabytes_is_refused_before_it_is_read(reader: str, tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match=r"bytes|plain"):
        READERS[reader](tmp_path, endless)


def test_a_file_is_read_up_to_its_bound_and_no_byte_further(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    assert read_bytes(path, 4) == b"abcd"
    with pytest.raises(OSError, match="it has 4 bytes, and at most 3 are read"):
        read_bytes(path, 3)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{former}'] * 10)}]\n"
    for former, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[" * 100_000, "nested"),
        ("- " + "[" * 30 + "]" * 30, "nested"),
        ("- &a [*a]", "nested|values"),
        ("- {name: n, sha256: &s [" + ", ".join(["x"] * 50_000) + "], models: [*s, *s, *s]}", "values"),
        (BOMB, "values"),
        ("- {name: n, rows: " + "9" * 5_000 + "}", "rows|sha256"),
        ("", "list"),
        ("name: n", "list"),
        ("- {name: n}", "sha256"),
        ("- \x00", "YAML|not"),
        ("- 3", "Wanted a list of entries"),
    ],
)
def test_a_key_file_is_read_within_bounds(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=wanted) as refused:
        Keys.load(path)
    assert len(str(refused.value)) < 600


def every_model() -> Iterator[type[Section]]:
    left: list[type[Section]] = [
        Recipe, JudgeSettings, CompareSettings, DecodeSettings, ServeSettings, DistilSettings,
    ]  # fmt: skip
    while left:
        model = left.pop()
        yield model
        left += sections(model).values()


@pytest.mark.parametrize("model", sorted(set(every_model()), key=lambda model: model.__name__))
def test_every_whole_number_of_every_settings_table_has_an_upper_bound(model: type[Section]) -> None:
    validator: Any = model.__pydantic_validator__
    for name in model.model_fields:
        with pytest.raises(ValidationError):  # no setting of any kind takes it
            validator.validate_assignment(model.model_construct(), name, 10**30) if _is_whole(
                model, name
            ) else validator.validate_assignment(model.model_construct(), name, object())


def _is_whole(model: type[Section], name: str) -> bool:
    """Whether a setting is a whole number, or may be one: what takes 3 and refuses 3.5."""
    validator: Any = model.__pydantic_validator__

    def takes(value: float) -> bool:
        try:
            validator.validate_assignment(model.model_construct(), name, value)
        except ValidationError:
            return False
        return True

    return (takes(3) or takes(0)) and not takes(3.5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--memory-gigabytes", "1e300"],
        ["serve", "--grace-seconds", "1e300"],
        ["compare", "--seeds", "1" + "0" * 29],
        ["evaluate", "--judge-rows", "1" + "0" * 29],
        ["evaluate", "--batch-rows", "1" + "0" * 29],
        ["distil", "--virtual-tokens", "100000000"],
        ["generate", "--temperature", "1", "-n", "1000000000", "x"],
        ["generate", "--seed", str(2**64), "x"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_flags_out_of_range_are_refused_with_their_name(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert next(word for word in arguments if word.startswith("-")).lstrip("-")[:1] in message
    assert "This should not happen" not in message


VERSION = {
    "digest": "0" * 64, "base": "b", "kind": "soft", "virtual_tokens": 4, "bytes": 9, "published": "2026-01-01",
}  # fmt: skip


def index_of(name: str = "a", number: str = "1", **changes: object) -> str:
    names = {name: {"current": 1, "versions": {number: {**VERSION, **changes}}}}
    return json.dumps({"schema_version": 1, "names": names})


@pytest.mark.parametrize(
    "text",
    [
        index_of("../../other"), index_of(".."), index_of("a/b"), index_of("a\n"), index_of("-x" + "y" * 200),
        index_of(number="0"), index_of(number="../1"), index_of(number="-1"), index_of(number="9" * 30),
        index_of(digest="../../../home/x"), index_of(digest="0" * 63), index_of(digest="0" * 64 + "\n"),
        index_of(bytes=10**30), index_of(virtual_tokens=-1), index_of(base="b" * 10_000), index_of(kind=["soft"]),
        "{}", "[]", '{"schema_version": 2, "names": {}}', '{"names": {}}', "[" * 100_000, "\ud800", "",
    ],
)  # fmt: skip
def test_an_index_names_no_folder_but_those_of_its_library(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DamagedPrompt) as refused:
        Library(tmp_path).entries()
    assert len(str(refused.value)) < 500


def saved(folder: Path) -> Path:
    fingerprint = Fingerprint("tiny/base", width=4, layers=2)
    return save_prompt(
        SoftPrompt(torch.ones(2, 4), fingerprint, "{soft:2}{text}", name="greet"), folder / "greet"
    )


@pytest.mark.parametrize("content", ["{}", "mine", '{"names": {}}', '{"schema_version": 1, "names": []}'])
def test_publishing_replaces_no_index_that_softprompt_did_not_write(content: str, tmp_path: Path) -> None:
    prompt, library = saved(tmp_path), tmp_path / "library"
    library.mkdir()
    (library / "index.json").write_text(content)
    with pytest.raises(SoftPromptError):
        Library(library).publish(prompt, "greet")
    assert [path.name for path in library.iterdir()] == ["index.json"]
    assert (library / "index.json").read_text() == content


def test_publishing_takes_no_link_no_model_and_no_empty_path_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "index.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    before = sorted(map(str, tmp_path.rglob("*")))
    for where in ("linked", "model", "", "greet/softprompt.json", "/dev/null"):
        with pytest.raises(SoftPromptError):
            Library(where).publish(prompt, "greet")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_killed_publisher_is_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    prompt, library = saved(tmp_path), Library(tmp_path / "library")
    library.publish(prompt, "greet")
    name = tmp_path / "library" / "greet"
    shutil.copytree(name / "1", name / "2")  # killed between the folder and the index
    shutil.copytree(name / "1", name / ".3.12345.draft")  # killed while it copied
    entry = library.publish(prompt, "greet")
    assert entry.full_name == "greet@3"
    assert entry.load().name == "greet"
    assert sorted(path.name for path in name.iterdir()) == ["1", "2", "3"]


LOOKS_UP = """
import socket, sys
def look_up(*arguments, **settings):
    print("LOOKED UP", arguments[0])
    raise OSError("no network in this test")
socket.getaddrinfo = look_up
from softprompt.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(180)
def test_a_prompt_that_names_a_base_of_the_hub_makes_no_verb_ask_the_network(tmp_path: Path) -> None:
    fingerprint = Fingerprint("stranger/model", width=4, layers=2)
    prompt = save_prompt(SoftPrompt(torch.ones(2, 4), fingerprint, "{soft:2}{text}"), tmp_path / "prompt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    done = subprocess.run(
        [sys.executable, "-c", LOOKS_UP, "generate", "--prompt", str(prompt), "hello"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "LOOKED UP" not in done.stdout
    assert done.returncode == 5
    assert "a prompt alone downloads nothing" in done.stderr
