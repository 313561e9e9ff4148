"""Text before the soft slot, read once: the same loss and gradient as reading all of it, within the given memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example, Splits
from softprompt.loss.context_cache import companies, context_bytes, contexts_of
from softprompt.loss.fast import FastLoss
from softprompt.progress.events import Event, Note, Stepped
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.together import Together
from tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = [
    "BLOOM (ALiBi)",
    "GPT-2",
    "OPT",
    "Llama",
    "Gemma 2 (sliding window)",
    "Gemma 3 (sliding window)",
    "Phi-3 (sliding window)",
    "Falcon (ALiBi)",
]


def row(context: range, answer: range, soft: int = 3) -> Encoded:
    """A context, the soft slot, an answer that is learned."""
    tokens, slot = list(context), [-1] * len(context)
    return Encoded(
        [*tokens, *[0] * soft, *answer],
        [*slot, *range(soft), *[-1] * len(answer)],
        [*[False] * (len(tokens) + soft), *[True] * len(answer)],
        0,
        0,
    )


ROWS = [
    row(range(20, 32), range(90, 94)),
    row(range(40, 60), range(95, 96)),
    row(range(20, 32), range(70, 77)),
]


def learned(loss: FastLoss, rows: list[Encoded]) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    prompt_PD = (
        torch.randn(3, loss.lm.width, generator=drawn) * loss.lm.embedding_VD.float().std()
    ).requires_grad_()
    nll_N = loss(collate(rows), (prompt_PD,))
    return nll_N.detach(), torch.autograd.grad(nll_N.sum(), prompt_PD)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_reading_everything(architecture: str) -> None:
    loss = FastLoss(FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture))
    first_N, first_slope = learned(loss, ROWS)
    again_N, again_slope = learned(loss, ROWS)
    assert loss.context_cache.read == 2  # one context stands in two rows, and none is read again
    loss.context_cache.budget_bytes = 0
    whole_N, whole_slope = learned(loss, ROWS)
    for ours_N, our_slope in ((first_N, first_slope), (again_N, again_slope)):
        torch.testing.assert_close(ours_N, whole_N, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(our_slope, whole_slope, rtol=1e-4, atol=1e-5)


def assert_contexts_do_not_depend_on_history(lm: FrozenLM, rows: list[Encoded]) -> None:
    """A loss that has read other batches before, as in a run, and a fresh one, as in a resumed run: the same bits."""
    used, fresh = FastLoss(lm), FastLoss(lm)
    for first in (0, 5, 10):
        learned(used, rows[first : first + 5])
    batch = [rows[index] for index in (14, 3, 9, 6, 2)]
    (used_N, used_slope), (fresh_N, fresh_slope) = learned(used, batch), learned(fresh, batch)
    assert used.context_cache.read == len({tuple(row.ids) for row in rows})
    assert torch.equal(used_N, fresh_N)
    assert torch.equal(used_slope, fresh_slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_context_has_the_same_bits_in_whatever_company_it_is_read(dtype: torch.dtype) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama").to(dtype), tiny_tokenizer())
    rows = [row(range(20 + n, 30 + 3 * n), range(90, 92 + n % 3)) for n in range(15)]
    assert_contexts_do_not_depend_on_history(lm, rows)


def test_so_it_has_on_a_trained_base_in_bfloat16(shared_data: Path) -> None:
    lm = FrozenLM.load(str(shared_data / "weights" / "TinyStories-656K"), dtype="bfloat16")
    story = lm.tokenizer(STORY)["input_ids"] * 2
    rows = [
        Encoded(
            [*story[n : 12 + 3 * n], 0, 0, 0, *story[:3]],
            [*[-1] * (12 + 2 * n), 0, 1, 2, -1, -1, -1],
            [*[False] * (15 + 2 * n), True, True, True],
            n,
            0,
        )
        for n in range(15)
    ]
    assert_contexts_do_not_depend_on_history(lm, rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contexts_read_together_give_the_loss_and_gradient_of_reading_everything(architecture: str) -> None:
    loss = FastLoss(FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture))
    rows = [row(range(20 + n, 30 + 2 * n), range(90, 92 + n % 3)) for n in range(5)]
    loss.context_cache.read_together([contexts_of(rows[:3])])
    ours_N, our_slope = learned(loss, rows)
    assert (len(loss.context_cache), loss.context_cache.read) == (3, 5)  # the others pass by
    loss.context_cache.budget_bytes = 0
    whole_N, whole_slope = learned(loss, rows)
    torch.testing.assert_close(ours_N, whole_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_slope, whole_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [15, 7, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contexts_read_together_have_the_same_bits_whatever_was_read_before(
    dtype: torch.dtype, kept: int
) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama").to(dtype), tiny_tokenizer())
    rows = [row(range(20 + n, 30 + 3 * n), range(90, 92 + n % 3)) for n in range(15)]
    groups = [contexts_of(rows[first : first + 4]) for first in range(0, 15, 4)]
    batch = [rows[index] for index in (14, 3, 9, 6, 2)]
    found = []
    for former in ((), (0, 5, 10), (10, 0)):
        loss = FastLoss(lm)
        loss.context_cache.budget_bytes = context_bytes(lm, contexts_of(rows[:kept])) or 1
        if former:  # another run before, with other groups
            loss.context_cache.read_together([contexts_of(rows)])
            learned(loss, rows)
        loss.context_cache.read_together(groups)
        for first in former:
            learned(loss, rows[first : first + 5])
        found.append(learned(loss, batch))
        assert loss.context_cache.bytes <= loss.context_cache.budget_bytes
    for again_N, again_slope in found[1:]:
        assert torch.equal(again_N, found[0][0])
        assert torch.equal(again_slope, found[0][1])


def test_contexts_are_read_in_passes_of_512_positions() -> None:
    """By hand: 100 of 5 tokens fit (500), the next of 6 would make 606; 300 and 400 tokens go alone."""
    fives = [(1, 2, 3, number, 0) for number in range(100)]
    six, long, longer = (7,) * 6, (8,) * 300, (9,) * 400
    assert companies([longer, six, *fives, long]) == [tuple(sorted(fives)), (six,), (long,), (longer,)]
    assert companies([]) == []


STORY = (
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it because it "
    "was sharp. Lily wanted to share the needle with her mom, so she could sew a button on her shirt. Her mom was happy."
)


def test_what_a_judgement_read_serves_learning_too() -> None:
    loss = FastLoss(FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer()))
    with torch.inference_mode():
        loss(collate(ROWS), (torch.zeros(3, loss.lm.width),))
    learned(loss, ROWS)
    assert loss.context_cache.read == 2


def test_no_more_is_kept_than_the_budget_allows_and_the_rest_is_still_right() -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    loss = FastLoss(lm)
    kept = context_bytes(lm, contexts_of(ROWS[:1]))
    assert context_bytes(lm, contexts_of(ROWS)) > kept
    loss.context_cache.budget_bytes = kept
    ours_N, our_slope = learned(loss, ROWS)
    learned(loss, ROWS)
    assert loss.context_cache.bytes == kept
    assert (len(loss.context_cache), loss.context_cache.read) == (1, 3)
    loss.context_cache.budget_bytes = 0
    whole_N, whole_slope = learned(loss, ROWS)
    torch.testing.assert_close(ours_N, whole_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_slope, whole_slope, rtol=1e-4, atol=1e-5)


def test_rows_that_start_with_the_slot_or_learn_their_context_are_read_whole() -> None:
    loss = FastLoss(FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer()))
    front = row(range(20, 20), range(90, 94))
    trained = row(range(20, 32), range(90, 94))
    trained.trained[5] = True
    for rows in ([*ROWS, front], [trained]):
        nll_N, _ = learned(loss, rows)
        assert len(nll_N) == sum(one.trained_tokens for one in rows)
    assert (len(loss.context_cache), loss.context_cache.read) == (0, 0)


def test_a_run_says_what_is_kept_and_reads_every_context_once(tmp_path: object) -> None:
    lm = FrozenLM.wrap(tiny_model("BLOOM (ALiBi)"), tiny_tokenizer())
    rows = tuple(
        Example({"text": f"the order {n} never came and nobody answers", "label": "yes"}, row=n)
        for n in range(4)
    )
    recipe = Recipe(
        out=str(tmp_path),
        data={
            "source": "memory",
            "template": "Tweet: {text} {soft:3} Complaint? {label}",
            "target": "label",
            "validation": 0,
        },
        tune={"epochs": 3, "batch_size": 2},
    )
    said: list[str] = []
    loss = FastLoss(lm)
    tune(
        recipe,
        lm=lm,
        loss=loss,
        splits=Splits(rows, (), (), "memory", None),
        on_event=lambda event: said.append(event.text) if isinstance(event, Note) else None,
    )
    assert any("4 contexts" in text and "tune.context_cache_gigabytes" in text for text in said)
    assert (len(loss.context_cache), loss.context_cache.read) == (4, 4)


@pytest.mark.parametrize("gigabytes", [1.0, 5e-5], ids=["all are kept", "some are kept"])
def test_a_run_that_was_killed_reads_contexts_in_the_same_company(tmp_path: Path, gigabytes: float) -> None:
    lm = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer())
    texts = ["the order never came and nobody answers " * (1 + n % 3) + str(n) for n in range(16)]
    rows = tuple(Example({"text": text, "label": "yes"}, row=n) for n, text in enumerate(texts))
    splits = Splits(rows[:12], rows[12:], (), "memory", None)
    data = {"source": "memory", "template": "Tweet: {text} {soft:3} Complaint? {label}", "target": "label"}

    def learn_it(name: str, *, ends_after: int = 99, resume: bool = False) -> tuple[FastLoss, torch.Tensor]:
        def watch(event: Event) -> None:
            if isinstance(event, Stepped) and event.step == ends_after:
                raise SystemExit

        tuning = {"epochs": 3, "batch_size": 3, "checkpoint_steps": 2, "valid_every_steps": 5}
        recipe = Recipe(
            out=str(tmp_path / name), data=data, tune={**tuning, "context_cache_gigabytes": gigabytes}
        )
        loss = FastLoss(lm, context_bytes=round(gigabytes * 1e9))
        tuned = tune(recipe, lm=lm, splits=splits, loss=loss, on_event=watch, resume=resume, progress=False)
        return loss, next(iter(tuned.prompt.tensors.values()))

    loss, whole = learn_it("whole")
    assert 0 < len(loss.context_cache) <= 16
    assert (len(loss.context_cache) < 16) == (gigabytes < 1)
    for step in (1, 5, 8):
        with pytest.raises(SystemExit):
            learn_it(f"cut{step}", ends_after=step)
        _, resumed = learn_it(f"cut{step}", resume=True)
        assert torch.equal(resumed, whole)
    # What a run left in a loss is not met by another one: here the same run again, and runs side by side.
    again = tune_again(loss, lm, splits, data, tmp_path)
    assert torch.equal(again, tune_again(FastLoss(lm), lm, splits, data, tmp_path))


def tune_again(
    loss: FastLoss, lm: FrozenLM, splits: Splits, data: dict[str, str], folder: Path
) -> torch.Tensor:
    """A run of other batches, side by side with none."""
    recipe = Recipe(out=str(folder / "again"), data=data, tune={"batch_size": 4, "epochs": 1, "seed": 1})
    together = Together([recipe], lm=lm, splits=splits, loss=loss)
    together.advance()
    (result,) = together.save().values()
    return next(iter(result.prompt.tensors.values()))
