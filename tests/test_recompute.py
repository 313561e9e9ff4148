"""Gradient checkpointing changes memory and time, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from test_learn import SPLITS, learn, lm_of, recipe, vectors


@pytest.mark.parametrize("kind", ["soft", "deep"])
@pytest.mark.parametrize(
    "architecture", ["Llama", "GPT-2", "BLOOM (ALiBi)", "Gemma 3 (sliding window)", "Mixtral (experts)"]
)
def test_the_gradient_is_the_same_to_the_bit(tmp_path: Path, architecture: str, kind: str) -> None:
    plan = make_plan(recipe(tmp_path, f"prompt.kind={kind}"), lm=lm_of(architecture), splits=SPLITS)
    found: list[Any] = []
    for recompute in (False, True):
        form = start(plan)
        (nll,) = Gradients(FastLoss(plan.lm, recompute=recompute), 5)([form], [plan.train.encoded])
        found.append((nll, next(iter(form.parameters())).grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_less_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    """Bytes that autograd saves in the forward pass, the base's own weights left out."""
    plan = make_plan(recipe(tmp_path), lm=lm_of(), splits=SPLITS)
    weights = {weight.untyped_storage().data_ptr() for weight in plan.lm.model.parameters()}
    kept = []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Gradients(FastLoss(plan.lm, recompute=recompute), 12)([start(plan)], [plan.train.encoded])
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


def test_a_run_with_it_learns_the_same_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    lm = lm_of()
    one = learn(tmp_path / "a", lm=lm)
    other = learn(tmp_path / "b", "tune.gradient_checkpointing=true", lm=lm)
    assert torch.equal(vectors(one), vectors(other))
    assert not any("forward" in vars(module) for module in lm.model.modules())
