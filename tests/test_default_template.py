"""A target alone is enough: rows are laid out by their columns, in the base's own chat template where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softprompt.base.frozen_lm import FrozenLM
from softprompt.comparison.arms import few_shot, prompt
from softprompt.comparison.assignment import Assignment
from softprompt.comparison.settings import CompareSettings, Job
from softprompt.data.default_template import ColumnChat, input_columns
from softprompt.data.example import Example, Splits
from softprompt.data.layout import Layout, to_learn
from softprompt.errors import DataError
from softprompt.evaluation.judge import evaluate
from softprompt.evaluation.settings import JudgedData, JudgeSettings
from softprompt.inference.compiled import TextPrompt, compile_prompt
from softprompt.store.artifact import load_prompt
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import Task, task_of
from tiny_models import tiny_model, tiny_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe {kind}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REVERSED = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
ROWS = [
    ("my order never came", "complaint"),
    ("thank you for help", "praise"),
    ("nobody answers!", "complaint"),
]
SPLITS = Splits(tuple(Example({"text": text, "label": label}, row=n) for n, (text, label) in enumerate(ROWS)))


def chatty(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def base(chat_template: str | None = CHATML) -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama", vocab_size=330), chatty(chat_template), name="tiny")


def recipe(*overrides: str) -> Recipe:
    return Recipe.from_flags({}, ["data.source=x", "data.target=label", "prompt.length=3", *overrides])


def task(lm: FrozenLM, *overrides: str, splits: Splits = SPLITS) -> Task:
    return task_of(recipe(*overrides), lm, splits)


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


def rendered(tokenizer: Any, *said: str) -> Any:
    """What transformers writes for these turns, up to where the next one is to begin."""
    return tokenizer.apply_chat_template(
        turns(*said), tokenize=True, return_dict=False, add_generation_prompt=len(said) % 2 == 1
    )


def learned_ids(task: Task, example: Example) -> tuple[list[int], list[int]]:
    """The real tokens of a row, and those of them that are learned."""
    row = task.to_learn([example]).encoded[0]
    real = [token for token, soft in zip(row.ids, row.soft, strict=True) if soft < 0]
    return real, [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]


def test_rows_of_columns_are_exactly_the_tokens_of_the_bases_chat_template() -> None:
    lm = base()
    for example, (text, label) in zip(SPLITS.train, ROWS, strict=True):
        real, learned = learned_ids(task(lm), example)
        own = rendered(lm.tokenizer, text, label)
        assert real == own[: len(real)]
        assert (
            lm.tokenizer.decode(own[len(real) :]) == "\n"
        )  # what stands behind the closing mark teaches nothing
        assert lm.tokenizer.decode(learned) == f"{label}<|im_end|>"


def test_smollm2_reads_columns_as_its_own_chat_template_writes_them(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    layout = ColumnChat.of(["premise", "hypothesis"], "label").layout(tokenizer)
    example = Example({"premise": "It rains.", "hypothesis": "The {street} is wet.", "label": "entailment"})
    row = to_learn(Layout.of(layout, tokenizer), example)
    own = rendered(tokenizer, "Premise: It rains.\nHypothesis: The {street} is wet.", "entailment")
    assert row.ids == own[: len(row.ids)]
    assert tokenizer.decode(own[len(row.ids) :]) == "\n"
    assert (
        tokenizer.decode([i for i, t in zip(row.ids, row.trained, strict=True) if t])
        == "entailment<|im_end|>"
    )


def test_generation_reads_a_bare_text_as_the_saved_prompt_learned_it(tmp_path: Path) -> None:
    lm = base()
    tune(recipe(f"out={tmp_path / 'p'}", "tune.max_steps=1"), lm=lm, splits=SPLITS)
    compiled = compile_prompt(lm, load_prompt(tmp_path / "p"))
    marks = compiled.marks(lm, "my order never came")
    assert marks[:3] == [-1, -2, -3]
    assert marks[3:] == rendered(lm.tokenizer, "my order never came")
    (end,) = lm.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert end in compiled.ending.ids


def test_a_base_without_a_chat_template_reads_one_column_and_the_target_by_name() -> None:
    settled = task(base(None))
    assert str(settled.template) == "{soft:3}{text}\nLabel: {label}"
    assert settled.chat is None
    assert any(
        '"{soft}{text}\\nLabel: {label}"'.replace("\\n", "\n") in note for note in settled.splits.notes
    )


def test_several_columns_are_lines_by_name_and_row_numbers_and_doubles_of_the_target_are_left_out() -> None:
    names = ("premise", "side_note", "idx", "user_id", "label_text")
    examples = tuple(
        Example({**dict.fromkeys(names, f"{n}"), "label_text": label, "label": label[0]}, row=n)
        for n, label in enumerate(("yes", "no", "yes", "no"))
    )
    settled = task(base(None), splits=Splits(examples))
    assert str(settled.template) == "{soft:3}Premise: {premise}\nSide note: {side_note}\nLabel: {label}"
    assert any("idx, user_id and label_text left out" in note for note in settled.splits.notes)


def test_answers_that_never_repeat_do_not_make_their_questions_doubles_of_them() -> None:
    examples = [Example({"question": f"q{n}", "answer": f"a{n}"}) for n in range(4)]
    assert input_columns(examples, "answer") == (["question"], [])


def test_a_target_without_another_column_is_refused() -> None:
    with pytest.raises(DataError, match="no column to tell 'label' from; they have: id"):
        task(base(None), splits=Splits((Example({"label": "yes", "id": "1"}),)))


def test_a_chat_template_that_cannot_be_parted_is_refused_when_asked_for_and_else_said() -> None:
    lm = base(REVERSED)
    with pytest.raises(DataError, match="one after the other"):
        task(lm, "data.template=chat")
    settled = task(lm)
    assert str(settled.template) == "{soft:3}{text}\nLabel: {label}"
    assert any("one after the other" in note for note in settled.splits.notes)
    with pytest.raises(DataError, match="no chat template"):
        task(base(None), "data.template=chat")


def test_a_template_of_ones_own_is_taken_as_it_is() -> None:
    assert str(task(base(), "data.template={text} -> {label}").template) == "{soft:3}{text} -> {label}"


def _assignment(lm: FrozenLM, folder: Path, arm: Any) -> Assignment:
    settings = CompareSettings(arms=["prompt", "few-shot"], text="Which kind is it?\n", shots=2, seeds=1)
    return Assignment(lm, task(lm), Job(recipe(), settings, arm, 0, folder))


def test_in_a_comparison_a_text_opens_the_users_turn_and_examples_are_exchanges(tmp_path: Path) -> None:
    lm = base()
    asked = Example({"text": "it is late"})
    own = prompt(_assignment(lm, tmp_path, "prompt"))
    assert own.prompt.marks(lm, asked) == rendered(lm.tokenizer, "Which kind is it?\nit is late")
    shown = few_shot(_assignment(lm, tmp_path, "few-shot"))
    chosen = [ROWS[row] for row in shown.about["rows"]]
    assert len(chosen) == 2
    said = [text for shot in chosen for text in shot]
    assert shown.prompt.marks(lm, asked) == rendered(lm.tokenizer, *said, "it is late")


def test_evaluate_meets_the_base_in_its_chat_template_and_puts_a_text_into_the_users_turn() -> None:
    lm = base()
    settings = JudgeSettings(metrics=["nll"], split="train")
    reading = JudgedData(validation=0, test=0)
    rows = [dict(example.fields) for example in SPLITS.train]
    judged: dict[str, Any] = {"base": lm, "target": "label", "settings": settings, "reading": reading}
    alone = evaluate(None, rows, **judged, progress=False)
    assert alone.rows[0].input.endswith(
        "<|im_start|>user\nmy order never came<|im_end|>\n<|im_start|>assistant\n"
    )
    behind = evaluate(TextPrompt("Be brief. "), rows, **judged, progress=False)
    spelled = evaluate(
        None,
        rows,
        **judged,
        template="<|im_start|>system\nBe {{kind}}.<|im_end|>\n<|im_start|>user\nBe brief. {text}<|im_end|>\n"
        "<|im_start|>assistant\n{label}<|im_end|>",
        progress=False,
    )
    assert [row.nll for row in behind.rows] == pytest.approx([row.nll for row in spelled.rows], rel=1e-5)
    assert [row.tokens for row in behind.rows] == [row.tokens for row in alone.rows]
