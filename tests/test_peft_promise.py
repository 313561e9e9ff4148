"""adapter_config.json is a promise: where it is written real PEFT gives our logits, else PEFT finds no prompt."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.data.example import Example, Message, Splits
from softprompt.errors import PromptError
from softprompt.inference.compiled import as_deep, compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.prefill import prefill
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.peft_format import text_for_peft, why_not_peft
from softprompt.tuning.loop import tune
from softprompt.tuning.recipe import Recipe
from tiny_models import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEPT = [
    ("{soft:6}{text}", None),
    ("{soft:6} {text}", None),
    ("{soft:6}Tweet: {text}\nKind:{label}", "label"),
    ("{soft:6}{text}{label}", "label"),
    ("{soft:6}{messages}", None),
]
BROKEN = [
    ("Tweet: {soft:6}{text}", None, "before everything"),
    ("{text}{soft:6} Kind:{label}", "label", "before everything"),
    ("{soft:3}{text}{soft:3} Kind:{label}", "label", "before everything"),
    ("{soft:6}{text} Kind: {label}", "label", "white space before the answer"),
    ("{soft:6}{text} Kind:\n{label}", "label", "white space before the answer"),
    ("{soft:6}{text} Kind:{label} ###", "label", "after the answer"),
    ("{soft:6}System: brief. {messages}", None, "around a chat"),
]


def base(*, bos: bool = False) -> FrozenLM:
    tokenizer: PreTrainedTokenizerFast = copy.deepcopy(tiny_tokenizer(bos=bos))
    tokenizer.chat_template = CHATML
    return FrozenLM.wrap(tiny_model("Llama"), tokenizer, "tiny/base")


def prompt_for(lm: FrozenLM, template: str, target: str | None) -> SoftPrompt:
    vectors_PD = torch.randn(6, lm.width, generator=torch.Generator().manual_seed(3))
    return SoftPrompt(vectors_PD, lm.fingerprint, template, target, name="greet")


def example(template: str) -> Example:
    if "{messages}" in template:
        return Example({}, (Message("user", "my order never came"),))
    return Example({"text": "my order never came"})


def our_logits(lm: FrozenLM, prompt: Prompt, given: Example) -> torch.Tensor:
    compiled = compile_prompt(lm, prompt)
    with torch.no_grad():
        return lm.logits(prefill(lm, [compiled.row(compiled.marks(lm, given))]).hidden_BTD[0, -1])


def pefts_logits(lm: FrozenLM, prompt: Prompt, folder: Path) -> torch.Tensor:
    """As PEFT's user gets them from what the card says to give."""
    theirs = peft.PeftModel.from_pretrained(tiny_model("Llama"), folder).eval()
    if "{messages}" in prompt.template:
        ids = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": "my order never came"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    else:
        text = text_for_peft(prompt).format(text="my order never came")
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("template", "target"), KEPT)
def test_a_promised_prompt_gives_the_same_logits_in_peft(
    template: str, target: str | None, deep: bool, bos: bool, tmp_path: Path
) -> None:
    lm = base(bos=bos)
    prompt: Prompt = prompt_for(lm, template, target)
    if deep:
        prompt = as_deep(lm, prompt)
    assert why_not_peft(prompt) is None
    save_prompt(prompt, tmp_path)
    assert "peft.PeftModel.from_pretrained" in (tmp_path / "README.md").read_text()
    torch.testing.assert_close(
        pefts_logits(lm, prompt, tmp_path), our_logits(lm, prompt, example(template)), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("template", "target", "reason"), BROKEN)
def test_peft_finds_no_prompt_where_it_would_read_it_wrongly(
    template: str, target: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And we still load it; the card and the export verb say the same."""
    lm = base()
    prompt = prompt_for(lm, template, target)
    assert reason in str(why_not_peft(prompt))
    save_prompt(
        prompt_for(lm, "{soft:6}{text}", None), tmp_path
    )  # its adapter_config.json must not stay behind
    assert (tmp_path / "adapter_config.json").exists()
    save_prompt(prompt, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert "peft" not in (tmp_path / "README.md").read_text().lower()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(tiny_model("Llama"), tmp_path)
    assert load_prompt(tmp_path, base=lm.fingerprint) == prompt
    assert main(["export", str(tmp_path), "--to", "peft", "--out", str(tmp_path / "out")]) == 5
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_white_space_before_the_answer_is_where_pefts_tokens_differ(tmp_path: Path) -> None:
    """Why such a prompt is not promised: with the very text of the template PEFT's logits are others."""
    lm = base()
    prompt = prompt_for(lm, "{soft:6}{text} Kind: {label}", "label")
    given = Example({"text": "my order never came"})
    save_prompt(prompt_for(lm, "{soft:6}{text}", None), tmp_path)
    wrong = pefts_logits(lm, prompt, tmp_path)
    assert text_for_peft(prompt) == "{text} Kind: "
    assert float((wrong - our_logits(lm, prompt, given)).abs().max()) > 0.1


def saved_by_peft(task: str, folder: Path, **settings: object) -> None:
    classes = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
        "QUESTION_ANS": AutoModelForQuestionAnswering,
        "FEATURE_EXTRACTION": AutoModelForCausalLM,
        "CAUSAL_LM": AutoModelForCausalLM,
    }
    model = classes[task].from_config(tiny_model("Llama").config)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, **settings)
    peft.get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_a_peft_prompt_of_another_task_is_refused_by_name(task: str, tmp_path: Path) -> None:
    saved_by_peft(task, tmp_path)
    with pytest.raises(PromptError, match=f"task type {task}, wanted CAUSAL_LM"):
        load_prompt(tmp_path)


def test_a_peft_prompt_for_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    saved_by_peft("CAUSAL_LM", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PromptError, match="task type SEQ_2_SEQ_LM"):
        load_prompt(tmp_path)


def test_modules_and_tensors_beside_the_prompt_are_refused_by_name(tmp_path: Path) -> None:
    saved_by_peft("CAUSAL_LM", tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(PromptError, match=r"modules lm_head \(modules_to_save\)"):
        load_prompt(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(PromptError, match=r"also holds .*lm_head"):
        load_prompt(tmp_path)


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_base(eos: str) -> FrozenLM:
    """A base of turns that end in <|im_end|>, whose generate stops at `eos`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        eos_token=eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = TURNS
    model = tiny_model("Llama", vocab_size=322, eos_token_id=tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return FrozenLM.wrap(model, tokenizer, "tiny/chat")


def tuned(lm: FrozenLM, folder: Path, **data: str) -> Prompt:
    rows = [("my order never came", "complaint"), ("thank you", "praise")] * 3
    chats = [(Message("user", text), Message("assistant", label)) for text, label in rows]
    examples = tuple(
        Example({}, chat, row=row)
        if "template" in data and "messages" in data["template"]
        else Example({"text": text, "label": label}, row=row)
        for row, ((text, label), chat) in enumerate(zip(rows, chats, strict=True))
    )
    recipe = Recipe(
        data={"source": "rows", "validation": 0, **data},
        prompt={"length": 6},
        tune={"max_steps": 1},
        out=str(folder),
    )
    return tune(recipe, lm=lm, splits=Splits(examples), progress=False).prompt


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's own remark in every generate
@pytest.mark.parametrize("data", [{"target": "label"}, {"template": "{soft}{messages}"}])
def test_a_prompt_learned_in_a_chat_template_answers_alike_in_peft_where_the_base_stops_at_its_turns_end(
    data: dict[str, str], tmp_path: Path
) -> None:
    lm = chatml_base("<|im_end|>")
    prompt = tuned(lm, tmp_path, **data)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path).eval()
    asked = [{"role": "user", "content": "my order never came"}]
    found = lm.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    if "target" in data:  # what the card says to give is what the chat template writes
        text = text_for_peft(prompt).format(text="my order never came")
        assert lm.tokenizer(text)["input_ids"] == found["input_ids"][0].tolist()
    with torch.no_grad():
        logits = theirs(**found).logits[0, -1]
    compiled = compile_prompt(lm, prompt)
    given = compiled.template.example("my order never came")
    torch.testing.assert_close(logits, our_logits(lm, prompt, given), atol=2e-5, rtol=1e-4)
    (ours,) = generate(lm, [given], prompt, DecodeSettings(max_new_tokens=8))
    said = theirs.generate(**found, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert said[0, found["input_ids"].shape[1] :][: len(ours.token_ids)].tolist() == list(ours.token_ids)


@pytest.mark.parametrize("data", [{"target": "label"}, {"template": "{soft}{messages}"}])
def test_peft_is_not_promised_where_the_base_does_not_stop_at_the_learned_end(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Its generate stops at </s> alone, and answers were learned to end in <|im_end|>."""
    lm = chatml_base("</s>")
    prompt = tuned(lm, tmp_path / "run", **data)
    assert "generate past it" in str(why_not_peft(prompt))
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert "peft" not in (tmp_path / "run" / "README.md").read_text().lower()
    assert load_prompt(tmp_path / "run") == prompt


def test_a_blank_that_joins_the_answer_is_seen_in_the_rows(
    tmp_path: Path,
) -> None:
    lm = chatml_base("</s>")
    broken = tuned(lm, tmp_path / "blank", target="label", template="{soft:6}{text} Kind: {label}")
    assert "white space" in str(why_not_peft(broken))
    kept = tuned(lm, tmp_path / "none", target="label", template="{soft:6}{text} Kind:{label}")
    assert why_not_peft(kept) is None
