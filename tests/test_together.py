"""Prompts learned side by side become what each would have become alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kill_nine import needs_fork, runs_killed_and_undisturbed
from softprompt.cli.app import main
from softprompt.errors import NotFinite, RecipeError
from softprompt.loss.fast import FastLoss
from softprompt.loss.gradient import Gradients, Loss
from softprompt.progress.console import Screen
from softprompt.progress.events import BatchHalved, Event, Note, Saved, Started, Stepped
from softprompt.progress.runs import ShowTable
from softprompt.store.artifact import load_prompt
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.result import TuneResult
from softprompt.tuning.together import Together, tune_tasks, tune_together
from test_checkpoint import contents
from test_learn import SPLITS, failing_above, learn, lm_of, recipe, vectors
from tiny_models import tiny_model, tiny_tokenizer

UNLIKE = {
    "rate": ("tune.learning_rate=0.05",),
    "seed": ("tune.seed=3",),
    "start": ("prompt.init=random",),
    "length": ("prompt.length=7",),
    "optimiser": ("tune.optimizer=adafactor",),
    "batch": ("tune.batch_size=3",),
    "epochs": ("tune.epochs=1",),
    "clip": ("tune.clip=0.01",),
    "form": ("prompt.form=low_rank",),
    "schedule": ("tune.schedule=constant", "tune.warmup=0"),
}


def side_by_side(folder: Path, runs: dict[str, tuple[str, ...]], lm: Any = None) -> dict[str, TuneResult]:
    recipes = [recipe(folder / name, *overrides) for name, overrides in runs.items()]
    return dict(zip(runs, tune_together(recipes, lm=lm or lm_of(), splits=SPLITS), strict=True))


def test_ten_unlike_runs_give_the_prompts_of_ten_runs_alone(tmp_path: Path) -> None:
    together = side_by_side(tmp_path / "together", UNLIKE)
    for name, overrides in UNLIKE.items():
        alone = learn(tmp_path / name, *overrides)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)
        for figure in ("steps", "best_step", "tokens"):
            assert getattr(together[name], figure) == getattr(alone, figure)
        assert together[name].nll_after == pytest.approx(alone.nll_after, abs=1e-4)


def test_automatic_rates_are_tried_again_side_by_side_as_alone(tmp_path: Path) -> None:
    lm = lm_of()
    # A loss that is nearly taken away already: the first step is short, so that twice of it still gains.
    steep: Loss = lambda batch, prompt=None: lm.token_nll(batch, prompt) - 5.65  # noqa: E731
    runs = {"first": ("tune.learning_rate=auto",), "second": ("tune.learning_rate=auto", "tune.seed=3")}
    recipes = [recipe(tmp_path / "together" / name, *overrides) for name, overrides in runs.items()]
    together = dict(zip(runs, tune_together(recipes, lm=lm, splits=SPLITS, loss=steep), strict=True))
    for name, overrides in runs.items():
        events: list[Event] = []
        one = recipe(tmp_path / name, *overrides)
        alone = tune(one, lm=lm, splits=SPLITS, loss=steep, on_event=events.append)
        (started,) = [event for event in events if isinstance(event, Started)]
        assert alone.learning_rate >= 2 * started.learning_rate  # doubled, or the run would show nothing
        assert together[name].learning_rate == pytest.approx(alone.learning_rate)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-3, rtol=1e-2)


def test_the_base_alone_is_measured_once_for_runs_that_are_judged_on_the_same_rows(tmp_path: Path) -> None:
    lm = lm_of()
    rows_read = 0

    def counted(batch: Any, prompt: Any = None) -> torch.Tensor:
        nonlocal rows_read
        rows_read += len(batch.ids_BS) if prompt is None else 0
        return lm.token_nll(batch, prompt)

    same = [recipe(tmp_path / f"{rate}", f"tune.learning_rate={rate}") for rate in (0.01, 0.02, 0.03)]
    others = recipe(tmp_path / "others", "data.max_length=12", "data.on_overflow=truncate")
    together = tune_together([*same, others], lm=lm, splits=SPLITS, loss=counted)
    assert rows_read == 2 * len(SPLITS.validation)
    for name, tuned in zip(("alone", "alone cut"), (together[0], together[3]), strict=True):
        overrides = ["data.max_length=12", "data.on_overflow=truncate"] if tuned is together[3] else []
        alone = tune(recipe(tmp_path / name, *overrides), lm=lm, splits=SPLITS)
        assert tuned.nll_base == pytest.approx(alone.nll_base, rel=1e-6)
    assert together[0].nll_base == together[1].nll_base == together[2].nll_base != together[3].nll_base


@pytest.mark.parametrize("architecture", ["GPT-2", "BLOOM (ALiBi)", "Mixtral (experts)"])
def test_neighbours_do_not_matter_on_other_architectures_either(tmp_path: Path, architecture: str) -> None:
    lm = lm_of(architecture)
    runs = {"a": ("tune.seed=1",), "b": ("tune.learning_rate=0.02",)}
    together = side_by_side(tmp_path / "together", runs, lm)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides, lm=lm)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_deep_prompts_side_by_side_with_soft_ones(tmp_path: Path) -> None:
    runs = {"deep": ("prompt.kind=deep",), "soft": ()}
    together = side_by_side(tmp_path / "together", runs)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides)
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_the_base_is_passed_once_a_step_however_many_prompts_there_are(tmp_path: Path) -> None:
    lm = lm_of()
    token_nll, rows = FastLoss(lm), []

    def counted(batch: Any, prompt: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            rows.append(len(batch.ids_BS))
        return token_nll(batch, prompt)

    tune_together(
        [recipe(tmp_path / str(seed), f"tune.seed={seed}", "tune.epochs=1") for seed in range(5)],
        lm=lm,
        splits=SPLITS,
        loss=counted,
    )
    assert rows == [20, 20, 20]


def test_a_batch_that_does_not_fit_is_told_to_every_run(tmp_path: Path) -> None:
    """Two batches of 4 rows: as 8 and as 4 they do not fit, as 2 they do."""
    lm = lm_of()
    loss = failing_above(lm, 2, torch.OutOfMemoryError("out of memory"))
    seen: list[tuple[int, Event]] = []
    tuned = tune_together(
        [recipe(tmp_path / name, "tune.epochs=1") for name in "ab"],
        lm=lm,
        splits=SPLITS,
        loss=loss,
        on_event=lambda run, event: seen.append((run, event)),
    )
    for number, one in enumerate(tuned):
        told = [event for run, event in seen if run == number and isinstance(event, BatchHalved)]
        assert told == [BatchHalved(4, 2), BatchHalved(2, 4)]
        assert (Path(one.path) / "metrics.jsonl").read_text().count('"event": "BatchHalved"') == 2
        assert one.accumulation == 2  # of its own 4 rows


def test_one_run_that_breaks_does_not_break_the_others(tmp_path: Path) -> None:
    """Its start is made infinite; what the other learns is what it learns alone."""
    together = Together([recipe(tmp_path / name) for name in "ab"], lm=lm_of(), splits=SPLITS)
    with torch.no_grad():
        next(iter(together.runs[0].learner.parameters)).fill_(math.inf)
    together.advance()
    found = together.save()
    assert list(found) == [1]
    assert isinstance(together.failed[0], NotFinite)
    alone = learn(tmp_path / "alone")
    torch.testing.assert_close(vectors(found[1]), vectors(alone), atol=2e-4, rtol=1e-3)


def test_a_run_that_is_dropped_leaves_its_best_prompt_and_the_others_go_on(tmp_path: Path) -> None:
    together = Together([recipe(tmp_path / name) for name in "ab"], lm=lm_of(), splits=SPLITS)
    together.advance(1 / 3)
    assert [run.steps_done for run in together.runs] == [3, 3]
    together.drop(0)
    together.advance()
    assert [run.steps_done for run in together.runs] == [3, 9]
    together.save()
    assert load_prompt(tmp_path / "a").notes["metrics"]["stopped"] == "dropped"
    torch.testing.assert_close(
        load_prompt(tmp_path / "b").tensors["embeddings_PD"],
        vectors(learn(tmp_path / "alone")),
        atol=2e-4,
        rtol=1e-3,
    )


def test_runs_on_two_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"base: found builtin and other, .* share one base"):
        tune_together([recipe(tmp_path / "a"), recipe(tmp_path / "b", "base=other")], lm=lm_of())
    with pytest.raises(RecipeError, match=r"tune\.int8_products: found False and True, .* share one base"):
        tune_together([recipe(tmp_path / "a"), recipe(tmp_path / "b", "tune.int8_products=true")], lm=lm_of())
    other = recipe(tmp_path / "b", "tune.context_cache_gigabytes=0.5")
    with pytest.raises(RecipeError, match=r"tune\.context_cache_gigabytes: found 1\.0 and 0\.5"):
        tune_together([recipe(tmp_path / "a"), other], lm=lm_of())


def test_two_runs_with_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"out: two recipes write to .*b/\.\./a"):
        tune_together([recipe(tmp_path / "a"), recipe(tmp_path / "b" / ".." / "a")], lm=lm_of())


def test_a_run_that_breaks_on_its_way_leaves_its_best_prompt(tmp_path: Path) -> None:
    """As its message says."""
    together = Together(
        [recipe(tmp_path / name, "tune.valid_every_steps=1") for name in "ab"], lm=lm_of(), splits=SPLITS
    )
    together.advance(1 / 3)
    with torch.no_grad():
        next(iter(together.runs[0].learner.parameters)).fill_(math.inf)
    together.advance()
    together.save()
    assert f"the prompt of step 3 is in {tmp_path / 'a'}" in str(together.failed[0])
    metrics = [load_prompt(tmp_path / name).notes["metrics"] for name in "ab"]
    assert [one["stopped"] for one in metrics] == ["failed", "finished"]
    assert metrics[0]["best_step"] == 3


def test_ctrl_c_keeps_the_best_of_every_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune_together(
            [recipe(tmp_path / name) for name in "ab"],
            lm=lm_of(),
            splits=SPLITS,
            on_event=raising(KeyboardInterrupt, 1, 5),
        )
    for name in "ab":
        assert load_prompt(tmp_path / name).notes["metrics"]["stopped"] == "interrupted"


def test_each_task_may_have_rows_of_its_own(tmp_path: Path) -> None:
    """Two files, one base: what comes out is what each file gives alone."""
    runs = {}
    for name, rows in (("a", SPLITS.train), ("b", SPLITS.validation + SPLITS.train[:3])):
        data = tmp_path / f"{name}.csv"
        data.write_text("text\n" + "\n".join(row.fields["text"] for row in rows) + "\n", encoding="utf-8")
        runs[name] = (f"data.source={data}", "data.column=text", "data.validation=3")
    lm = lm_of()
    recipes = [recipe(tmp_path / name, *overrides) for name, overrides in runs.items()]
    for one, (name, overrides) in zip(tune_together(recipes, lm=lm), runs.items(), strict=True):
        alone = tune(recipe(tmp_path / "alone" / name, *overrides), lm=lm)
        torch.testing.assert_close(vectors(one), vectors(alone), atol=2e-4, rtol=1e-3)


def test_prompts_behind_a_text_that_is_read_once_become_the_same(tmp_path: Path) -> None:
    """Text before the slot is kept as keys and values; neighbours and that cache change nothing."""
    template = ("data.template={text} so {soft}{text}",)
    runs = {"a": template, "b": (*template, "prompt.length=6", "tune.seed=4")}
    together = side_by_side(tmp_path / "together", runs)
    for name, overrides in runs.items():
        alone = learn(tmp_path / name, *overrides, "tune.context_cache_gigabytes=0")
        torch.testing.assert_close(vectors(together[name]), vectors(alone), atol=2e-4, rtol=1e-3)


# --- killed ------------------------------------------------------------------------------------------------------


def raising(error: type[BaseException], run: int, step: int) -> Callable[[int, Event], None]:
    """Take `on_event`, and raise as soon as a run has done a step."""

    def on_event(number: int, event: Event) -> None:
        if number == run and isinstance(event, Stepped) and event.step == step:
            raise error

    return on_event


def steps_recorded(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "Stepped"]


def test_runs_that_were_killed_go_on_each_from_its_own_step(tmp_path: Path) -> None:
    def together(folder: Path, **options: Any) -> list[TuneResult]:
        runs = {
            "often": ("tune.checkpoint_steps=2", "tune.epochs=4"),
            "rarely": ("tune.checkpoint_steps=5", "tune.epochs=4", "tune.seed=1"),
            "short": ("tune.checkpoint_steps=2", "tune.epochs=1", "tune.seed=2"),
            "never": ("tune.epochs=4", "tune.seed=3"),
        }
        recipes = [recipe(folder / name, *overrides) for name, overrides in runs.items()]
        return tune_together(recipes, lm=lm_of(), splits=SPLITS, **options)

    whole = together(tmp_path / "whole")
    with pytest.raises(SystemExit):
        together(tmp_path / "cut", on_event=raising(SystemExit, 1, 9))
    seen: dict[int, list[int]] = {}

    def note(number: int, event: Event) -> None:
        if isinstance(event, Stepped):
            seen.setdefault(number, []).append(event.step)

    resumed = together(tmp_path / "cut", resume=True, on_event=note)
    assert seen == {0: [9, 10, 11, 12], 1: list(range(6, 13)), 3: list(range(1, 13))}
    for one, other in zip(whole, resumed, strict=True):
        torch.testing.assert_close(vectors(one), vectors(other), atol=2e-4, rtol=1e-3)
        for figure in ("steps", "best_step", "tokens"):
            assert getattr(one, figure) == getattr(other, figure)
        assert steps_recorded(Path(other.path)) == list(range(1, other.steps + 1))


def test_one_checkpoint_of_another_run_leaves_the_files_of_all_runs_as_they_were(tmp_path: Path) -> None:
    runs = [recipe(tmp_path / name, "tune.checkpoint_steps=2") for name in "abc"]
    with pytest.raises(SystemExit):
        tune_together(runs[:2], lm=lm_of(), splits=SPLITS, on_event=raising(SystemExit, 0, 6))
    before = contents(tmp_path)
    other = [runs[0], runs[1].changed(["tune.clip=0.5"]), runs[2]]
    with pytest.raises(RecipeError, match=r"b: .*: tune\.clip was 1\.0, is 0\.5"):
        tune_together(other, lm=lm_of(), splits=SPLITS, resume=True)
    assert contents(tmp_path) == before


def tasks(folder: Path, *overrides: str, own: Sequence[tuple[str, ...]] = ((), ())) -> list[Recipe]:
    """Recipes of tasks that share a part, each with rows of its own."""
    folder.mkdir(exist_ok=True)
    rows = [row.fields["text"] for row in (*SPLITS.train, *SPLITS.validation)]
    recipes = []
    for number, mine in enumerate(own):
        data = folder / f"{number}.csv"
        data.write_text("text\n" + "\n".join(rows[number:]) + "\n", encoding="utf-8")
        settings = [f"data.source={data}", "data.column=text", "data.validation=4", "prompt.form=multitask"]
        settings += ["tune.checkpoint_steps=2", "tune.valid_every_steps=3", "tune.learning_rate=0.05"]
        recipes.append(recipe(folder / f"task{number}", *settings, *overrides, *mine))
    return recipes


@pytest.mark.parametrize(
    ("overrides", "own", "cut"),
    [
        ((), ((), ()), (0, 8)),
        ((), ((), ()), (1, 7)),
        (("prompt.form_width=2", "tune.optimizer=adafactor"), ((), (), ("tune.seed=4",)), (2, 9)),
        ((), (("tune.max_steps=5",), ()), (1, 9)),
        ((), ((), ("tune.max_steps=5",)), (0, 9)),
        (("tune.patience=1", "tune.valid_every_steps=1"), ((), ()), (0, 4)),
        (("prompt.kind=deep",), ((), ()), (1, 6)),
        (("data.template={text} so {soft}{text}",), ((), ("tune.batch_size=3",)), (0, 7)),
    ],
    ids=["two", "middle of a pass", "rank 2, Adafactor", "first ends", "second ends", "patience", "deep", "kept contexts"],
)  # fmt: skip
def test_tasks_that_were_killed_end_with_the_same_bits(
    tmp_path: Path, overrides: tuple[str, ...], own: Sequence[tuple[str, ...]], cut: tuple[int, int]
) -> None:
    lm = lm_of()
    whole = tune_tasks(tasks(tmp_path / "whole", *overrides, own=own), lm=lm)
    recipes = tasks(tmp_path / "cut", *overrides, own=own)
    with pytest.raises(SystemExit):
        tune_tasks(recipes, lm=lm, on_event=raising(SystemExit, *cut))
    said: list[str] = []

    def note(number: int, event: Event) -> None:
        if isinstance(event, Note):
            said.append(event.text)

    resumed = tune_tasks(recipes, lm=lm, on_event=note, resume=True)
    assert any(f"Continues after step {(cut[1] - 1) // 2 * 2}" in text for text in said)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(vectors(one), vectors(other))
        for figure in ("nll_before", "nll_after", "best_step", "steps", "tokens", "stopped"):
            assert getattr(one, figure) == getattr(other, figure)
        assert steps_recorded(Path(other.path)) == list(range(1, other.steps + 1))
    assert not list((tmp_path / "cut").glob("task[12]/checkpoints/*.checkpoint"))


def test_the_first_step_of_a_shared_part_takes_the_gradients_of_all_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task's rate is measured by a gradient of its own part, which for all but the first leaves the shared one out."""
    taken: list[int] = []
    gradients = Gradients.__call__

    def counted(self: Gradients, forms: Sequence[Any], rows: Any) -> list[float]:
        taken.append(len(forms))
        return gradients(self, forms, rows)

    monkeypatch.setattr(Gradients, "__call__", counted)
    tune_tasks(tasks(tmp_path, "tune.learning_rate=auto", "tune.max_steps=1"), lm=lm_of())
    assert taken == [1, 1, 2]


def test_a_task_that_broke_before_the_kill_stays_broken(tmp_path: Path) -> None:
    """Two of three take steps without measure, and break; the third goes on, with the shared part as they left it."""
    wild = ("tune.learning_rate=1e30",)

    def third(folder: Path, **options: Any) -> torch.Tensor:
        with pytest.raises(NotFinite, match="Step 2"):
            tune_tasks(tasks(folder, own=(("tune.learning_rate=0.05",), wild, ())), lm=lm_of(), **options)
        return next(iter(load_prompt(folder / "task2").tensors.values()))

    whole = third(tmp_path / "whole")
    with pytest.raises(SystemExit):
        tune_tasks(
            tasks(tmp_path / "cut", own=(("tune.learning_rate=0.05",), wild, ())),
            lm=lm_of(),
            on_event=raising(SystemExit, 2, 8),
        )
    assert torch.equal(third(tmp_path / "cut", resume=True), whole)
    assert load_prompt(tmp_path / "cut" / "task2").notes["metrics"]["stopped"] == "finished"


def test_tasks_that_are_finished_are_given_again(tmp_path: Path) -> None:
    recipes = tasks(tmp_path / "p")
    whole = tune_tasks(recipes, lm=lm_of())
    again = tune_tasks(recipes, lm=lm_of(), on_event=raising(SystemExit, 0, 1), resume=True)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(vectors(one), vectors(other))


def test_tasks_go_on_in_whatever_order_they_are_given(tmp_path: Path) -> None:
    """And each is given, and told of, in its place."""
    lm, own = lm_of(), ((), ("tune.seed=4",), ("tune.max_steps=5",))
    whole = tune_tasks(tasks(tmp_path / "whole", own=own), lm=lm)
    recipes = tasks(tmp_path / "cut", own=own)
    with pytest.raises(SystemExit):
        tune_tasks(recipes, lm=lm, on_event=raising(SystemExit, 1, 8))
    (tmp_path / "cut").rename(tmp_path / "moved")
    order, saved = (2, 0, 1), {}
    moved = [recipes[n].changed([f"out={tmp_path}/moved/task{n}"]) for n in order]

    def note(number: int, event: Event) -> None:
        assert not (isinstance(event, Stepped) and event.step <= 6)
        if isinstance(event, Saved):
            saved[number] = event.path

    (tmp_path / "cut").mkdir()
    tasks(tmp_path / "cut", own=own)  # the rows stay where they were
    resumed = tune_tasks(moved, lm=lm, on_event=note, resume=True)
    assert saved == {place: str(tmp_path / "moved" / f"task{n}") for place, n in enumerate(order)}
    for n, one in zip(order, resumed, strict=True):
        assert torch.equal(vectors(whole[n]), vectors(one))
        assert one.path == saved[order.index(n)]
        assert steps_recorded(Path(one.path)) == list(range(1, one.steps + 1))


def test_tasks_with_a_new_one_before_them_are_not_begun_anew(tmp_path: Path) -> None:
    three = tasks(tmp_path / "p", own=((), (), ()))
    tune_tasks(three[:2], lm=lm_of())
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match="tasks that share a part was 2, is 3"):
        tune_tasks(three[::-1], lm=lm_of(), resume=True)
    with pytest.raises(RecipeError, match=r"data\.source was"):
        tune_tasks([three[2], three[0]], lm=lm_of(), resume=True)
    assert contents(tmp_path) == before


def test_tasks_go_on_as_the_same_tasks_or_not_at_all(tmp_path: Path) -> None:
    lm = lm_of()
    three = tasks(tmp_path / "p", own=((), (), ()))
    tune_tasks(three[:2], lm=lm)
    with pytest.raises(RecipeError, match="tasks that share a part was 2, is 3"):
        tune_tasks(three, lm=lm, resume=True)
    other = [three[0], three[1].changed(["tune.weight_decay=0.1"])]
    with pytest.raises(RecipeError, match=r"task1: .*: tune\.weight_decay was 0\.0, is 0\.1\. Set"):
        tune_tasks(other, lm=lm, resume=True)
    with pytest.raises(RecipeError, match="tasks that share a part was 2, is not known"):
        tune(three[0], lm=lm, resume=True)
    tune(three[2], lm=lm)
    with pytest.raises(RecipeError, match="tasks that share a part was not known, is 2"):
        tune_tasks(three[:0:-1], lm=lm, resume=True)


def test_tasks_of_unlike_prompts_have_nothing_to_share(tmp_path: Path) -> None:
    for override in ("prompt.length=5", "prompt.kind=deep", "prompt.form_width=2"):
        with pytest.raises(RecipeError, match=r"task1: .* one kind, length and form_width"):
            tune_tasks(tasks(tmp_path / "p", own=((), (override,))), lm=lm_of())
    with pytest.raises(RecipeError, match=r"task1: prompt\.form: found direct, wanted multitask"):
        tune_tasks(tasks(tmp_path / "p", own=((), ("prompt.form=direct",))), lm=lm_of())


def begin_tasks(folder: Path) -> Callable[[], object]:
    lm, recipes = lm_of(), tasks(folder, "tune.checkpoint_steps=1", "tune.epochs=12")
    return lambda: tune_tasks(recipes, lm=lm, resume=True)


@needs_fork
def test_tasks_killed_many_times_at_any_moment_end_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9 to a real process, at moments drawn at random: while loading, learning, writing or saving."""
    folders = runs_killed_and_undisturbed(begin_tasks, tmp_path, seconds=4)
    for task in ("task0", "task1"):
        one, other = (load_prompt(folder / task) for folder in folders)
        assert torch.equal(*(next(iter(prompt.tensors.values())) for prompt in (one, other)))
        assert one.notes["metrics"]["nll_after"] == other.notes["metrics"]["nll_after"]


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes a.yaml and b.yaml over one tiny base, in the working folder."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, rows in (("a", SPLITS.train), ("b", SPLITS.validation)):
        (tmp_path / f"{name}.csv").write_text("text\n" + "\n".join(row.fields["text"] for row in rows) + "\n")
        (tmp_path / f"{name}.yaml").write_text(
            f"base: base\ndtype: float32\nout: runs/{name}\ndata: {{source: {name}.csv, column: text, validation: 2}}\n"
            "prompt: {length: 4}\ntune: {epochs: 4, batch_size: 2, learning_rate: 0.05}\n"
        )
    return tmp_path


def test_the_command_learns_a_prompt_for_each_recipe(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["together", "a.yaml", "b.yaml", "--set", "tune.epochs=2", "--json"]) == 0
    shown = capsys.readouterr()
    records = json.loads(shown.out)["prompts"]
    assert [(one["path"], one["steps"]) for one in records] == [("runs/a", 10), ("runs/b", 4)]
    for one in records:
        assert one["nll_after"] <= one["nll_before"]
        assert load_prompt(one["path"]).length == 4
        assert f"{one['nll_before']:.4f} at the start, {one['nll_after']:.4f} at the best step" in shown.err
    (alone,) = [tune(Recipe.load("b.yaml", ["tune.epochs=2", "out=alone"]))]
    learned = next(iter(load_prompt("runs/b").tensors.values()))
    torch.testing.assert_close(vectors(alone), learned, atol=2e-4, rtol=1e-3)


def test_multitask_recipes_share_a_part_and_go_on_with_resume(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["together", "a.yaml", "b.yaml", "--set", "prompt.form=multitask", "--set", "tune.max_steps=4"]
    given += ["--set", "tune.valid_every_steps=4", "--set", "tune.learning_rate=0.01"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "runs/b" in shown
    assert "learned with one shared part" in shown
    learned = [next(iter(load_prompt(f"runs/{name}").tensors.values())) for name in "ab"]
    steps = [load_prompt(f"runs/{name}").notes["metrics"]["best_step"] for name in "ab"]
    assert steps == [4, 4]
    singular = torch.linalg.svdvals((learned[0] / learned[1]).double())
    assert singular[1] < 1e-3 * singular[0]  # a quotient of two rank-1 parts: the shared one has gone from it
    assert main([*given, "--resume"]) == 0
    assert "runs/b: Continues after step 4 of 4." in capsys.readouterr().out
    again = [next(iter(load_prompt(f"runs/{name}").tensors.values())) for name in "ab"]
    assert all(map(torch.equal, learned, again))


def test_the_table_tells_once_what_every_run_tells() -> None:
    shown = io.StringIO()
    table = ShowTable(Screen(file=shown), "prompt", ["a", "b"])
    for run, rows in ((0, 4), (1, 4), (0, 2), (1, 2)):
        table.event(run, BatchHalved(rows, 8 // rows))
    assert [shown.getvalue().count(f"{rows} rows at a time") for rows in (4, 2)] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["a.yaml", "nowhere.yaml"], 2, "nowhere.yaml: there is no such recipe file"),
        (["a.yaml", "a.yaml"], 2, "out: two recipes write to runs/a"),
        (["a.yaml", "b.yaml", "--set", "out=x"], 2, "out: two recipes write to x"),
        (["a.yaml", "mixed.yaml"], 2, "runs/a: prompt.form: found direct, wanted multitask"),
        (["a.yaml", "b.yaml", "--set", "tune.epoch=2"], 2, "Did you mean tune.epochs?"),
        (["a.yaml", "b.yaml", "--set", "data.source=none.csv"], 3, "none.csv"),
        ([], 2, "RECIPE.yaml"),
    ],
    ids=["no file", "one file twice", "one folder", "mixed forms", "unknown setting", "no data", "nothing"],
)
def test_what_cannot_be_learned_together_is_one_message(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    text = Path("b.yaml").read_text().replace("length: 4", "length: 4, form: multitask")
    Path("mixed.yaml").write_text(text)
    assert main(["together", *arguments]) == code
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.err.count("softprompt: ") == 1
    assert not Path("runs").exists()
