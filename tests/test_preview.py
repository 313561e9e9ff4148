"""The preview shows what a run trains on, token by token."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from layouts import encode_all, preview
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import DataError
from tiny_models import tiny_tokenizer

TEMPLATE = Template.parse("Tweet: {text} Complaint?{soft:2} {label}", target="label")
ROWS = [
    Example({"text": "my order never came", "label": "complaint"}, row=0),
    Example({"text": "thank you ï 漢字 😀", "label": "no complaint"}, row=1),
]


def test_every_position_is_shown_with_its_part_in_the_loss() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    shown = preview(TEMPLATE, ROWS, tokenizer).shown[0]
    parts: dict[str, str] = {}
    for token in shown.tokens:
        parts[token.kind] = parts.get(token.kind, "") + token.text
    assert parts == {
        "special": "<s>",
        "context": "Tweet: my order never came Complaint?",
        "soft": "01",
        "trained": " complaint</s>",
    }
    kinds = [token.kind for token in shown.tokens]
    assert kinds[0] == "special"
    assert kinds.index("soft") > kinds.index("context")
    assert [token.id for token in shown.tokens if token.kind == "soft"] == [None, None]


def test_letters_of_several_tokens_come_out_whole() -> None:
    shown = preview(TEMPLATE, ROWS, tiny_tokenizer()).shown[1]
    text = "".join(token.text for token in shown.tokens if token.kind != "soft")
    assert text.replace("\ufffd", "") == "Tweet: thank you ï 漢字 😀 Complaint? no complaint</s>"


def test_the_counts_are_those_of_the_run() -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        *ROWS,
        Example({"text": "fox " * 80, "label": "x"}, row=2),
        Example({"text": "fox", "label": ""}, row=3),
    ]
    found = preview(TEMPLATE, rows, tokenizer, show=1, max_length=60, on_overflow="truncate")
    run = encode_all(TEMPLATE, rows[:3], tokenizer, max_length=60, on_overflow="truncate")
    assert (found.examples, len(found.shown), found.unlabelled, found.truncated) == (4, 1, 1, 1)
    assert found.cut_tokens == run.cut_tokens > 0
    assert found.soft_positions == 6
    assert found.tokens + found.soft_positions == sum(run.lengths)
    assert found.trained_tokens == sum(one.trained_tokens for one in run.encoded)
    assert found.lengths["longest"] == max(run.lengths)
    assert found.lengths["median"] == sorted(run.lengths)[1]
    assert "row 3" in found.problems[0]


@pytest.mark.parametrize(("overflow", "counts"), [("error", (1, 0)), ("drop", (0, 1))])
def test_rows_over_the_limit_are_counted_not_raised(overflow: Any, counts: tuple[int, int]) -> None:
    rows = [ROWS[0], Example({"text": "fox " * 80, "label": "x"}, row=2)]
    found = preview(TEMPLATE, rows, tiny_tokenizer(), max_length=60, on_overflow=overflow)
    assert (found.too_long, found.dropped) == counts
    assert bool(found.problems) is (overflow == "error")


def test_a_preview_is_plain_data_and_names_its_template() -> None:
    found = asdict(preview(TEMPLATE, ROWS, tiny_tokenizer()))
    assert found["template"] == str(TEMPLATE)
    assert found["target"] == "label"


def test_a_field_that_no_row_has_is_still_an_error() -> None:
    with pytest.raises(DataError, match="no text for"):
        preview(TEMPLATE, [Example({"txt": "a"})], tiny_tokenizer())
    with pytest.raises(DataError, match="no row"):
        preview(TEMPLATE, [], tiny_tokenizer())


def test_a_notebook_shows_the_slot_what_is_trained_and_no_markup_of_the_data() -> None:
    template = Template.parse("{text}{soft:3} {label}", target="label")
    rows = [Example({"text": "The <b>fox</b>", "label": "fox"})]
    shown = preview(template, rows, tiny_tokenizer())._repr_html_()
    assert shown.count("[3 virtual tokens]") == 1
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    trained = shown.split("<mark title='trained'")[1].split("</mark>")[0]
    assert trained.split(">", 1)[1].strip().startswith("fox")
