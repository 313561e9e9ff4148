"""What the README and the docs say is what happens: their commands run, and their generated parts are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import house_map
from conftest import SLOW
from softprompt.cli.app import main
from softprompt.tuning.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of exactly this language; those marked `sh hub` need the network and are not run."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """The `softprompt` commands of a page's sh blocks, continued lines joined."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("softprompt ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for arguments in commands(page):
        redirect = arguments.index(">") if ">" in arguments else None
        assert main(arguments[:redirect]) == 0, (
            f"softprompt {shlex.join(arguments)}\n{capsys.readouterr().err}"
        )
        if redirect is not None:
            Path(arguments[redirect + 1]).write_text(capsys.readouterr().out, encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


def test_the_python_of_the_readme_is_under_ten_lines() -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) < 10


def test_the_recipe_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"), (
        "run `make docs`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_recipe(path: Path) -> None:
    Recipe.load(path)


def test_the_tutorials_recipe_is_the_tutorial_to_the_letter() -> None:
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
