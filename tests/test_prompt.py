"""A prompt as a Python object: compared by content, printed short, saved and read by its own methods."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import DeepPrompt, Fingerprint, SoftPrompt
from softprompt.store.artifact import load_prompt
from softprompt.store.digest import digest_of

BASE = Fingerprint("tiny/base", width=4, layers=2)


def soft() -> SoftPrompt:
    return SoftPrompt(torch.arange(8.0).view(2, 4), BASE, "{soft:2}{text}", name="greet", notes={"seed": 1})


def deep() -> DeepPrompt:
    state = torch.arange(16.0).view(2, 2, 1, 4)
    return DeepPrompt(state, state + 1, BASE, "{soft:2}{text}", name="greet")


def test_prompts_are_equal_by_what_decides_their_answers() -> None:
    assert soft() == soft()
    assert deep() == deep()
    assert soft() == dataclasses.replace(soft(), name="other", notes={"seed": 2})
    assert soft() != deep()
    assert soft() != "greet"
    for change in (
        {"embeddings_PD": torch.arange(1.0, 9.0).view(2, 4)},
        {"embeddings_PD": torch.arange(12.0).view(3, 4)},
        {"base": dataclasses.replace(BASE, sha256="f0")},
        {"template": "{soft:2} {text}"},
        {"target": "label"},
        {"notes": {"recipe": {"data": {"special_tokens": True}}}},
    ):
        changed = dataclasses.replace(soft(), **change)
        assert soft() != changed
        assert digest_of(soft()) != digest_of(changed)
    assert deep() != dataclasses.replace(deep(), values_LPHK=deep().keys_LPHK)


def test_a_prompt_has_no_hash_since_its_tensors_can_change() -> None:
    for prompt in (soft(), deep()):
        with pytest.raises(TypeError, match="unhashable"):
            hash(prompt)


def test_a_prompt_prints_in_one_short_line_without_its_numbers() -> None:
    assert repr(soft()) == "SoftPrompt('greet', 2 virtual tokens on 'tiny/base', template='{soft:2}{text}')"
    wide = DeepPrompt(torch.zeros(24, 100, 8, 64), torch.zeros(24, 100, 8, 64), Fingerprint("b"), target="y")
    assert repr(wide) == "DeepPrompt('prompt', 100 virtual tokens on 'b', target='y')"


def test_a_notebook_shows_a_table_in_which_a_strangers_text_is_only_text() -> None:
    shown = dataclasses.replace(soft(), name="<script>x</script>", template="{soft:2}<b>{text}")._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown
    assert shown.startswith("<table>")


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("prompt", [soft(), deep()], ids=["soft", "deep"])
def test_a_prompt_saves_and_reads_itself(
    prompt: SoftPrompt | DeepPrompt, as_text: bool, tmp_path: Path
) -> None:
    folder = str(tmp_path / "greet") if as_text else tmp_path / "greet"
    assert prompt.save_pretrained(folder) == tmp_path / "greet"
    again = type(prompt).from_pretrained(folder)
    assert again == prompt
    assert again == load_prompt(folder)
    assert (again.name, again.notes) == (prompt.name, prompt.notes)


def test_the_other_kind_of_prompt_is_refused_with_the_class_to_use(tmp_path: Path) -> None:
    soft().save_pretrained(tmp_path)
    with pytest.raises(
        PromptError, match=r"found a soft prompt, wanted a deep one\. Use SoftPrompt\.from_pretrained"
    ):
        DeepPrompt.from_pretrained(tmp_path)
