"""Examples in flat arrays: what was put in comes out, in a tenth of the memory."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data.columns import Columns
from softprompt.data.example import Example, Message
from softprompt.data.examples import Examples

TEXTS = st.text(max_size=8) | st.sampled_from(["yes", "no", "long " * 40])
TURNS = st.builds(
    Message,
    TEXTS,
    TEXTS,
    st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(tuple),
    st.booleans(),
)
ROWS = st.lists(
    st.builds(
        Example,
        st.dictionaries(TEXTS, TEXTS, max_size=3),
        st.none() | st.lists(TURNS, max_size=3).map(tuple),
        st.integers(-1, 2**40),
        st.lists(TEXTS, max_size=2).map(tuple),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.slices(30), st.data())
def test_what_was_put_in_comes_out_in_its_order(
    rows: list[Example], part: slice, data: st.DataObject
) -> None:
    examples = Examples(rows)
    assert list(examples) == rows
    assert examples == tuple(rows)
    assert [list(example.fields) for example in examples] == [list(row.fields) for row in rows]
    assert list(examples[part]) == rows[part]
    chosen = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=5) if rows else st.just([]))
    assert list(examples.select(chosen)) == [rows[index] for index in chosen]
    assert list(examples[part][::-1]) == rows[part][::-1]
    assert bool(examples) == bool(rows)
    assert examples + rows[:2] == (*rows, *rows[:2])


def test_rows_that_differ_are_not_equal() -> None:
    row = Example({"text": "a"}, None, 0)
    others = [
        Example({"text": "b"}, None, 0),
        Example({"word": "a"}, None, 0),
        Example({"text": "a"}, (), 0),
        Example({"text": "a"}, None, 1),
        Example({"text": "a"}, None, 0, ("b",)),
    ]
    for other in others:
        assert Examples([row]) != Examples([other])
    assert Examples([row]) != Examples([row, row])


def test_a_short_labelled_row_takes_hardly_more_than_its_text() -> None:
    count = 20_000
    raw = ({"text": f"message number {n} asks where it is", "label": "ab"[n % 2]} for n in range(count))
    tracemalloc.start()
    try:
        examples = Columns(None, {}, None, "label").examples(raw, "rows", None, [])
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(examples) == count
    # Some 33 bytes of text, two cells, the text's end and four numbers of the row; and what grows in reserve.
    assert held / count < 33 + 8 * 2 + 8 + 28 + 40 + 1_500_000 / count
