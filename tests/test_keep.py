"""General text keeps what the bare base predicts of it while a prompt learns a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import DataError
from softprompt.progress.events import Event, Stepped
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning import keep
from softprompt.tuning.keep import Keeper, written_passages
from softprompt.tuning.loop import tune
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import start
from test_learn import SPLITS, learn, lm_of, recipe

KINDS = ["soft", "deep"]


def divergence(lm: FrozenLM, plain: Plain, ids: list[int]) -> torch.Tensor:
    """KL(base || prompt) in nats a token by transformers' model and torch alone, over the whole vocabulary."""
    embeddings_1SD = lm.embed(torch.tensor([ids]))
    base_SV = lm.model(inputs_embeds=embeddings_1SD).logits[0, :-1].log_softmax(-1).detach()
    if len(plain) == 1:
        logits = lm.model(inputs_embeds=torch.cat([plain[0][None], embeddings_1SD], 1)).logits[
            0, len(plain[0]) : -1
        ]
    else:
        from transformers import DynamicCache

        layers = [
            tuple(tensor.transpose(0, 1)[None] for tensor in layer) for layer in zip(*plain, strict=True)
        ]
        logits = lm.model(inputs_embeds=embeddings_1SD, past_key_values=DynamicCache(layers)).logits[0, :-1]
    return torch.nn.functional.kl_div(logits.log_softmax(-1), base_SV, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("kind", KINDS)
def test_the_added_gradient_is_that_of_the_divergence_from_the_bare_base(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "TOP_K", 10_000)  # the whole vocabulary
    lm = lm_of()
    plan = make_plan(recipe(tmp_path, f"prompt.kind={kind}", "tune.keep=0.7"), lm=lm, splits=SPLITS)
    keeper, form = Keeper(plan), start(plan)
    added = keeper.add_gradient(form, step=3)
    passages = [written_passages(lm, 0)[n % len(keeper.rows)] for n in (6, 7)]
    plain = tuple(tensor.detach().clone().requires_grad_() for tensor in form())
    counts = [len(ids) - 1 for ids in passages]
    theirs = torch.as_tensor(0.0) + sum(
        divergence(lm, plain, ids) * count for ids, count in zip(passages, counts, strict=True)
    ) / sum(counts)
    assert added == pytest.approx(0.7 * float(theirs.detach()), abs=1e-5)
    (0.7 * theirs).backward()
    for parameter in form.parameters():
        found = [tensor.grad for tensor in plain]
        flat = (
            found[0] if kind == "soft" else torch.cat([grad.transpose(0, 1).flatten(1) for grad in found], 1)
        )
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.norm(), flat.norm(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_keeps_changes_unseen_text_less_and_still_learns(tmp_path: Path, kind: str) -> None:
    lm = lm_of()
    options = (f"prompt.kind={kind}", "tune.epochs=6")
    free, kept = (
        learn(tmp_path / name, *options, f"tune.keep={weight}", lm=lm)
        for name, weight in (("free", 0), ("kept", 2))
    )
    unseen = written_passages(lm, seed=99)[:8]
    changes = [
        sum(float(divergence(lm, result.prompt.plain, ids).detach()) for ids in unseen)
        for result in (free, kept)
    ]
    assert changes[1] < 0.7 * changes[0]
    assert kept.nll_after < kept.nll_before


def test_a_killed_run_that_keeps_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options = ("tune.keep=0.5", "tune.checkpoint_steps=1")
    whole = learn(tmp_path / "whole", *options)

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise SystemExit

    cut: Any = recipe(tmp_path / "cut", *options)
    with pytest.raises(SystemExit):
        tune(cut, lm=lm_of(), splits=SPLITS, on_event=kill)
    resumed = tune(cut, lm=lm_of(), splits=SPLITS, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.prompt.plain, resumed.prompt.plain, strict=True))


def test_general_text_comes_from_a_file_where_one_is_named(tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\nshort\n\nNobody answers my order, which never came.", "utf-8")  # fmt: skip
    plan = make_plan(recipe(tmp_path, "tune.keep=1", f"tune.keep_text={text}"), lm=lm_of(), splits=SPLITS)
    assert len(Keeper(plan).rows) == 2
    text.write_text("ab", "utf-8")
    with pytest.raises(DataError, match="has no paragraph of 8 tokens"):
        Keeper(plan)
    text.unlink()
    with pytest.raises(DataError, match=r"tune.keep_text: .*cannot be read"):
        Keeper(plan)
