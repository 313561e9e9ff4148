"""Passes that are recorded and replayed, against the plain loss. The recorder here is a stand-in that does what torch documents of
CUDA graphs: it reads and writes fixed tensors, so a pass that is still needed is overwritten by the next one. Real
graphs: test_cuda.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import Batch, collate
from softprompt.data.encoded import Encoded
from softprompt.loss.fast import FastLoss
from softprompt.loss.graphed_body import GraphedBody, Pass
from softprompt.prompt.soft_prompt import Plain
from tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = ["BLOOM (ALiBi)", "GPT-2", "OPT", "Llama", "Gemma 2 (sliding window)", "Falcon (ALiBi)"]
CONTEXT = list(range(30, 40))


class Replayed:
    """A stand-in for a recorder of CUDA graphs; `spoil` changes what is replayed."""

    def __init__(self, spoil: float = 1.0) -> None:
        self.spoil = spoil
        self.recorded: list[list[tuple[int, ...]]] = []

    def __call__(self, run: Pass, samples: tuple[Tensor, ...], warmups: int) -> Pass:
        self.recorded.append([tuple(sample.shape) for sample in samples])
        spoil = self.spoil
        fixed = [sample.detach().clone() for sample in samples]
        made: dict[str, Any] = {}

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                for own, given in zip(fixed, inputs, strict=True):
                    assert own.shape == given.shape
                    own.copy_(given)
                with torch.enable_grad():
                    made["leaves"] = [
                        own.clone().requires_grad_(sample.requires_grad)
                        for own, sample in zip(fixed, samples, strict=True)
                    ]
                    made["states"] = run(*made["leaves"])
                return made["states"].detach() * spoil

            @staticmethod
            def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
                learned = [leaf for leaf in made["leaves"] if leaf.requires_grad]
                slopes = iter(torch.autograd.grad(made["states"], learned, upstream[0], allow_unused=True))
                return tuple(next(slopes) if leaf.requires_grad else None for leaf in made["leaves"])

        return lambda *inputs: Graph.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def batch(lengths: Sequence[int], kind: str) -> Batch:
    """Rows of these lengths, of which the last three tokens are trained."""
    rows = []
    for number, length in enumerate(lengths):
        ids = [(17 * number + 7 * at) % 300 + 3 for at in range(length)]
        before = CONTEXT if kind == "context" else []
        soft = [] if kind == "deep" else list(range(4))
        slots = [-1] * len(before) + soft + [-1] * length
        trained = [False] * (len(slots) - 3) + [True] * 3
        rows.append(Encoded([*before, *[0] * len(soft), *ids], slots, trained, number, 0))
    return collate(rows)


def prompt_for(lm: FrozenLM, kind: str) -> Plain:
    drawn = torch.Generator().manual_seed(3)
    if kind != "deep":
        return ((torch.randn(4, lm.width, generator=drawn) * 0.3).requires_grad_(),)
    shape = (lm.num_layers, 4, lm.fingerprint.kv_heads, lm.fingerprint.head_width)
    return tuple((torch.randn(shape, generator=drawn) * 0.3).requires_grad_() for _ in range(2))


def replaying(lm: FrozenLM, capture: Any) -> tuple[FastLoss, GraphedBody]:
    loss = FastLoss(lm)
    graphs = GraphedBody(lm, lm.body, capture)
    vars(loss)["graphed_body"] = graphs
    return loss, graphs


def slopes_of(nll_N: Tensor, prompt: Plain) -> tuple[Tensor, ...]:
    return torch.autograd.grad(nll_N.sum(), prompt)


@pytest.mark.parametrize("kind", ["soft", "context", "deep"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_passes_give_the_loss_and_gradient_of_the_plain_one(architecture: str, kind: str) -> None:
    lm = FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), name="tiny")
    loss, graphs = replaying(lm, Replayed())
    for lengths in ([9, 7, 12], [12, 12, 12], [8, 10, 11]):
        prompt, rows = prompt_for(lm, kind), batch(lengths, kind)
        ours, theirs = loss(rows, prompt), lm.token_nll(rows, prompt)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for mine, other in zip(slopes_of(ours, prompt), slopes_of(theirs, prompt), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    assert graphs.number == 1  # all three have one padded shape


def test_rows_of_like_lengths_share_a_recorded_shape_and_none_is_padded_past_the_bases_positions() -> None:
    lm = FrozenLM.wrap(tiny_model("GPT-2"), tiny_tokenizer(), name="tiny")  # a table of 128 positions
    capture = Replayed()
    loss, _ = replaying(lm, capture)
    for length in (5, 12, 13, 28, 120):
        rows, prompt = batch([length, length - 1], "soft"), prompt_for(lm, "soft")
        torch.testing.assert_close(loss(rows, prompt), lm.token_nll(rows, prompt), rtol=1e-4, atol=1e-5)
    # With four virtual tokens the lengths are 9, 16, 17, 32, 124: to multiples of 16, of which 128 is the last that fits.
    assert [shapes[0][1] for shapes in capture.recorded] == [16, 32, 128]
    deep, rows = prompt_for(lm, "deep"), batch([122, 121], "deep")
    torch.testing.assert_close(loss(rows, deep), lm.token_nll(rows, deep), rtol=1e-4, atol=1e-5)
    assert capture.recorded[-1][0][1] == 122  # 128 and 4 of the prompt are more than the table has


def test_a_pass_that_waits_for_its_gradient_is_not_overwritten_by_the_next() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    loss, graphs = replaying(lm, Replayed())
    prompt = prompt_for(lm, "soft")
    first, second = batch([9, 7], "soft"), batch([11, 6], "soft")
    together = loss(first, prompt).sum() + loss(second, prompt).sum()
    wanted = lm.token_nll(first, prompt).sum() + lm.token_nll(second, prompt).sum()
    torch.testing.assert_close(slopes_of(together, prompt), slopes_of(wanted, prompt), rtol=1e-3, atol=1e-5)
    # Replayed from then on, and after a pass whose gradient nobody takes.
    for _ in range(2):
        kept = loss(first, prompt)
        assert "Graph" in _history(kept)
        del kept
    assert graphs.number == 1


def _history(tensor: Tensor) -> str:
    """The names of the autograd functions that made a tensor."""
    names, ahead = [], [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None:
            names.append(node.name())
            ahead += [before for before, _ in node.next_functions]
    return " ".join(names)


def test_a_graph_that_gives_anything_else_is_not_used_and_a_body_that_cannot_be_recorded_is_read_plainly() -> (
    None
):
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    asked = []

    def refuses(run: Pass, samples: tuple[Tensor, ...], warmups: int) -> Pass:
        asked.append(len(samples))
        raise RuntimeError("operation not permitted when stream is capturing")

    for capture in (Replayed(spoil=1.01), refuses):
        loss, graphs = replaying(lm, capture)
        for lengths in ([9, 7], [9, 7], [40, 7]):
            prompt, rows = prompt_for(lm, "soft"), batch(lengths, "soft")
            torch.testing.assert_close(loss(rows, prompt), lm.token_nll(rows, prompt), rtol=1e-4, atol=1e-5)
        assert graphs.number == 0
    assert len(asked) == 2  # each shape is tried once


def test_the_first_graph_of_each_kind_is_compared() -> None:
    """A recorder that is right for soft prompts and wrong for deep ones."""
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")

    def wrong_for_deep(run: Pass, samples: tuple[Tensor, ...], warmups: int) -> Pass:
        return Replayed(spoil=1.0 if len(samples) == 2 else 1.01)(run, samples, warmups)

    loss, graphs = replaying(lm, wrong_for_deep)
    for kind, lengths, number in (
        ("soft", [9, 7], 1),
        ("soft", [40, 7], 2),
        ("deep", [9, 7], 2),
        ("deep", [40, 7], 2),
    ):
        prompt, rows = prompt_for(lm, kind), batch(lengths, kind)
        torch.testing.assert_close(loss(rows, prompt), lm.token_nll(rows, prompt), rtol=1e-4, atol=1e-5)
        assert graphs.number == number


def test_losses_without_a_gradient_and_large_batches_are_read_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), name="tiny")
    capture = Replayed()
    loss, _ = replaying(lm, capture)
    with torch.no_grad():
        loss(batch([9, 7], "soft"), prompt_for(lm, "soft"))
    loss(batch([9, 7], "soft"), (prompt_for(lm, "soft")[0].detach(),))  # nothing that is learned
    # 2 x 16 positions of a base of so many weights, in two layers: one multiply-add above the bound.
    monkeypatch.setattr("softprompt.loss.graphed_body.MOST_WORK", (32 * lm.num_parameters - 1) / 2)
    loss(batch([9, 7], "soft"), prompt_for(lm, "soft"))
    assert capture.recorded == []
    monkeypatch.setattr("softprompt.loss.graphed_body.MOST_WORK", 32 * lm.num_parameters / 2)
    loss(batch([9, 7], "soft"), prompt_for(lm, "soft"))
    assert len(capture.recorded) == 1
