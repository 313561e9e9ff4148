"""What the README and the docs say is what happens: their commands run, and their generated parts are current."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import house_map
import softprompt
from conftest import SLOW
from softprompt.cli.app import VERBS, main
from softprompt.tuning.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Fenced blocks as (language, title, text). Those marked `{.sh .hub}` need the network or a model and are none of these."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> list[list[str]]:
    """The `softprompt` commands of a sh block, continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("softprompt ")]


def runs(page: Path) -> bool:
    """Whether a page has anything to run."""
    return any(
        language == "python" or (language == "sh" and commands(text)) for language, _, text in blocks(page)
    )


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=lambda page: page.name)
def test_the_commands_and_the_python_of_a_page_run_in_its_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block with a title is a file that the page tells its reader to save."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for language, title, text in blocks(page):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), {})
        elif language == "sh":
            for arguments in commands(text):
                run_command(arguments, capsys)


FEW_STEPS = ["--set", "tune.max_steps=2", "--set", "data.validation=6"]
SMALLER = dict.fromkeys(("tune", "together", "sweep"), FEW_STEPS)
SMALLER["distil"] = SMALLER["compare"] = [*FEW_STEPS, "--set", "data.limit=24"]


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process, of what learns the first two steps, with few rows where all of them are read; what it prints goes to a file after `>`."""
    redirect = arguments.index(">") if ">" in arguments else None
    assert main([*arguments[:redirect], *SMALLER.get(arguments[0], [])]) == 0, (
        f"softprompt {shlex.join(arguments)}\n{capsys.readouterr().err}"
    )
    if redirect is not None:
        Path(arguments[redirect + 1]).write_text(capsys.readouterr().out, encoding="utf-8")


def test_the_python_of_the_readme_has_at_most_ten_lines() -> None:
    (block,) = [text for language, _, text in blocks(ROOT / "README.md") if language == "python"]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_recipe_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"), (
        "run `make docs`"
    )


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    """Strict: a link to a page, a heading or a name that is not there stops the build. Two that are planted are all that it finds."""
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (docs / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n[a page](nowhere.md), [a heading](start.md#nowhere)\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(
        config.replace("paths: [src]", f"paths: ['{ROOT}/src']"), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert done.returncode != 0
    assert "2 issues found" in said, said
    assert "nowhere.md" in said
    assert "start.md#nowhere" in said
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(docs.rglob("*.md"))) / 2
    # A fence that the builder does not know is left as text, and takes the headings behind it with it.
    assert [page.name for page in pages if "```" in page.read_text(encoding="utf-8")] == []


def test_every_page_is_in_the_sites_menu_once() -> None:
    menu = re.findall(
        r"^\s+- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(menu) == sorted(set(pages) - {"report/report.md"})


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_repositorys_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readmes_table_and_picture_are_of_the_committed_comparison() -> None:
    drawn = runpy.run_path(str(ROOT / "benchmarks" / "before_and_after.py"))
    arms = json.loads((ROOT / "benchmarks" / "before_and_after.json").read_text(encoding="utf-8"))["arms"]
    assert drawn["table"](arms) in (ROOT / "README.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "pictures" / "before-after.svg").read_text(encoding="utf-8")
    assert drawn["picture"](arms) == picture
    for picture_file in (ROOT / "docs" / "pictures").glob("*.svg"):
        text = picture_file.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert not re.search(r"(?:href|src|url)\W+https?:", text), f"{picture_file.name} loads something"


def test_every_command_is_in_the_list_of_commands() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    named = re.findall(r"`softprompt ([a-z-]+)`", page)
    assert sorted(named) == sorted(VERBS)


def test_every_public_name_is_in_the_api_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {line.rsplit(".", 1)[1] for line in page.splitlines() if line.startswith("::: ")}
    assert named == set(softprompt.__all__) - {"__version__", "Prompt"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_recipe(path: Path) -> None:
    Recipe.load(path)


def test_the_tutorials_recipe_is_the_tutorial_exactly() -> None:
    recipe = Recipe.load(ROOT / "examples" / "tutorial.yaml")
    assert recipe.base == "bigscience/bloomz-560m"
    assert (recipe.data.source, recipe.data.column, recipe.data.limit) == (
        "fka/awesome-chatgpt-prompts",
        "prompt",
        50,
    )
    assert re.fullmatch("[0-9a-f]{40}", recipe.data.revision or "")
    assert (recipe.prompt.length, recipe.prompt.init) == (4, "random")
    assert (recipe.tune.learning_rate, recipe.tune.epochs, recipe.tune.batch_size) == (0.005, 5, "auto")
    assert recipe.device == "cpu"


def test_the_map_in_the_docs_names_every_file_and_no_other() -> None:
    page = house_map.PAGE.read_text(encoding="utf-8")
    assert house_map.with_map(page) == page, "run `make docs`"


def test_every_file_says_what_it_is() -> None:
    for path in house_map.SOURCE.rglob("*.py"):
        assert house_map.first_sentence(path), f"{path} has no docstring"


def test_the_settings_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), (
        "run `make docs`"
    )


def test_the_list_of_slow_tests_names_tests_that_are_there() -> None:
    for file, beginnings in SLOW.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for beginning in beginnings:
            assert f"def {beginning}" in text, f"{file}: {beginning}"


def test_every_letter_in_a_tensors_name_is_in_the_key_and_every_letter_of_the_key_is_used() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    key = page.partition("## Letters")[2].partition("\n## ")[0]
    listed = {
        letter
        for row in re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) \|", key, re.M)
        for letter in row.split(", ")
    }
    listed |= set(re.findall(r"\b([a-z]) of [A-Z]\b", key))
    used = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = (
                getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None) or ""
            )
            shape = re.fullmatch(r"_?[a-z][a-z0-9_]*_([A-Za-z0-9]{1,5})", name)
            if shape is not None and any(letter.isupper() for letter in shape[1]):
                used |= {letter for letter in shape[1] if letter.isalpha()}
    assert used == listed
