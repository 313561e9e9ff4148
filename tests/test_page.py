"""The main path is short: how many calls lie between the command line and the work, counted on the real stack."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.cli.screen import screen
from softprompt.cli.tune import learn
from softprompt.tuning.optim import Muon
from softprompt.tuning.recipe import Recipe


def _frames() -> list[str]:
    """Functions of softprompt on the stack, the innermost first."""
    package = str(Path(inspect.getfile(learn)).parents[1])
    return [frame.function for frame in inspect.stack() if frame.filename.startswith(package)]


def test_three_hops_lead_from_the_command_line_to_the_gradient_and_to_the_optimisers_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: dict[str, list[str]] = {}
    backward, step = torch.Tensor.backward, Muon.step

    def seen_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        stacks["backward"] = _frames()
        backward(self, *args, **kwargs)

    def seen_step(self: Muon, closure: Any = None) -> None:
        stacks["step"] = _frames()
        step(self, closure)

    monkeypatch.setattr(torch.Tensor, "backward", seen_backward)
    monkeypatch.setattr(Muon, "step", seen_step)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the order never came"}\n' * 4, encoding="utf-8")
    recipe = Recipe.from_flags(
        {},
        [
            f"data.source={rows}",
            f"out={tmp_path / 'p'}",
            "tune.max_steps=2",
            "tune.epochs=2",
            "prompt.length=2",
        ],
    )  # the first step takes the gradient that the rate was measured by
    learn(screen(as_json=True), recipe)
    # From `learn`, which the command calls: tune, then the loss and gradient or the learner's step, then torch.
    assert stacks["backward"] == ["__call__", "tune", "learn"]
    assert stacks["step"] == ["step", "tune", "learn"]
