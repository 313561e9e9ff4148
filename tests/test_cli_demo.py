"""`demo` shows the whole path and proves that the base stayed as it was. Here with few rows; `make demo` runs it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli import demo
from softprompt.cli.app import main
from softprompt.store.artifact import load_prompt
from softprompt.tuning.recipe import Recipe

WHOLE_RECIPES = (demo.messages_recipe, demo.roles_recipe)


def shortened(recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """The demo's recipe on its first 16 rows, two steps."""

    def short(*about: Any, real: bool) -> Recipe:
        whole = recipe(*about, real=real).model_dump()
        whole["data"] |= {"limit": 16}
        whole["tune"] |= {"epochs": 1, "max_steps": 2}
        return Recipe(**whole)

    return short


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "roles_recipe", shortened(demo.roles_recipe))
    monkeypatch.setattr(demo, "messages_recipe", shortened(demo.messages_recipe))


def test_the_demo_ends_with_one_json_object_and_tells_people_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert record["base_sha256_before"] == record["base_sha256_after"]
    assert len(record["base_sha256_before"]) == 64
    roles, messages = record["roles"], record["messages"]
    assert roles["heldout_nll_after"] < roles["heldout_nll_before"]
    assert load_prompt(roles["path"]).length == 20
    for task in (roles, messages):
        assert task["bytes"] == Path(task["path"], "adapter_model.safetensors").stat().st_size
    assert record["seconds"] > 0
    assert set(messages["accuracy"]) == {"base", "best_wording", "instruction", "prompt"}
    assert all(0 <= share <= 1 for share in messages["accuracy"].values())
    assert messages["wording"] in shown.err
    printed = " ".join(shown.err.split())
    for part in (
        "weights, all frozen",
        "dtype",
        "fingerprint",
        "What the base answers by itself",
        "base, same layout",
        "base, instruction",
        "of the test messages right",
        "[20 virtual tokens: 0 to 19]",
        "context",
        "trained",
        "truncated 0 rows",
        "unlabelled 0 rows",
        "tokens/s",
        "before and after",
        "held-out loss",
        "(identical)",
        "next commands to try",
    ):
        assert part in printed


def test_a_machine_that_is_busy_leaves_out_the_second_task(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SECOND_TASK_UNTIL_SECONDS", {False: 0, True: 0})
    assert main(["demo", "--out", "elsewhere"]) == 0
    shown = capsys.readouterr().out
    assert "task 2 is left out" in shown
    assert "softprompt generate --prompt elsewhere/messages" in shown
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["messages"]


def test_the_demo_on_a_real_base_is_the_same_path_with_fewer_steps(tmp_path: Path) -> None:
    for recipe in WHOLE_RECIPES:
        real = recipe("bases/smollm2", tmp_path, 0, real=True)
        bundled = recipe("builtin", tmp_path, 0, real=False)
        assert real.base == "bases/smollm2"
        assert (real.data.source, real.data.target, real.out) == (
            bundled.data.source,
            bundled.data.target,
            bundled.out,
        )
        assert isinstance(real.data.limit, int)
        assert isinstance(real.data.validation, int)
        rows = real.data.limit - real.data.validation
        assert rows * real.tune.epochs <= 320  # forty steps of eight rows
