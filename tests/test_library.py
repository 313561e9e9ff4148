"""Prompts by name wherever they lie: a folder, an address of fsspec, the hub; and every way to name one."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch

from softprompt import load_prompt
from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.errors import DamagedPrompt, PromptError, SaveError
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.local_engine import LocalEngine
from softprompt.store.artifact import save_prompt
from softprompt.store.digest import digest_of
from softprompt.store.library import Library
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    fsspec.filesystem("memory").store.clear()


def saved(lm: FrozenLM, folder: Path, seed: int = 1, **metrics: float) -> SoftPrompt:
    prompt = replace(prompt_of(lm, seed, folder.name), notes={"metrics": metrics} if metrics else {})
    save_prompt(prompt, folder)
    return prompt


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shelf") if request.param == "folder" else "memory://bucket/shelf"


def same(found: Any, wanted: SoftPrompt) -> bool:
    return torch.equal(found.embeddings_PD, wanted.embeddings_PD) and found.template == wanted.template


def test_versions_are_published_named_switched_and_rolled_back(
    lm: FrozenLM, tmp_path: Path, place: str
) -> None:
    first, second = saved(lm, tmp_path / "one", 1, accuracy=0.75), saved(lm, tmp_path / "two", 2)
    library = Library(place)
    assert library.stamp() is None
    assert library.entries() == []
    library.publish(tmp_path / "one", "support")
    stamps = [library.stamp()]
    assert library.publish(tmp_path / "two", "support").full_name == "support@2"
    stamps.append(library.stamp())
    assert same(load_prompt(f"{place}/support"), second)
    assert same(load_prompt(f"{place}/support@1"), first)
    assert load_prompt(f"{place}/support@1").name == "support"
    assert library.rollback("support").full_name == "support@1"
    stamps.append(library.stamp())
    assert same(load_prompt(f"{place}/support"), first)
    assert library.rollback("support").full_name == "support@2"
    library.switch("support@1")
    assert library.find("support").version == 1
    assert len(set(stamps)) == 3
    assert library.entries()[0].metrics == {"accuracy": 0.75}
    with pytest.raises(PromptError, match="Versions never change"):
        library.publish(tmp_path / "one", "support@2")
    with pytest.raises(PromptError, match="it has support"):
        load_prompt(f"{place}/other")
    library.publish(tmp_path / "one", "alone")
    with pytest.raises(PromptError, match="no former one"):
        library.rollback("alone")


def test_a_version_that_was_changed_is_refused_wherever_it_is_read(
    lm: FrozenLM, tmp_path: Path, place: str
) -> None:
    saved(lm, tmp_path / "one", 1)
    Library(place).publish(tmp_path / "one", "support")
    save_prompt(prompt_of(lm, 7, "other"), tmp_path / "other")
    files, root = fsspec.core.url_to_fs(place)
    for name in ("softprompt.json", "adapter_model.safetensors"):
        files.pipe_file(f"{root}/support/1/{name}", (tmp_path / "other" / name).read_bytes())
    with pytest.raises(DamagedPrompt, match="not the prompt that was published"):
        load_prompt(f"{place}/support")
    with pytest.raises(DamagedPrompt, match="not the prompt that was published"):
        Library(place).find("support").load()


def test_a_server_follows_a_library_at_an_address_by_polling(lm: FrozenLM, tmp_path: Path) -> None:
    place = "memory://bucket/followed"
    prompts = [saved(lm, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    library = Library(place)
    library.publish(tmp_path / "one", "support")
    with LocalEngine(lm) as engine:
        catalogue = Catalogue(engine, Library(place))
        assert [served.name for served in catalogue.models()] == ["base", "support@1", "support"]
        library.publish(tmp_path / "two", "support")
        catalogue.refresh()
        served = catalogue.find("support")
        assert served is not None
        assert served.digest == digest_of(prompts[1])


def test_an_index_that_changed_meanwhile_is_not_overwritten(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores have no locks."""
    saved(lm, tmp_path / "one", 1)
    place = "memory://bucket/raced"
    Library(place).publish(tmp_path / "one", "support")
    slow = Library(place)
    add = slow.shelf.add

    def overtaken(folder: Path, version: str) -> None:
        Library(place).publish(tmp_path / "one", "faster")
        add(folder, version)

    monkeypatch.setattr(slow.shelf, "add", overtaken)
    with pytest.raises(SaveError, match="published meanwhile"):
        slow.publish(tmp_path / "one", "slow")
    assert sorted({entry.name for entry in Library(place).entries()}) == ["faster", "support"]


def test_a_prompt_alone_is_read_from_an_address(lm: FrozenLM, tmp_path: Path) -> None:
    prompt = saved(lm, tmp_path / "one", 1)
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "one").iterdir():
        files.pipe_file(f"/bucket/alone/{path.name}", path.read_bytes())
    assert same(load_prompt("memory://bucket/alone"), prompt)
    assert same(load_prompt(Path("memory://bucket/alone")), prompt)  # a Path loses a slash
    with pytest.raises(PromptError, match="holds no prompt"):
        load_prompt("memory://bucket/nothing")
    with pytest.raises(PromptError, match="no address that fsspec knows"):
        load_prompt("nonsense://bucket/nothing")


class Hub:
    """A hub in a folder: every upload is a commit, and `main` is the last one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commits = folder, 0
        self.patterns: list[str] = []

    def api(self) -> Any:
        def upload_folder(repo_id: str, folder_path: Path, revision: str | None, **more: Any) -> Any:
            self.commits += 1
            commit = f"{self.commits:040x}"
            for name in (commit, revision or "main"):
                shutil.rmtree(self.folder / repo_id / name, ignore_errors=True)
                shutil.copytree(folder_path, self.folder / repo_id / name)
            return SimpleNamespace(oid=commit)

        def create_repo(repo_id: str, **more: Any) -> None:
            (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

        return SimpleNamespace(
            create_repo=create_repo, create_branch=lambda *a, **more: None, upload_folder=upload_folder
        )

    def snapshot_download(self, repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.patterns = allow_patterns
        place = self.folder / repository / (revision or "main")
        if not place.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository")
        return str(place)


def test_a_prompt_is_pushed_with_its_card_and_pulled_by_revision(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    first = saved(lm, tmp_path / "support", 1, accuracy=0.75)
    assert main(["publish", "support", "hf://me/support", "--json"]) == 0
    commit = json.loads(capsys.readouterr().out)["commit"]
    second = saved(lm, tmp_path / "support", 2, accuracy=0.8)
    assert main(["publish", "support", "hf://me/support"]) == 0
    assert same(load_prompt("hf://me/support"), second)
    assert same(load_prompt("me/support"), second)
    assert same(load_prompt(f"me/support@{commit}"), first)
    assert all(not fnmatch.fnmatch("model.bin", pattern) for pattern in hub.patterns)
    card = huggingface_hub.ModelCard.load(hub.folder / "me" / "support" / "main" / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8)
    assert "model-index" in card.content
    with pytest.raises(PromptError, match="the hub gives no such prompt"):
        load_prompt("me/nothing")
    with pytest.raises(PromptError, match=r"wanted hf://OWNER/NAME"):
        load_prompt("hf://nothing")
    # A folder that is there is never taken for a name of the hub.
    (tmp_path / "me").mkdir()
    with pytest.raises(PromptError, match="there is no such folder"):
        load_prompt("me/support")


def test_the_verbs_take_names_of_a_library(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        saved(lm, tmp_path / "mine", seed, nll=2.0, accuracy=0.5 + seed / 10)
        assert main(["publish", "mine", "support", "--library", "shelf"]) == 0
    assert main(["publish", "support", "--rollback", "--library", "shelf"]) == 0
    capsys.readouterr()
    assert main(["inspect", "shelf/support@2"]) == 0
    assert main(["list", "shelf"]) == 0
    out = capsys.readouterr().out
    assert "accuracy 0.600" in out
    assert "accuracy 0.700" in out
    assert main(["publish", "support", "--rollback", "--switch", "--library", "shelf"]) == 2
    assert main(["inspect", "shelf/nobody"]) == 5
    assert "it has support" in capsys.readouterr().err


def test_a_list_spells_out_what_could_rewrite_the_screen_and_loses_none_of_it(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    prompt = prompt_of(lm, 1, "evil")
    named = replace(prompt, base=replace(prompt.base, name="evil\x1b[31m[/red]<b>"))
    save_prompt(named, tmp_path / "evil")
    Library(tmp_path / "shelf").publish(tmp_path / "evil", "sort")
    assert main(["list", str(tmp_path / "shelf")]) == 0
    shown = capsys.readouterr().out
    assert "evil\\x1b[31m[/red]<b>" in shown
    assert "\x1b" not in shown
