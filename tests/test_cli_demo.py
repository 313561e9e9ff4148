"""`demo` shows the whole path and proves that the base stayed as it was. Here with few rows; `make demo` runs it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.cli import demo
from softprompt.cli.app import main
from softprompt.store.artifact import load_prompt
from softprompt.tuning.recipe import Recipe


def shortened(recipe: Callable[[Path, int], Recipe]) -> Callable[[Path, int], Recipe]:
    """The demo's recipe on its first 16 rows, two steps."""

    def short(out: Path, seed: int) -> Recipe:
        whole = recipe(out, seed).model_dump()
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
    assert record["heldout_nll_after"] < record["heldout_nll_before"]
    assert load_prompt(record["prompt_path"]).length == 20
    assert record["prompt_bytes"] == Path(record["prompt_path"], "adapter_model.safetensors").stat().st_size
    assert record["seconds"] > 0
    assert 0 <= record["messages"]["accuracy_after"] <= 1
    told = " ".join(shown.err.split())
    for part in (
        "weights, all frozen",
        "dtype",
        "fingerprint",
        "what the base answers by itself",
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
        assert part in told


def test_a_machine_that_is_busy_leaves_out_the_second_task(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SECOND_TASK_UNTIL_SECONDS", 0)
    assert main(["demo", "--out", "elsewhere"]) == 0
    shown = capsys.readouterr().out
    assert "task 2 is left out" in shown
    assert "softprompt generate --prompt elsewhere/roles --side-by-side" in shown
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["roles"]
