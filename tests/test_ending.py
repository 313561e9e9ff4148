"""An answer ends, in training, in generation and in judging, where the template says that it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from layouts import encode, preview
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.ending import End, ending_of
from softprompt.data.example import Example, Message, Splits
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import judge_rows
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import predictor, settled
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.conversation import Conversation
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from tiny_models import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HASHES = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BLANK = HASHES.replace(" ###", "")
OPEN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def chatty(chat_template: str | None = None, *, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer whose end of a turn, <|im_end|>, is not its eos."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        eos_token=eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def base(chat_template: str | None = None, *, eos: str | None = "</s>") -> FrozenLM:
    model = tiny_model("Llama", vocab_size=330, eos_token_id=None if eos is None else 1)
    return FrozenLM.wrap(model, chatty(chat_template, eos=eos))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[FrozenLM, str], None]:
    """Makes every base say one text, token by token, and then "z" for ever."""

    def script(lm: FrozenLM, text: str) -> None:
        ids = iter(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        (after,) = lm.tokenizer("z", add_special_tokens=False)["input_ids"]

        def logits(hidden_BD: torch.Tensor) -> torch.Tensor:
            assert len(hidden_BD) == 1
            return torch.nn.functional.one_hot(torch.tensor([next(ids, after)]), lm.vocab_size).float()

        monkeypatch.setattr(FrozenLM, "logits", staticmethod(logits))

    return script


def asks(*turns: str) -> Example:
    return Example({}, tuple(Message("user", turn) for turn in turns))


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        (CHATML, "yes<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>"),
        (HASHES, "yes ###\nuser: And then? ###\n"),
        (BLANK, "yes\nuser: And then?\n"),
        (OPEN, "yes</s>[user]And then?"),
    ],
)
def test_a_chat_answer_ends_with_the_mark_that_closes_its_turn(
    says: Callable[[FrozenLM, str], None], chat_template: str, said: str
) -> None:
    lm = base(chat_template)
    says(lm, said)
    talk = Conversation(lm, Template.parse("{messages}"))
    answer = talk.say("Is it?", DecodeSettings(max_new_tokens=40))
    assert (answer.text.strip(), answer.finish_reason) == ("yes", "stop")
    assert [(m.role, m.content.strip()) for m in talk.messages] == [("user", "Is it?"), ("assistant", "yes")]


def test_the_closing_token_of_a_turn_is_the_token_that_training_ends_a_turn_with() -> None:
    tokenizer = chatty(CHATML)
    chat = Example({}, (Message("user", "Is it?"), Message("assistant", "yes")))
    encoded = encode(Template.parse("{soft:2}{messages}"), chat, tokenizer)
    assert encoded is not None
    ending = ending_of(Template.parse("{soft:2}{messages}"), tokenizer)
    assert encoded.ids[-1] in ending.ids - {tokenizer.eos_token_id}
    assert ending.text == ""


@pytest.mark.parametrize("eos", ["</s>", None])
@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("{text} Kind:{label} ###", "{} ###"),
        ("<|im_start|>{text}<|im_end|>{label}<|im_end|>", "{}<|im_end|>"),
    ],
)
def test_fixed_text_behind_the_target_ends_an_answer_and_is_no_part_of_it(
    says: Callable[[FrozenLM, str], None], layout: str, said: str, eos: str | None
) -> None:
    lm = base(eos=eos)
    template = Template.parse(layout, target="label")
    prompt = compile_prompt(lm, None, template=template)
    says(lm, said.format("pos") + " zz zz zz")
    pieces: list[str] = []
    (answer,) = generate(
        lm,
        [Example({"text": "good"})],
        prompt,
        DecodeSettings(max_new_tokens=20),
        on_text=lambda _, piece: pieces.append(piece),
    )
    assert (answer.text, answer.finish_reason) == ("pos", "stop")
    assert "".join(pieces) == "pos"


def test_judging_counts_what_was_learned(says: Callable[[FrozenLM, str], None]) -> None:
    lm = base()
    template = Template.parse("{text} Kind:{label} ### that is all", target="label")
    rows = [Example({"text": "good", "label": "pos"})]
    asking = settled(JudgeSettings(), lm, template, rows)
    says(lm, "pos ### that is all</s>")
    metrics = metrics_named(["accuracy"])
    prompt = compile_prompt(lm, None, template=template)
    result = judge_rows(predictor(lm, prompt, template, metrics, asking), rows, metrics, template)
    assert result.rows[0].answer == "pos"
    assert result.estimates["accuracy"].value == 1.0
    assert result.rows[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("said", "text"), [("3.14.</s>", "3.14"), ("3.</s>", "3"), ("3.14</s>", "3.14"), ("a. b</s>", "a. b")]
)
def test_a_full_stop_behind_the_target_is_taken_off_the_end_alone(
    says: Callable[[FrozenLM, str], None], said: str, text: str
) -> None:
    lm = base()
    prompt = compile_prompt(lm, None, template=Template.parse("{text}:{label}.", target="label"))
    says(lm, said)
    pieces: list[str] = []
    how = DecodeSettings(max_new_tokens=20)
    (answer,) = generate(
        lm, [Example({"text": "pi"})], prompt, how, on_text=lambda _, piece: pieces.append(piece)
    )
    assert (answer.text, "".join(pieces)) == (text, text)


def test_end_tokens_of_the_config_and_the_generation_config_end_an_answer(
    says: Callable[[FrozenLM, str], None],
) -> None:
    tokenizer = chatty()
    start, end = (tokenizer.convert_tokens_to_ids(one) for one in ("<|im_start|>", "<|im_end|>"))
    model = tiny_model("Llama", vocab_size=330)
    model.config.eos_token_id = [1, start]
    model.generation_config.eos_token_id = end
    lm = FrozenLM.wrap(model, tokenizer)
    for closing in ("<|im_start|>", "<|im_end|>", "</s>"):
        says(lm, f"yes{closing} no")
        (answer,) = generate(lm, "hello", None, DecodeSettings(max_new_tokens=9))
        assert (answer.text, answer.finish_reason) == ("yes", "stop")
        says(lm, f"yes{closing} no")
        (on,) = generate(lm, "hello", None, DecodeSettings(max_new_tokens=9, ignore_end=True))
        assert on.tokens == 9


@pytest.mark.parametrize(
    ("layout", "eos", "end", "remarks"),
    [
        ("{text} Kind:{label}", "</s>", "never", 1),
        ("{text} Kind:{label}", None, "auto", 1),
        ("{text} Kind:{label}", "</s>", "auto", 0),
        ("{text} Kind:{label} ###", None, "never", 0),
        ("{text}{label}", None, "never", 1),
    ],
)
def test_a_task_whose_answers_have_no_end_is_remarked_on(
    layout: str, eos: str | None, end: End, remarks: int
) -> None:
    template = Template.parse(layout, target="label")
    rows = [Example({"text": "good", "label": "pos"})]
    shown = preview(template, rows, chatty(eos=eos), end=end)
    assert len(shown.remarks) == remarks
    assert all("Nothing ends an answer" in text for text in shown.remarks)


def test_a_prompt_learned_with_an_ending_text_is_right_when_it_generates(
    shared_data: Path, tmp_path: Path
) -> None:
    weights = shared_data / "weights" / "TinyStories-656K"
    if not weights.is_dir():
        pytest.skip("needs TinyStories-656K")
    texts = {"good film": "pos", "bad film": "neg", "fine film": "pos", "poor film": "neg"}
    rows = [
        Example({"text": text, "label": label}, row=row) for row, (text, label) in enumerate(texts.items())
    ]
    lm = FrozenLM.load(str(weights))
    recipe = Recipe.from_flags(
        {},
        [
            f"base={weights}",
            f"out={tmp_path / 'run'}",
            "data.source=unused",
            "data.target=label",
            "data.template={soft:4}{text} Kind: {label} ###",
            "tune.epochs=120",
        ],
    )
    tuned = tune(recipe, lm=lm, splits=Splits(tuple(rows)))
    template = Template.parse(tuned.prompt.template, target="label")
    asking = settled(JudgeSettings(), lm, template, rows)
    metrics = metrics_named(["accuracy"])
    compiled = compile_prompt(lm, tuned.prompt)
    result = judge_rows(predictor(lm, compiled, template, metrics, asking), rows, metrics, template)
    assert result.estimates["accuracy"].value == 1.0
