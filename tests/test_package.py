"""The package as an index shows it: its README holds on its own, and its files agree on version, extras and Python."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_readme_of_an_index_names_no_file_beside_it() -> None:
    for_an_index = runpy.run_path(str(ROOT / "hatch_build.py"))["for_an_index"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for address in ("", "https://example.org/softprompt"):
        shown = for_an_index(text, address)
        assert not re.findall(r"\]\((?!https?:)[^)]+\)", shown)
        assert "```sh\nsoftprompt tune" in shown
    assert "](https://example.org/softprompt/blob/main/docs/start.md)" in shown
    assert "](https://example.org/softprompt/raw/main/docs/pictures/before-after.svg)" in shown


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("index", "start", "serving", "judging"))]
)
def test_no_page_names_an_extra_that_is_not_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {extra for names in re.findall(r"softprompt\[([\w,]+)\]", text) for extra in names.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])


def test_every_extra_is_named_where_one_installs() -> None:
    install = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("## Install")[1]
    assert set(re.findall(r"`(\w+)`", install)) >= set(PROJECT["optional-dependencies"]) - {
        "dev",
        "fuzz",
        "clients",
    }  # for tests


def test_citation_changelog_and_package_have_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert cited["version"] == newest[1] == runpy.run_path(str(ROOT / "hatch_build.py"))["NEXT"]
    assert "version" in PROJECT["dynamic"]
    assert cited["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_version_follows_from_the_tags_of_the_checkout(tmp_path: Path) -> None:
    version = runpy.run_path(str(ROOT / "hatch_build.py"))["version"]

    def git(*words: str) -> None:
        person = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *person, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert version(str(tmp_path)) == "0.2.0.dev1"
    git("tag", "v1.4.0")
    assert version(str(tmp_path)) == "1.4.0"
    git("commit", "--allow-empty", "-m", "second")
    git("tag", "unrelated")
    assert version(str(tmp_path)) == "1.4.1.dev1"
    (tmp_path / "unpacked").mkdir()
    assert version(str(tmp_path / "unpacked")) == "0.2.0.dev0"  # not a checkout


def test_ci_runs_every_python_that_the_package_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]
    named = [row.rsplit(" ", 1)[1] for row in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", row)]
    assert matrix["python"] == named
    assert {"python": "3.11", "versions": "floors"} in matrix["include"]
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_every_form_and_workflow_is_yaml_of_its_kind(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name in ("fault.yml", "wish.yml"):
        assert {"name", "description", "body"} <= set(tree)
        ids = [field["id"] for field in tree["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in tree["body"])


def test_every_direct_requirement_of_ci_and_of_the_image_is_pinned() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["dev"], *extras["remote"]]  # the image has `remote`
    names = {re.split(r"[\[>=<]", each)[0].lower().replace("_", "-") for each in wanted} - {"softprompt"}
    assert names <= pins
