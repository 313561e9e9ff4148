"""Rows in the forms of other trainers need no settings, and a form is never guessed over what the user said."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Message
from softprompt.data.source import load_splits
from softprompt.errors import DataError
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import task_of

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
]


def learned(
    rows: list[dict[str, Any]], *, template: str | None = None, **data: Any
) -> tuple[list[str], list[str]]:
    """The text that is learned of each row on the bundled base, and the notes of the task."""
    base = FrozenLM.load("builtin")
    splits = load_splits(rows, validation=0, **data)
    recipe = Recipe(
        data={"source": "rows", "validation": 0, "template": template, **data}, prompt={"length": 2}
    )
    task = task_of(recipe, base, splits)
    texts = []
    for row in task.to_learn(task.splits.train).encoded:
        ids = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]
        texts.append(str(base.tokenizer.decode(ids[: len(ids) - row.end])))
    return texts, list(task.splits.notes)


def test_prompts_and_completions_learn_the_completion() -> None:
    texts, notes = learned([{"prompt": "The sky is", "completion": " blue."}])
    assert texts == [" blue."]
    assert any("the completion is learned" in note for note in notes)


def test_alpacas_rows_learn_the_output_after_instruction_and_input() -> None:
    texts, notes = learned(ALPACA)
    assert texts == ["Blue.", "5"]
    assert any("Rows are instructions, inputs and outputs: {prompt} is" in note for note in notes)
    read = load_splits(ALPACA).train
    assert [one.fields["prompt"] for one in read] == ["Name a colour.", "Add the numbers.\n\n2 and 3"]


def test_rows_of_a_text_column_learn_the_text_and_name_what_is_not_read() -> None:
    texts, notes = learned([{"text": "One day a cat sat.", "prompt": "p", "completion": "c"}])
    assert texts == ["One day a cat sat."]
    (note,) = notes
    assert "prompt and completion are not read" in note


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS}, (Message("user", "hi"), Message("assistant", "hello"))),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            (Message("user", "hi"), Message("assistant", "hello")),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}], "system": "Be short."},
            (Message("system", "Be short."), Message("user", "hi")),
        ),
        (
            {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]},
            (
                Message("user", "hi", learned=False),
                Message("assistant", "hello", learned=False),
                Message("user", "hi", learned=False),
                Message("assistant", "hello"),
            ),
        ),
    ],
)
def test_chats_of_every_form_are_chats(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    splits = load_splits([row])
    assert splits.train[0].messages == messages
    assert splits.shape is not None
    assert splits.shape.template == "{messages}"


def test_what_the_user_names_is_taken_and_no_form_is_guessed() -> None:
    row = {"prompt": "p", "completion": "c"}
    assert load_splits([row], column="prompt").shape is None
    assert load_splits([row], fields={"text": "prompt"}).shape is None
    assert load_splits([row], target="prompt").shape is None
    texts, notes = learned([{"prompt": "a b", "completion": "c"}], column="prompt")
    assert texts == ["a b"]
    assert notes == []


def test_a_template_of_the_users_keeps_its_target() -> None:
    texts, notes = learned(ALPACA, template="{soft:2}Say: {output}")
    assert texts == ["Say: Blue.", "Say: 5"]
    assert notes == []


def test_a_form_of_no_known_kind_asks_for_the_column() -> None:
    with pytest.raises(DataError, match=r"has no text for \{text\}; it has: body, title"):
        learned([{"title": "a", "body": "b"}])
