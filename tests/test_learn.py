"""Learning as a whole: what comes out, what is kept, and what happens when something breaks on the way."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.tune import describe_losses
from softprompt.data.batch import Batch, epoch_order
from softprompt.data.encoded import Encoded, EncodedRows
from softprompt.data.example import Example, Splits
from softprompt.errors import DataError, NotFinite, OutOfMemory
from softprompt.inference.generate import generate
from softprompt.inference.sampling import DecodeSettings
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients, Loss
from softprompt.loss.mean import mean_nll
from softprompt.progress.console import Screen
from softprompt.progress.events import BatchHalved, Event, Note, Started, Stepped, Stopped, Validated
from softprompt.progress.runs import ShowProgress
from softprompt.prompt.reparam import Direct
from softprompt.prompt.soft_prompt import Plain
from softprompt.store.artifact import load_prompt
from softprompt.tuning.learner import Learner
from softprompt.tuning.loop import tune
from softprompt.tuning.rate import measured_rate, try_last_step
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.run import Run
from softprompt.tuning.settle import make_plan
from softprompt.tuning.starts import first_layer_sizes, start
from softprompt.tuning.task import task_of
from softprompt.tuning.together import tune_together
from tiny_models import tiny_model, tiny_tokenizer

WORDS = ["order", "never", "came", "thank", "you", "quick", "help", "lazy", "dog", "nobody"]


def rows(first: int, count: int) -> tuple[Example, ...]:
    """Short texts of unlike lengths in which each word follows from the one before."""
    return tuple(
        Example({"text": " ".join(WORDS[(n + i) % 10] for i in range(3 + n % 4))}, row=n)
        for n in range(first, first + count)
    )


SPLITS = Splits(rows(0, 12), rows(12, 6), (), "made for the tests")


def lm_of(architecture: str = "Llama", *, bos: bool = False) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(bos=bos), name="tiny")


def recipe(out: Path, *overrides: str) -> Recipe:
    settings = ["data.source=x", f"out={out}", "tune.batch_size=4", "tune.epochs=3", "tune.learning_rate=0.2"]
    return Recipe.from_flags({}, [*settings, "prompt.length=4", *overrides])


def learn(
    out: Path,
    *overrides: str,
    lm: FrozenLM | None = None,
    splits: Splits = SPLITS,
    loss: Loss | None = None,
) -> TuneResult:
    return tune(recipe(out, *overrides), lm=lm or lm_of(), splits=splits, loss=loss)


def vectors(tuned: TuneResult) -> torch.Tensor:
    return next(iter(tuned.prompt.tensors.values()))


def uphill(lm: FrozenLM) -> Loss:
    """A loss whose gradient points the wrong way: every step makes the prompt worse."""
    token_nll = FastLoss(lm)

    def turned(batch: Any, prompt: Any = None) -> torch.Tensor:
        nll_N: torch.Tensor = token_nll(batch, prompt)
        return 2 * nll_N.detach() - nll_N if nll_N.requires_grad else nll_N

    return turned


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_held_out_loss_falls_and_both_figures_are_reported(tmp_path: Path, kind: str) -> None:
    lm = lm_of()
    tuned = learn(tmp_path / "p", f"prompt.kind={kind}", "tune.epochs=10", lm=lm)
    assert tuned.nll_after < tuned.nll_before - 0.3
    held_out = make_plan(recipe(tmp_path / "q", f"prompt.kind={kind}"), lm=lm, splits=SPLITS).held_out
    again = mean_nll(lm.token_nll, held_out, tuned.prompt.plain)
    assert again == pytest.approx(tuned.nll_after, abs=1e-6)


def test_the_base_is_the_same_to_the_byte_after_learning(tmp_path: Path) -> None:
    lm = lm_of()
    before = lm.weights_sha256()
    learn(tmp_path / "p", lm=lm)
    assert lm.weights_sha256() == before


def test_the_best_validated_step_is_kept_and_never_one_worse_than_the_start(tmp_path: Path) -> None:
    seen: list[Event] = []
    tuned = tune(
        recipe(tmp_path / "p"), lm=(lm := lm_of()), loss=uphill(lm), splits=SPLITS, on_event=seen.append
    )
    measured = {event.step: event.nll for event in seen if isinstance(event, Validated)}
    assert tuned.nll_after == min(measured.values())
    assert measured[tuned.best_step] == tuned.nll_after
    assert tuned.nll_after <= tuned.nll_before == measured[0]
    assert tuned.best_step == 0


def test_the_saved_prompt_is_the_one_that_is_returned(tmp_path: Path) -> None:
    tuned = learn(tmp_path / "p")
    assert torch.equal(vectors(tuned), next(iter(load_prompt(tmp_path / "p").tensors.values())))


@pytest.mark.parametrize("init", ["random", "vocabulary"])
def test_the_same_seed_gives_the_same_prompt_to_the_bit_and_another_seed_another(
    tmp_path: Path, init: str
) -> None:
    one, same = (learn(tmp_path / name, f"prompt.init={init}") for name in "ab")
    other = learn(tmp_path / "c", f"prompt.init={init}", "tune.seed=1")
    assert torch.equal(vectors(one), vectors(same))
    assert not torch.equal(vectors(one), vectors(other))


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_pieces_of_a_batch_add_up_to_the_gradient_of_the_whole(tmp_path: Path, kind: str) -> None:
    plan = make_plan(recipe(tmp_path, f"prompt.kind={kind}"), lm=lm_of(), splits=SPLITS)
    found = []
    for pieces in (12, 5):
        run = Run(plan, lambda event: None)
        (loss,) = Gradients(plan.loss, pieces)([run.learner.form], [plan.train.encoded])
        found.append((loss, [parameter.grad for parameter in run.learner.parameters]))
        run.close()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for whole, summed in zip(found[0][1], found[1][1], strict=True):
        assert whole is not None
        assert summed is not None
        torch.testing.assert_close(whole, summed, atol=1e-6, rtol=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_all_its_trained_tokens(tmp_path: Path) -> None:
    """Not the mean of the rows' means: long rows weigh as much as their tokens."""
    lm = lm_of()
    plan = make_plan(recipe(tmp_path), lm=lm, splits=SPLITS)
    run = Run(plan, lambda event: None)
    (start,) = run.learner.snapshot()
    (loss,) = run.gradients([run.learner.form], [plan.train.encoded])
    total = 0.0
    for one in plan.train.encoded:
        embeddings_SD = lm.embed(torch.tensor(one.ids))
        embeddings_SD[:4] = start
        labels = [token if trained else -100 for token, trained in zip(one.ids, one.trained, strict=True)]
        output = lm.model(inputs_embeds=embeddings_SD[None], labels=torch.tensor([labels]))
        total += output.loss.item() * one.trained_tokens
    assert loss == pytest.approx(total / plan.trained_tokens, abs=1e-5)
    run.close()


def failing_above(lm: FrozenLM, rows: int, error: Exception) -> Loss:
    """A loss that runs out of memory on batches of more than `rows` rows."""
    token_nll = FastLoss(lm)

    def limited(batch: Any, prompt: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch.ids_BS) > rows:
            raise error
        return token_nll(batch, prompt)

    return limited


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_a_batch_that_does_not_fit_is_halved_and_learns_the_same(tmp_path: Path, error: Exception) -> None:
    whole = learn(tmp_path / "whole", "tune.epochs=1")
    lm = lm_of()
    loss = failing_above(lm, 1, error)
    seen: list[Event] = []
    halved = tune(
        recipe(tmp_path / "p", "tune.epochs=1"), lm=lm, loss=loss, splits=SPLITS, on_event=seen.append
    )
    assert [event for event in seen if isinstance(event, BatchHalved)] == [
        BatchHalved(2, 2),
        BatchHalved(1, 4),
    ]
    assert halved.accumulation == 4
    torch.testing.assert_close(vectors(whole), vectors(halved), atol=1e-4, rtol=1e-3)


def test_a_row_that_does_not_fit_by_itself_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    lm = lm_of()
    loss = failing_above(lm, 0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(OutOfMemory, match=r"one row do not fit into memory\. Shorten"):
        learn(tmp_path / "p", lm=lm, loss=loss)


def test_another_failure_of_the_base_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    lm = lm_of()
    loss = failing_above(lm, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        learn(tmp_path / "p", lm=lm, loss=loss)


def breaking_at(lm: FrozenLM, step: int, effect: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    """A loss with something that happens in the backward pass of step `step`."""
    token_nll, calls = FastLoss(lm), 0

    def broken(batch: Any, prompt: Any = None) -> torch.Tensor:
        nonlocal calls
        nll_N: torch.Tensor = token_nll(batch, prompt)
        if nll_N.requires_grad:
            calls += 1
            if calls == step:
                return effect(nll_N)
        return nll_N

    return broken


def test_a_step_that_is_not_finite_is_refused_with_its_rows_and_the_best_prompt_is_kept(
    tmp_path: Path,
) -> None:
    lm = lm_of()
    loss = breaking_at(lm, 6, lambda nll_N: nll_N * math.nan)
    settings = recipe(tmp_path / "p", "tune.valid_every_steps=3")
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    second = epoch_order(plan.train.lengths, 4, seed=0, epoch=1)[2]
    with pytest.raises(NotFinite) as error:
        tune(settings, lm=lm, loss=loss, splits=SPLITS)
    named = [plan.train.encoded[index].row for index in second]
    assert f"on the rows {', '.join(map(str, named))} of the data" in str(error.value)
    assert "Step 6" in str(error.value)
    assert str(tmp_path / "p") in str(error.value)
    kept = load_prompt(tmp_path / "p")
    assert kept.notes["metrics"]["best_step"] == 3
    assert kept.notes["metrics"]["stopped"] == "failed"


def test_only_the_rows_that_break_the_loss_are_named(tmp_path: Path) -> None:
    lm = lm_of()
    plan = make_plan(recipe(tmp_path / "p"), lm=lm, splits=SPLITS)
    poison = lm.tokenizer("dog", add_special_tokens=False)["input_ids"][-1]
    bad = sorted(row.row for row in plan.train.encoded if poison in row.ids)
    assert 0 < len(bad) < 12
    with torch.no_grad():
        lm.embedding_VD[poison] = math.inf
    held_out = Splits(
        SPLITS.train, tuple(row for row in SPLITS.validation if "dog" not in row.fields["text"]), (), "x"
    )
    with pytest.raises(NotFinite) as error:
        learn(tmp_path / "p", "tune.batch_size=12", lm=lm, splits=held_out)
    named = str(error.value).partition("on the rows ")[2].partition(" of the data")[0]
    assert sorted(map(int, named.split(", "))) == bad


def test_ctrl_c_keeps_the_best_prompt_so_far(tmp_path: Path) -> None:
    def interrupt(nll_N: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    lm = lm_of()
    loss = breaking_at(lm, 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "p", lm=lm, loss=loss)
    kept = load_prompt(tmp_path / "p")
    assert (kept.notes["metrics"]["steps"], kept.notes["metrics"]["stopped"]) == (4, "interrupted")


def test_nothing_is_saved_when_nothing_was_learned_and_a_former_prompt_stays(tmp_path: Path) -> None:
    former = learn(tmp_path / "p", "tune.epochs=1")
    for name in ("p", "new"):
        lm = lm_of()
        loss = breaking_at(lm, 1, lambda nll_N: nll_N * math.nan)
        with pytest.raises(NotFinite):
            learn(tmp_path / name, lm=lm, loss=loss)
    assert not (tmp_path / "new" / "adapter_model.safetensors").exists()
    assert torch.equal(vectors(former), next(iter(load_prompt(tmp_path / "p").tensors.values())))


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "BLOOM (ALiBi)", "Gemma 2 (sliding window)"])
@pytest.mark.parametrize("bos", [False, True], ids=["", "with a start token"])
def test_a_text_start_scores_at_step_0_as_the_text_itself_put_in_place(
    tmp_path: Path, architecture: str, bos: bool
) -> None:
    """Against transformers' own loss on the tokens of the text and of the row."""
    lm = lm_of(architecture, bos=bos)
    text = "thank you for the quick help"
    tuned = learn(tmp_path / "p", f"prompt.init_text={text}", "prompt.length=null", "tune.max_steps=1", lm=lm)
    ids = lm.tokenizer(text)["input_ids"]
    assert tuned.prompt.length == len(ids)
    total, count = 0.0, 0
    for example in SPLITS.validation:
        row = lm.tokenizer(example.fields["text"])["input_ids"]
        unscored = len(ids) + 1  # the text and the row's first token
        labels = torch.tensor([[-100] * unscored + row[1:]])
        output = lm.model(input_ids=torch.tensor([ids + row]), labels=labels)
        total += output.loss.item() * (len(row) - 1)
        count += len(row) - 1
    if bos:  # the row's start token stands between, and its first word is scored too
        assert lm.tokenizer(example.fields["text"])["input_ids"][0] == lm.tokenizer.bos_token_id
    assert tuned.nll_before == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(("steps", "every"), [(60, 6), (23, 3), (7, 4)])
def test_held_out_loss_is_measured_at_most_ten_times_a_run_and_at_its_end(
    tmp_path: Path, steps: int, every: int
) -> None:
    seen: list[Event] = []
    settings = recipe(tmp_path / "p", "tune.epochs=20", f"tune.max_steps={steps}")
    tune(settings, lm=lm_of(), splits=SPLITS, on_event=seen.append)
    measured = [event.step for event in seen if isinstance(event, Validated)]
    assert measured == sorted({*range(0, steps, every), steps})


def test_how_often_held_out_loss_is_measured_changes_no_step(tmp_path: Path) -> None:
    runs: list[list[float]] = []
    for number, overrides in enumerate((["tune.valid_every_steps=3"], [], ["tune.valid_every_steps=1"])):
        seen: list[Event] = []
        settings = recipe(tmp_path / f"{number}", "tune.max_steps=9", "tune.learning_rate=0.05", *overrides)
        tune(settings, lm=lm_of(), splits=SPLITS, on_event=seen.append)
        assert not any("learning rate lowered" in event.text for event in seen if isinstance(event, Note))
        runs.append([event.nll for event in seen if isinstance(event, Stepped)])
    assert len(runs[0]) == 9
    assert runs[0] == runs[1] == runs[2]


def test_no_prompt_is_called_the_best_where_nothing_was_held_out(tmp_path: Path) -> None:
    for validation, said in ((SPLITS.validation, True), ((), False)):
        written = io.StringIO()
        show = ShowProgress(Screen(file=written, width=200))
        splits = Splits(SPLITS.train, validation, (), "x")
        with show:
            settings = recipe(tmp_path / f"p{len(validation)}", "tune.learning_rate=0.05")
            tuned = tune(settings, lm=lm_of(), splits=splits, on_event=show, progress=False)
        assert tuned.nll_after < tuned.nll_before
        assert ("best" in written.getvalue()) == said
        assert ("best" in describe_losses(tuned)) == said


def test_columns_that_are_not_read_are_named_with_the_flag_that_learns_them() -> None:
    def notes(*columns: str, **data: Any) -> str:
        splits = Splits((Example(dict.fromkeys(columns, "x")),))
        return " ".join(task_of(Recipe(data={"source": "x", **data}), lm_of(), splits).splits.notes)

    assert "label is not read. To learn label from it: --target label." in notes("text", "label", "idx")
    assert "topic and label are not read" in notes("text", "topic", "label")
    assert "not read" not in notes("text", "idx")
    assert "not read" not in notes("text", "label", column="text")
    assert "not read" not in notes("text", "label", target="label")


@pytest.mark.parametrize(
    ("split", "text", "said"),
    [
        ("test", "order " * 200, "positions with the prompt"),
        ("test", " ", "has no token to learn"),
        ("validation", "order " * 200, "the limit is 128"),
        ("validation", " ", "has no token to learn"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_by_their_split_before_anything_is_learned(
    tmp_path: Path, split: str, text: str, said: str
) -> None:
    bad = (Example({"text": text}, row=7),)
    splits = replace(SPLITS, **{split: (*rows(20, 3), *bad)})
    with pytest.raises(DataError, match=f"^{split.capitalize()} rows: row 7 .*{said}"):
        learn(tmp_path / "p", splits=splits)
    assert not (tmp_path / "p").exists()


def test_test_rows_that_are_too_long_are_left_out_where_the_recipe_says_so(tmp_path: Path) -> None:
    splits = replace(SPLITS, test=(*rows(20, 3), Example({"text": "order " * 200}, row=7)))
    task = task_of(recipe(tmp_path, "data.on_overflow=drop"), lm_of(), splits)
    assert task.check_judged(splits.test, "test") == (rows(20, 3), 1)
    with pytest.raises(DataError, match="All 1 test rows are longer than the base's 128 positions"):
        task.check_judged(splits.test[-1:], "test")


def test_patience_ends_a_run_that_no_longer_gains(tmp_path: Path) -> None:
    seen: list[Event] = []
    settings = recipe(tmp_path / "p", "tune.patience=2", "tune.epochs=20", "tune.valid_every_steps=3")
    tune(settings, lm=(lm := lm_of()), loss=uphill(lm), splits=SPLITS, on_event=seen.append)
    stopped = [event for event in seen if isinstance(event, Stopped)]
    assert [(event.reason, event.step) for event in stopped] == [("patience", 6)]


def test_with_nothing_held_out_the_latest_prompt_is_kept_and_the_output_says_by_what_it_was_judged(
    tmp_path: Path,
) -> None:
    tuned = learn(tmp_path / "p", splits=Splits(SPLITS.train, (), (), "x"))
    assert tuned.judged_on == "training"
    assert tuned.best_step == tuned.steps == 9


def test_metrics_are_lines_of_plain_json_with_every_step(tmp_path: Path) -> None:
    learn(tmp_path / "p")
    lines = (tmp_path / "p" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines
    ]
    assert [event["step"] for event in events if event["event"] == Stepped.__name__] == list(range(1, 10))
    assert events[-1]["event"] == "Saved"


def test_a_run_that_is_started_again_forgets_the_figures_of_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        learn(tmp_path / "p", "tune.epochs=1")
    lines = (tmp_path / "p" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line)["event"] == "Started" for line in lines) == 1


def test_a_rate_can_be_found_and_its_cost_is_said(tmp_path: Path) -> None:
    """The range reaches from a tenth to ten times the automatic rate; on this base the highest learns most."""
    seen: list[Event] = []
    by_adamw = "tune.optimizer=adamw"
    settings = recipe(tmp_path / "p", "tune.learning_rate=find", "tune.epochs=10", by_adamw)
    tuned = tune(settings, lm=lm_of(), splits=SPLITS, on_event=seen.append)
    by_itself: list[Event] = []
    automatic = recipe(tmp_path / "q", "tune.learning_rate=auto", by_adamw)
    tune(automatic, lm=lm_of(), splits=SPLITS, on_event=by_itself.append)
    (measured,) = [event.learning_rate for event in by_itself if isinstance(event, Started)]
    (said,) = [event.text for event in seen if isinstance(event, Note) and "found in" in event.text]
    assert "found in 5 x 5 steps and" in said
    assert tuned.learning_rate == pytest.approx(10 * measured, rel=0.1)
    assert f"Learning rate {tuned.learning_rate:.2g}" in said


def test_a_found_rate_is_not_looked_for_again_when_a_run_goes_on(tmp_path: Path) -> None:
    settings = recipe(tmp_path / "p", "tune.learning_rate=find", "tune.checkpoint_steps=1")
    whole = tune(settings, lm=lm_of(), splits=SPLITS)
    seen: list[Event] = []
    again = tune(settings, lm=lm_of(), splits=SPLITS, on_event=seen.append, resume=True)
    assert not [event for event in seen if isinstance(event, Note) and "found in" in event.text]
    assert again.learning_rate == whole.learning_rate


def test_the_best_step_can_be_chosen_by_what_greedy_decoding_would_say(tmp_path: Path) -> None:
    """Teacher-forced exact match counts the rows that greedy generation answers exactly."""
    rows = tuple(
        Example({"text": " ".join(WORDS[n % 10 :][:3]), "label": "q" if n % 3 else "z"}, row=n)
        for n in range(12)
    )
    settings = (
        "tune.select=exact_match",
        "data.target=label",
        "data.template={text}{soft}{label}",
        "data.end=never",
    )
    lm = lm_of()
    seen: list[Event] = []
    tuned = tune(
        recipe(tmp_path / "p", *settings, "tune.epochs=12"),
        lm=lm,
        splits=Splits(rows, rows, (), "x"),
        on_event=seen.append,
    )
    scores = [event.score for event in seen if isinstance(event, Validated)]
    assert tuned.score_after == max(scores)
    assert tuned.score_after > tuned.score_before == scores[0]
    said = generate(lm, rows, tuned.prompt, DecodeSettings(max_new_tokens=1))
    right = [one.text == row.fields["label"] for one, row in zip(said, rows, strict=True)]
    assert sum(right) / len(right) == tuned.score_after


def test_the_automatic_rate_of_a_deep_prompt_follows_the_keys_and_values_of_the_base(tmp_path: Path) -> None:
    """An eighth of their root mean square, which transformers' cache gives too."""
    lm = lm_of()
    rate = make_plan(
        recipe(tmp_path, "prompt.kind=deep", "tune.learning_rate=auto"), lm=lm, splits=SPLITS
    ).learning_rate
    ids = torch.linspace(0, 319, 64).long()
    with torch.no_grad():
        cache = lm.model(ids[None], use_cache=True).past_key_values
    squares = [tensor.square().mean() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert rate == pytest.approx(0.25 * (sum(squares) / len(squares)).item() ** 0.5, rel=0.05)


def bowl(batch: Any, prompt: Any = None) -> torch.Tensor:
    """1 + the mean square of the prompt for every token: its floor is a prompt of zeros, and long steps leave it."""
    trained = int(batch.trained_BS[:, 1:].sum())
    if prompt is None:
        return torch.ones(trained)
    level: torch.Tensor = 1.0 + sum(tensor.square().mean() for tensor in prompt)
    return level.expand(trained)


@pytest.mark.parametrize("held_out", [True, False], ids=["with rows held out", "with none"])
def test_a_rate_that_makes_the_loss_rise_is_lowered_and_the_run_goes_back(
    tmp_path: Path, held_out: bool
) -> None:
    splits = SPLITS if held_out else Splits(SPLITS.train, (), (), "x")
    overrides = ("tune.learning_rate=9", "tune.epochs=8", "tune.valid_every_steps=4")
    seen: list[Event] = []
    tuned = tune(
        recipe(tmp_path / "p", *overrides), lm=lm_of(), splits=splits, loss=bowl, on_event=seen.append
    )
    lowered = [event.text for event in seen if isinstance(event, Note) and "lowered" in event.text]
    # Three training losses are seen before the first return: of the start, far outside, and back near it.
    assert lowered[0].startswith("Step 3: training loss")
    assert "Back to the prompt of step 0, learning rate lowered to 3." in lowered[0]
    assert tuned.learning_rate == pytest.approx(9 / 3 ** len(lowered))
    steps = {event.step: event.nll for event in seen if isinstance(event, Stepped)}
    assert steps[2] > 10 > steps[4] == steps[1]


def test_a_run_that_went_back_and_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    overrides = ("tune.learning_rate=9", "tune.epochs=4", "tune.checkpoint_steps=1")
    whole = learn(tmp_path / "whole", *overrides, loss=bowl)

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise SystemExit

    with pytest.raises(SystemExit):
        tune(recipe(tmp_path / "cut", *overrides), lm=lm_of(), splits=SPLITS, loss=bowl, on_event=kill)
    resumed = tune(recipe(tmp_path / "cut", *overrides), lm=lm_of(), splits=SPLITS, loss=bowl, resume=True)
    assert whole.learning_rate < 9
    assert resumed.learning_rate == whole.learning_rate
    assert torch.equal(vectors(resumed), vectors(whole))


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_the_automatic_rate_promises_at_most_the_whole_loss_in_the_first_step(
    tmp_path: Path, optimizer: str, kind: str
) -> None:
    """The promise is measured as a difference of losses along the step, not by the gradient that set the rate."""
    lm = lm_of()
    settings = recipe(
        tmp_path, f"prompt.kind={kind}", f"tune.optimizer={optimizer}", "tune.learning_rate=auto"
    )
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    rows = [plan.train.encoded[n] for n in epoch_order(plan.train.lengths, 4, seed=0, epoch=0)[0]]
    (level,) = Gradients(lm.token_nll, 4).losses([start(plan)()], [rows])

    def steep(batch: Any, prompt: Any = None) -> torch.Tensor:
        return 5.0 + 1e3 * (lm.token_nll(batch, prompt) - level)

    plan, gradients = make_plan(settings, lm=lm, splits=SPLITS, loss=steep), Gradients(steep, 4)
    rate = measured_rate(plan, gradients, start(plan)).rate
    assert rate < plan.learning_rate
    learner = Learner(start(plan), plan.recipe.tune.model_copy(update={"warmup": 0.0}), rate * 0.1, 100)
    before = learner.snapshot()
    (nll,) = gradients([learner.form], [rows])
    assert learner.step(nll)
    after, opposite = (
        learner.snapshot(),
        tuple(2 * b - a for a, b in zip(learner.snapshot(), before, strict=True)),
    )
    up, down = (gradients.losses([prompt], [rows])[0] for prompt in (opposite, after))
    assert (up - down) / 2 * 10 == pytest.approx(nll, rel=0.1)


@pytest.mark.parametrize("how", ["alone", "together"])
def test_the_gradient_that_measures_the_rate_is_the_first_steps(tmp_path: Path, how: str) -> None:
    """As many gradients as steps, and the step is the one that the same gradient, taken anew, leads to."""
    lm = lm_of()
    taken: list[int] = []

    def counted(batch: Any, prompt: Any = None) -> torch.Tensor:
        if prompt is not None and prompt[0].requires_grad:
            taken.append(len(batch.trained_BS))
        return lm.token_nll(batch, prompt)

    settings = recipe(tmp_path / how, "tune.learning_rate=auto", "tune.max_steps=1", "prompt.init=vocabulary")
    if how == "alone":
        result = tune(settings, lm=lm, splits=SPLITS, loss=counted)
    else:
        (result,) = tune_together([settings], lm=lm, splits=SPLITS, loss=counted)
    assert taken == [4]

    plan = make_plan(settings, lm=lm, splits=SPLITS)
    rows = [plan.train.encoded[n] for n in epoch_order(plan.train.lengths, 4, seed=0, epoch=0)[0]]
    learner = Learner(start(plan), plan.recipe.tune, result.learning_rate, 1)
    (nll,) = Gradients(lm.token_nll, 4)([learner.form], [rows])
    learner.length.highest_rate = plan.learning_rate
    assert learner.step(nll)
    assert torch.equal(vectors(result), learner.snapshot()[0])


@pytest.mark.parametrize("init", ["vocabulary", "scaled"])
def test_an_automatic_rate_is_never_above_its_share_of_the_starts_scale(tmp_path: Path, init: str) -> None:
    lm = lm_of()
    flat: Loss = lambda batch, prompt=None: 1.0 + 1e-4 * lm.token_nll(batch, prompt)  # noqa: E731
    settings = recipe(tmp_path, "tune.learning_rate=auto", f"prompt.init={init}")
    plan = make_plan(settings, lm=lm, splits=SPLITS, loss=flat)
    rms = lm.embedding_VD[: min(5000, lm.vocab_size)].float().square().mean().sqrt().item()
    if init == "scaled":
        entering, leaving = first_layer_sizes(lm)
        rms *= 0.5 * leaving / entering
    assert measured_rate(plan, Gradients(flat, 4), start(plan)).rate == pytest.approx(3.0 * rms, rel=0.05)


def valley(centre: torch.Tensor, width: float, floor: float) -> Loss:
    """`floor` + the mean of ((the prompt - `centre`) / `width`) squared, for every token."""

    def loss(batch: Any, prompt: Any = None) -> torch.Tensor:
        trained = int(batch.trained_BS[:, 1:].sum())
        if prompt is None:
            return torch.ones(trained)
        level: torch.Tensor = floor + ((prompt[0] - centre) / width).square().mean()
        return level.expand(trained)

    return loss


@pytest.mark.parametrize(
    ("floor", "widths", "share"),
    # By hand: the loss is floor + (1 - x)^2 after a step of x widths, so the start promises (floor + 1) / 2 widths. A step
    # is kept up to the x with 2x - x^2 = half of (x - x^2 / 4), which is 12 / 7.
    [(1.0, 1.0, 1.0), (2.4, 1.7, 1.0), (2.6, 0.9, 0.5), (19.0, 1.25, 0.125)],
)
def test_a_step_that_other_rows_do_not_confirm_is_halved_until_they_do(
    tmp_path: Path, floor: float, widths: float, share: float
) -> None:
    lm = lm_of()
    settings = recipe(tmp_path, "tune.optimizer=adamw", "tune.learning_rate=auto", "tune.clip=1e9")
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    width = plan.learning_rate / 20  # so that the bound is not what decides
    before = start(plan)()[0].detach()
    loss = valley(before - width, width, floor)
    measured = measured_rate(plan, Gradients(loss, 4), start(plan))
    assert measured.rate == pytest.approx(widths * width, rel=0.05)
    assert measured.reachable_nll == pytest.approx((1 - share) * (floor + 1), rel=1e-3)


def test_a_form_says_how_far_below_the_first_steps_rate_later_ones_may_go(tmp_path: Path) -> None:
    plan = make_plan(recipe(tmp_path, "tune.learning_rate=auto"), lm=lm_of(), splits=SPLITS)
    form = start(plan)
    loss = valley(form()[0].detach() - plan.learning_rate / 20, plan.learning_rate / 20, 1.0)
    whole = measured_rate(plan, Gradients(loss, 4), form)
    assert whole.lowest == whole.rate
    form.lowest_share = 0.5
    half = measured_rate(plan, Gradients(loss, 4), form)
    assert half.lowest == pytest.approx(whole.rate / 2, rel=0.05)  # two digits are kept
    assert (half.rate, half.reachable_nll) == (whole.rate, whole.reachable_nll)


def test_where_no_step_helps_other_rows_the_promise_of_the_first_ones_counts(tmp_path: Path) -> None:
    """The second batch's loss rises along the step of the first, whatever the rate."""
    settings = recipe(tmp_path, "tune.optimizer=adamw", "tune.learning_rate=auto", "tune.clip=1e9")
    plan = make_plan(settings, lm=lm_of(), splits=SPLITS)
    before = start(plan)()[0].detach()
    calls: list[int] = []

    def split(batch: Any, prompt: Any = None) -> torch.Tensor:
        calls.append(0)
        sign = 1.0 if len(calls) == 1 else -1.0
        trained = int(batch.trained_BS[:, 1:].sum())
        return (1.0 + sign * 1e3 * (prompt[0] - before).sum()).expand(trained)

    measured = measured_rate(plan, Gradients(split, 100), start(plan))
    # By hand: AdamW's first step moves every number by the rate, down a slope of 1e3 each.
    assert measured.rate == pytest.approx(1.0 / (1e3 * before.numel()), rel=0.05)
    assert measured.reachable_nll == 0.0


def test_steps_promise_no_more_than_what_is_above_the_reachable_loss(tmp_path: Path) -> None:
    """By hand: AdamW's first step moves each of 32 numbers by the rate, along a gradient of 1 each: 32 nats per unit of rate."""
    overrides = ("tune.optimizer=adamw", "tune.schedule=constant", "tune.warmup=0", "tune.clip=1e9")
    for reachable, nll, rate in ((0.0, 3.2, 0.1), (2.4, 3.2, 0.025), (2.4, 2.0, 0.01)):
        form = Direct((torch.zeros(4, 8),))
        learner = Learner(form, recipe(tmp_path, *overrides).tune, 0.01, 100)
        learner.length.highest_rate, learner.length.reachable_nll = 0.5, reachable
        form.value_PW.grad = torch.ones(4, 8)
        assert learner.step(nll)
        assert learner.rate_taken == pytest.approx(rate, rel=1e-4)


def slope_of(values: torch.Tensor, before: torch.Tensor, gradient: torch.Tensor) -> float:
    return -float(((values - before).double() * gradient.double()).sum())


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize(
    ("nll", "rate"),
    [(1e-6, 0.02), (1e6, 0.5), (None, 0.2)],
    ids=["a small loss: the lowest", "a large one: the highest", "between: the whole loss"],
)
def test_a_measured_step_promises_its_whole_loss_between_two_rates(
    tmp_path: Path, optimizer: str, nll: float | None, rate: float
) -> None:
    """Against a plain step at the rate that is wanted: torch's optimiser at 0.02, 0.5, or where the promise is the loss."""
    settings = recipe(tmp_path, f"tune.optimizer={optimizer}", "tune.schedule=constant", "tune.warmup=0").tune

    def learner(learning_rate: float) -> tuple[Learner, torch.Tensor]:
        form = Direct((torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),))
        form.value_PW.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        return Learner(form, settings, learning_rate, 100), form.value_PW

    plain, expected = learner(rate)
    before, gradient = expected.detach().clone(), expected.grad.clone()  # type: ignore[union-attr]
    assert plain.step()
    # The promise of the plain step is by hand: the unclipped gradient times the way taken.
    promised = slope_of(expected.detach(), before, gradient)
    measured, values = learner(0.02)
    measured.length.highest_rate = 0.5
    assert measured.step(promised if nll is None else nll)
    assert measured.rate_taken == pytest.approx(rate, rel=1e-3)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_a_step_whose_momentum_points_uphill_takes_the_lowest_rate(tmp_path: Path) -> None:
    settings = recipe(tmp_path, "tune.schedule=constant", "tune.warmup=0").tune
    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, settings, 0.02, 100)
    learner.length.highest_rate = 0.5
    way = torch.ones(4, 8)
    for scale in (1.0, 1.0, 1.0, -1e-3):  # three batches agree, and the fourth faintly disagrees
        form.value_PW.grad = scale * way
        assert learner.step(10.0)
    assert learner.rate_taken == pytest.approx(0.02)


def learner_of_batches(folder: Path, losses: Sequence[float], reachable: float = 0.0) -> Learner:
    """One that may take rates from 0.02 to 0.5, after batches of these losses."""
    settings = recipe(folder, "tune.schedule=constant", "tune.warmup=0").tune
    learner = Learner(Direct((torch.zeros(4, 8),)), settings, 0.02, 100)
    learner.length.highest_rate, learner.length.reachable_nll = 0.5, reachable
    for nll in losses:
        rate_after(learner, nll, 1.0)
    return learner


def rate_after(learner: Learner, nll: float, gradient: float) -> float:
    learner.parameters[0].grad = torch.full((4, 8), gradient)
    assert learner.step(nll)
    return learner.rate_taken


@pytest.mark.parametrize(
    ("nll", "reachable", "rate"),
    # Batches have had 1 nat left to fall, above what can be reached. A faint slope asks for the highest rate, of any batch.
    [(0.25, 0.0, 0.5), (0.15, 0.0, 0.02), (2.65, 2.4, 0.5), (2.55, 2.4, 0.02)],
)
def test_a_batch_that_is_learned_already_takes_the_lowest_rate(
    tmp_path: Path, nll: float, reachable: float, rate: float
) -> None:
    learner = learner_of_batches(tmp_path, [1.0 + reachable] * 3, reachable)
    assert rate_after(learner, nll, 1e-6) == pytest.approx(rate)


def test_what_batches_have_left_is_known_after_a_kill_and_forgotten_after_a_return(tmp_path: Path) -> None:
    killed = learner_of_batches(tmp_path, [1.0] * 3)
    again = learner_of_batches(tmp_path, [])
    again.restore(killed.state())
    assert rate_after(again, 0.01, 1e-6) == pytest.approx(0.02)
    killed.go_back()
    assert rate_after(killed, 0.01, 1e-6) > 0.02


def test_after_a_loss_that_rose_no_step_takes_more_than_a_third_of_the_rates_that_led_there(
    tmp_path: Path,
) -> None:
    """A faint gradient and a large loss ask for the highest rate; the run that went back has learned not to give it."""
    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, recipe(tmp_path, "tune.schedule=constant", "tune.warmup=0").tune, 0.03, 100)
    learner.length.highest_rate = 0.5
    rates = []
    for _ in range(2):
        form.value_PW.grad = torch.full((4, 8), 1e-3)
        assert learner.step(10.0)
        rates.append(learner.rate_taken)
        learner.go_back()
    assert rates == pytest.approx([0.5, 0.5 / 3])
    # After steps that took the lowest rate, 0.03 / 3 / 3 by now, that is lowered too.
    form.value_PW.grad = torch.full((4, 8), 1e3)
    assert learner.step(1e-3)
    assert learner.rate_taken == pytest.approx(0.03 / 9)
    learner.go_back()
    assert learner.length.highest_rate == learner.length.learning_rate == pytest.approx(0.03 / 27)


def test_after_a_return_the_highest_rate_doubles_in_a_tenth_of_the_steps_up_to_what_it_was(
    tmp_path: Path,
) -> None:
    def steps(count: int) -> float:
        for _ in range(count):
            form.value_PW.grad = torch.full((4, 8), 1e-3)
            assert learner.step(10.0)
        return learner.rate_taken

    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, recipe(tmp_path, "tune.schedule=constant", "tune.warmup=0").tune, 0.03, 100)
    learner.length.highest_rate = 0.5
    steps(1)
    learner.go_back()
    assert [steps(1), steps(10), steps(40)] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    learner.go_back()  # slower than after the first
    assert [steps(1), steps(10), steps(10)] == pytest.approx([0.5 / 3, 0.5 / 3 * 2**0.5, 1.0 / 3])
    for _ in range(2):  # the last of four: nothing would catch a rate that rises too far after it
        learner.go_back()
    lowest = steps(1)
    assert steps(20) == lowest


def test_a_run_that_was_killed_after_a_return_takes_the_same_rates(tmp_path: Path) -> None:
    def made() -> Learner:
        settings = recipe(tmp_path, "tune.schedule=constant", "tune.warmup=0").tune
        learner = Learner(Direct((torch.zeros(4, 8),)), settings, 0.03, 100)
        learner.length.highest_rate = 0.5
        return learner

    def rates(learner: Learner, steps: int) -> list[float]:
        taken = []
        for _ in range(steps):
            learner.parameters[0].grad = torch.full((4, 8), 1e-3)
            assert learner.step(10.0)
            taken.append(learner.rate_taken)
        return taken

    whole, again = made(), made()
    rates(whole, 1)
    whole.go_back()
    rates(whole, 3)
    again.restore(whole.state())
    expected = rates(whole, 5)
    assert expected[-1] > expected[0]
    assert rates(again, 5) == expected


def test_a_rate_that_was_given_stays_a_third_after_a_return(tmp_path: Path) -> None:
    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, recipe(tmp_path, "tune.schedule=constant", "tune.warmup=0").tune, 0.3, 100)
    learner.go_back()
    for _ in range(20):
        form.value_PW.grad = torch.full((4, 8), 1e-3)
        assert learner.step(10.0)
    assert learner.rate_taken == pytest.approx(0.1)


@pytest.mark.parametrize("gradient", [0.0, 1e-3, 1e3])
def test_a_gradient_of_any_size_takes_a_measured_step(tmp_path: Path, gradient: float) -> None:
    """Zero among them: no division by its norm."""
    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, recipe(tmp_path, "tune.clip=1").tune, 0.02, 100)
    learner.length.highest_rate = 0.5
    form.value_PW.grad = torch.full((4, 8), gradient)
    assert learner.step(1.0)
    assert 0.02 * 0.9 <= learner.rate_taken <= 0.5


@pytest.mark.parametrize(
    ("widths", "factor"),
    # By hand: after f steps of x widths the other rows' loss is (1 - f x)^2, so that they fall by 2 f x - (f x)^2. Doubled
    # pays up to 4x - 4x^2 = 1.5 (2x - x^2), x = 0.4; a step is too long from 2x - x^2 = (x - x^2 / 4) / 2, x = 12 / 7, and
    # half of it helps up to x = 4. Where the loss rises beyond 1.1 + 0.25 and half of the step does not help, a quarter is taken.
    [(0.3, 2.0), (0.5, 1.0), (1.6, 1.0), (1.8, 0.5), (3.9, 0.5), (4.1, 0.25), (-0.15, 1.0), (-0.17, 0.25)],
)
def test_a_step_is_doubled_or_halved_where_other_rows_say_so(
    tmp_path: Path, widths: float, factor: float
) -> None:
    learner = tried_learner(tmp_path)
    try_last_step(learner, lambda prompt: (1.0 + float(prompt[0][0, 0]) / 0.25 * widths) ** 2, 0.125)
    assert learner.rate_taken == learner.length.learning_rate == 0.25 * factor
    # AdamW's first step moves every number by the rate, against the gradient.
    torch.testing.assert_close(learner.snapshot()[0], torch.full((4, 8), -0.25 * factor))


def test_a_step_that_breaks_the_loss_of_other_rows_is_halved(tmp_path: Path) -> None:
    learner = tried_learner(tmp_path)
    try_last_step(learner, lambda prompt: broken_beyond(0.2, prompt), 0.125)
    assert learner.length.learning_rate == 0.125


@pytest.mark.parametrize(("widths", "factor"), [(1.8, 1.0), (2.15, 1.0), (2.17, 0.5)])
def test_a_rate_that_was_not_doubled_is_only_halved_for_a_clear_rise(
    tmp_path: Path, widths: float, factor: float
) -> None:
    """By hand: (1 - x)^2 is above 1.35 from x = 2.162 on."""
    learner = tried_learner(tmp_path)
    try_last_step(learner, lambda prompt: (1.0 + float(prompt[0][0, 0]) / 0.25 * widths) ** 2, 0.25)
    assert learner.length.learning_rate == 0.25 * factor


def broken_beyond(distance: float, prompt: Plain) -> float:
    """A loss that falls along the step, and is not finite beyond a distance."""
    return math.nan if float(prompt[0][0, 0]) < -distance else 1.0 + float(prompt[0].mean())


def tried_learner(folder: Path) -> Learner:
    """One that has moved each of its numbers from 0 to -0.25, in a step that is tried."""
    overrides = ("tune.optimizer=adamw", "tune.schedule=constant", "tune.warmup=0", "tune.clip=1e9")
    form = Direct((torch.zeros(4, 8),))
    learner = Learner(form, recipe(folder, *overrides).tune, 0.25, 100)
    learner.length.tried_steps = (1,)
    form.value_PW.grad = torch.ones(4, 8)
    assert learner.step(1.0)
    assert learner.is_tried
    return learner


def test_the_first_steps_after_a_return_are_tried_again(tmp_path: Path) -> None:
    learner = tried_learner(tmp_path)
    for _ in range(2):
        learner.go_back()
        for is_tried in (True, False):
            learner.parameters[0].grad = torch.ones(4, 8)
            assert learner.step(1.0)
            assert learner.is_tried is is_tried
    learner.go_back()
    again = Learner(Direct((torch.zeros(4, 8),)), learner.settings, 0.25, 100)
    again.length.tried_steps = learner.length.tried_steps
    again.restore(learner.state())
    again.parameters[0].grad = torch.ones(4, 8)
    assert again.step(1.0)
    assert again.is_tried


@pytest.mark.parametrize(("setting", "factors"), [("auto", (1, 2, 2, 4, 4, 4)), ("0.01", (1,) * 6)])
def test_the_second_and_fourth_step_of_an_automatic_run_are_tried(
    tmp_path: Path, setting: str, factors: tuple[int, ...]
) -> None:
    """Far from the valley's centre a step of twice the length always takes nearly twice as much away."""
    overrides = ("tune.optimizer=adamw", "tune.schedule=constant", "tune.warmup=0", "tune.clip=1e9")
    settings = recipe(
        tmp_path, *overrides, f"tune.learning_rate={setting}", "tune.max_steps=6", "tune.epochs=99"
    )
    lm = lm_of()
    plan = make_plan(settings, lm=lm, splits=SPLITS)
    far = valley(start(plan)()[0].detach() - 1e3, 1e3, 0.0)
    rates: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Stepped):
            rates.append(event.learning_rate)

    tune(settings, lm=lm, splits=SPLITS, loss=far, on_event=note)
    assert rates == pytest.approx([factor * rates[0] for factor in factors])


def test_an_automatic_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The measured steps go on between the same two rates."""
    lm = lm_of()
    steep: Loss = lambda batch, prompt=None: lm.token_nll(batch, prompt) - 5.2  # noqa: E731
    overrides = ("tune.learning_rate=auto", "tune.epochs=4", "tune.checkpoint_steps=1")
    rates: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Stepped):
            rates.append(event.learning_rate)

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise SystemExit

    whole = tune(recipe(tmp_path / "whole", *overrides), lm=lm, splits=SPLITS, loss=steep, on_event=note)
    assert len({round(rate / (1 - step / len(rates)), 6) for step, rate in enumerate(rates)}) > 2
    with pytest.raises(SystemExit):
        tune(recipe(tmp_path / "cut", *overrides), lm=lm, splits=SPLITS, loss=steep, on_event=kill)
    again = recipe(tmp_path / "cut", *overrides)
    resumed = tune(again, lm=lm, splits=SPLITS, loss=steep, resume=True)
    assert torch.equal(vectors(resumed), vectors(whole))


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_base_with_embeddings_eight_times_as_large_and_the_same_function_learns_as_well(
    tmp_path: Path, kind: str
) -> None:
    """The residual stream of a Llama times 8: RMSNorm divides by its size, so every loss is what it was, and the rate of
    vectors must be 8 times as high for the same run. Keys and values are behind the norm: theirs stays."""
    base, large = lm_of(), FrozenLM.wrap(times_eight(tiny_model("Llama")), tiny_tokenizer(), name="large")
    ran = [
        learn(tmp_path / name, f"prompt.kind={kind}", "tune.learning_rate=auto", "tune.epochs=1", lm=lm)
        for name, lm in (("base", base), ("large", large))
    ]
    assert ran[1].learning_rate == pytest.approx(
        (8 if kind == "soft" else 1) * ran[0].learning_rate, rel=0.05
    )
    assert ran[1].nll_before == pytest.approx(ran[0].nll_before, rel=1e-3)
    assert ran[1].nll_after == pytest.approx(ran[0].nll_after, rel=0.01)


def times_eight(model: Any) -> Any:
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(8)
            layer.mlp.down_proj.weight.mul_(8)
        for norm in [m for m in model.modules() if hasattr(m, "variance_epsilon")]:
            norm.variance_epsilon *= 64
        if model.config.tie_word_embeddings:
            model.model.norm.weight.div_(8)
    return model


def test_a_prompt_that_is_worse_than_the_base_alone_is_said_to_be(tmp_path: Path) -> None:
    """The bowl's loss is 1 for the base alone, and above 1 for any prompt but zeros."""
    seen: list[Event] = []
    tune(recipe(tmp_path / "p"), lm=lm_of(), splits=SPLITS, loss=bowl, on_event=seen.append)
    assert any(isinstance(event, Note) and event.text.startswith("Worse than the base") for event in seen)
    better: list[Event] = []
    tune(recipe(tmp_path / "q"), lm=lm_of(), splits=SPLITS, on_event=better.append)
    assert not any(isinstance(event, Note) and event.text.startswith("Worse") for event in better)


def test_many_rows_are_read_at_once_and_as_before_where_memory_runs_out(tmp_path: Path) -> None:
    lm = lm_of()
    plan = make_plan(recipe(tmp_path / "p"), lm=lm, splits=SPLITS)
    prompt, rows = start(plan)(), plan.train.encoded
    wanted = Gradients(lm.token_nll, 4).losses([prompt], [rows])
    read: list[int] = []

    def loss(batch: Batch, plain: Plain | None = None) -> torch.Tensor:
        read.append(len(batch.ids_BS))
        if len(batch.ids_BS) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return lm.token_nll(batch, plain)

    longest = max(map(len, rows))
    assert Gradients(loss, 4, read_positions=16 * longest).losses([prompt], [rows]) == pytest.approx(wanted)
    assert read == [12, 8, 4]  # the 12 rows at once, then at most 8


def test_a_step_does_not_read_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million rows that would take longer than the step."""
    times = [0]
    whole = EncodedRows.__iter__

    def counted(self: EncodedRows) -> Iterator[Encoded]:
        times[0] += 1
        return whole(self)

    monkeypatch.setattr(EncodedRows, "__iter__", counted)
    read = []
    for steps in (2, 12):
        times[0] = 0
        learn(
            tmp_path / str(steps), f"tune.max_steps={steps}", "tune.epochs=9", "tune.valid_every_steps=1000"
        )
        read.append(times[0])
    assert read[0] == read[1]
