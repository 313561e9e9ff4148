"""Templates: what stands where, and what is refused before anything is learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data.example import Example, Message
from softprompt.data.template import Field, Messages, Soft, Template, Text
from softprompt.errors import DataError, RecipeError


def test_a_template_is_text_fields_and_slots_with_white_space_to_the_letter() -> None:
    template = Template.parse("{soft:20}  Tweet: {text}\n")
    assert template.pieces == (Soft(20), Text("  Tweet: "), Field("text"), Text("\n"))
    assert template.soft_length == 20
    assert template.fields == ("text",)


def test_a_bare_slot_takes_its_length_from_the_setting() -> None:
    assert Template.parse("{soft}{text}", length=7).pieces[0] == Soft(7)


def test_without_a_slot_it_stands_first() -> None:
    assert Template.parse(" {text}", length=4).pieces == (Soft(4), Text(" "), Field("text"))


def test_without_a_slot_and_a_length_there_is_none() -> None:
    assert Template.parse("{text}").soft_length == 0


def test_several_bare_slots_share_what_numbered_ones_leave() -> None:
    template = Template.parse("{soft}{text}{soft:4}a{soft}b", length=11)
    assert [piece.length for piece in template.pieces if isinstance(piece, Soft)] == [4, 4, 3]
    assert template.soft_length == 11


def test_doubled_braces_are_literal() -> None:
    template = Template.parse('{{"tweet": "{text}"}}')
    assert template.pieces == (Text('{"tweet": "'), Field("text"), Text('"}'))


@pytest.mark.parametrize(
    "source", ["{soft:20} {text}", "a{{b}}{x}{soft:3} {y z}", "{soft:5}{messages}", "{text}"]
)
def test_a_template_is_written_as_it_was_read(source: str) -> None:
    assert str(Template.parse(source)) == source


def test_the_written_template_holds_the_lengths_so_it_reads_back_alone() -> None:
    template = Template.parse("{text}: {label}", target="label", length=9)
    assert str(template) == "{soft:9}{text}: {label}"
    assert Template.parse(str(template), target="label") == template


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_fixed_text_survives_writing_and_reading(before: str, after: str) -> None:
    pieces = tuple(piece for piece in (Text(before), Field("text"), Text(after)) if piece != Text(""))
    assert Template.parse(str(Template(pieces))).pieces == pieces


def test_generation_needs_every_field_but_the_target() -> None:
    template = Template.parse("{a} {b} {label}", target="label")
    assert template.inputs == ("a", "b")


def test_one_text_fills_the_one_input() -> None:
    assert Template.parse("{tweet}: {label}", target="label").example("hi").fields == {"tweet": "hi"}
    assert Template.parse("{soft:2}{messages}").example("hi") == Example({}, (Message("user", "hi"),))
    with pytest.raises(DataError, match="2 inputs"):
        Template.parse("{a}{b}").example("hi")


def test_messages_make_it_a_chat() -> None:
    template = Template.parse("{soft:5}{messages}")
    assert template.chat
    assert template.pieces == (Soft(5), Messages())


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ("{soft:20}{text}", {"length": 10}, "20 virtual tokens, but prompt.length is 10"),
        ("{soft}{text}", {}, "without a length"),
        ("{soft}{soft}{text}", {"length": 1}, "leaves 1"),
        ("{soft:0}{text}", {}, "at least 1"),
        ("{soft:x}{text}", {}, "at least 1"),
        ("{text}", {"length": 0}, "at least 1"),
        ("{soft:3}hello", {}, "no field"),
        ("{text}{soft:3}", {}, "ends with a soft slot"),
        ("{text", {}, "single '{'"),
        ("a } {text}", {}, "single '}'"),
        ("{}", {}, "names no field"),
        ("{ text }", {}, "names no field"),
        ("{text:>10}", {}, "names no field"),
        ("{text} {label}", {"target": "lable"}, "Did you mean 'label'"),
        ("{label} {text} {label}", {"target": "label"}, "2 times"),
        ("{label} {text}", {"target": "label"}, "comes last"),
        ("{text} {label}{soft:2}.", {"target": "label"}, "comes last"),
        ("{messages} {text}", {}, "at its end"),
        ("{messages}", {"target": "messages"}, "assistant's turns by itself"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(source: str, settings: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("{", r"\{").replace("}", r"\}")):
        Template.parse(source, **settings)
