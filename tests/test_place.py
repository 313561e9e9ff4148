"""prompt.place: where a template that has no slot of its own gets it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.pace import deep_recipe
from softprompt.data.example import Example, Message, Splits
from softprompt.data.template import Soft, Template, has_slot
from softprompt.errors import RecipeError
from softprompt.inference.compiled import compile_prompt
from softprompt.store.artifact import load_prompt
from softprompt.tuning.checkpoint import identity
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.sweep import sweep
from softprompt.tuning.task import Task, read_splits, task_of
from test_default_template import SPLITS, base, recipe


def task(lm: FrozenLM, *overrides: str, splits: Splits = SPLITS) -> Task:
    return task_of(recipe(*overrides), lm, splits)


def rows_of(task: Task) -> list[Any]:
    return list(task.to_learn(task.splits.train).encoded)


@pytest.mark.parametrize(
    ("source", "front", "answer"),
    [
        ("{text} Kind: {label}", "{soft}{text} Kind: {label}", "{text} Kind:{soft} {label}"),
        ("{text}\n{label}!", "{soft}{text}\n{label}!", "{text}\n{soft}{label}!"),
        ("{text}{label}", "{soft}{text}{label}", "{text}{soft}{label}"),
        ("{{a}} {text} \t{label}", "{soft}{{a}} {text} \t{label}", "{{a}} {text}{soft} \t{label}"),
    ],
)
def test_a_slot_goes_in_front_or_right_before_the_answer_and_blanks_stay_with_the_answer(
    source: str, front: str, answer: str
) -> None:
    template = Template.parse(source, target="label")
    assert template.with_slot(at_answer=False) == front
    assert template.with_slot(at_answer=True) == answer
    again = Template.parse(answer, target="label", length=5)
    assert again.without_slots() == Template.parse(source, target="label")
    assert again.with_slot(at_answer=False) == front


@pytest.mark.parametrize(
    ("source", "has"),
    [("{soft}{text}", True), ("{text}{soft:3} {label}", True), ("{text}", False), ("{{soft}} {text}", False)],
)
def test_a_slot_is_known_from_literal_braces(source: str, has: bool) -> None:
    assert has_slot(source) is has


@pytest.mark.parametrize("chat_template", [None, "own"])
def test_the_answer_and_all_text_are_the_same_tokens_in_either_place(chat_template: str | None) -> None:
    lm = base(None) if chat_template is None else base()
    front, answer = rows_of(task(lm)), rows_of(task(lm, "prompt.place=answer"))
    for one, other in zip(front, answer, strict=True):
        real = [token for token, soft in zip(other.ids, other.soft, strict=True) if soft < 0]
        assert real == [token for token, soft in zip(one.ids, one.soft, strict=True) if soft < 0]
        first = other.trained.index(True)
        assert list(other.soft[first - 3 : first]) == [0, 1, 2]
        assert list(one.soft[:3]) == [0, 1, 2]
        assert sum(one.trained) == sum(other.trained)


def test_a_template_that_was_written_without_a_slot_gets_it_there_too() -> None:
    layout = task(base(), "prompt.place=answer", "data.template=Say: {text} Kind: {label}").template
    assert str(layout) == "Say: {text} Kind:{soft:3} {label}"


def test_rows_of_a_known_form_get_it_before_their_completion() -> None:
    rows = [{"prompt": f"{n} and", "completion": " more"} for n in range(3)]
    whole = Recipe.from_flags({}, ["data.source=x", "prompt.length=3", "prompt.place=answer"])
    splits = read_splits(whole, rows)
    assert str(task_of(whole, base(None), splits).template) == "{prompt}{soft:3}{completion}"


def test_it_learns_there_and_generation_reads_the_row_as_it_was_learned(tmp_path: Path) -> None:
    lm = base()
    tune(
        recipe(f"out={tmp_path / 'p'}", "tune.max_steps=2", "prompt.place=answer"),
        lm=lm,
        splits=SPLITS,
        progress=False,
    )
    prompt = load_prompt(tmp_path / "p")
    template = Template.parse(prompt.template or "", target="label")
    assert isinstance(template.pieces[-3], Soft) or isinstance(template.pieces[-2], Soft)
    marks = compile_prompt(lm, prompt).marks(lm, SPLITS.train[0].fields["text"])
    learned = rows_of(task(lm, "prompt.place=answer"))[0]
    first = learned.trained.index(True)
    assert marks == [
        -1 - soft if soft >= 0 else token
        for token, soft in zip(learned.ids[:first], learned.soft[:first], strict=True)
    ]


def test_a_template_whose_slot_has_a_place_is_refused_with_another() -> None:
    with pytest.raises(RecipeError, match=r"whose slot has a place\. Leave one of the two out"):
        task(base(), "prompt.place=answer", "data.template={soft}{text} {label}")


def test_text_that_is_learned_whole_has_no_answer() -> None:
    whole = Recipe.from_flags({}, ["data.source=x", "prompt.place=answer"])
    with pytest.raises(RecipeError, match=r'"\{text\}" has no target'):
        task_of(whole, base(), SPLITS)


def test_a_chat_of_turns_has_no_one_answer() -> None:
    turns = (Message("user", "Hello"), Message("assistant", "Hi"))
    splits = Splits((Example({}, turns, row=0),))
    chats = Recipe.from_flags({}, ["data.source=x", "prompt.place=answer", "data.messages=messages"])
    with pytest.raises(RecipeError, match="every turn of the assistant"):
        task_of(chats, base(), splits)


def test_a_deep_prompt_stays_in_front() -> None:
    with pytest.raises((RecipeError, ValidationError), match="a deep prompt comes before all text"):
        recipe("prompt.place=answer", "prompt.kind=deep")


def test_the_deep_arm_of_a_comparison_moves_to_the_front() -> None:
    soft = recipe("prompt.place=answer")
    lm = base(None)
    assignment: Any = SimpleNamespace(task=task(lm, "prompt.place=answer"))
    deep = deep_recipe(assignment, soft)
    assert str(task_of(deep, lm, SPLITS).template) == "{soft:3}{text}\nLabel: {label}"


def test_a_sweep_compares_both_places(tmp_path: Path) -> None:
    result = sweep(
        recipe(f"out={tmp_path / 's'}", "tune.max_steps=2"),
        [("prompt.place=front",), ("prompt.place=answer",)],
        lm=base(),
        splits=SPLITS,
        progress=False,
    )
    assert len(result.trials) == 2


def test_runs_that_are_older_than_the_setting_can_be_resumed() -> None:
    lm = base()
    assert "prompt.place" not in identity(recipe(), lm.fingerprint, "")
    assert identity(recipe("prompt.place=answer"), lm.fingerprint, "")["prompt.place"] == '"answer"'
