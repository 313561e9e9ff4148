"""Many prompts as added tokens in one copy of the base: what plain transformers makes of it, which knows no soft prompts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.data.example import Example, Message
from softprompt.errors import PromptError
from softprompt.export.gguf_ready import gguf_ready
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.store.artifact import save_prompt
from test_begun import deep_of
from test_export import CHAT_TEMPLATE
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["The quick brown fox", "Tweet: my order never came"]
EIGHT = DecodeSettings(max_new_tokens=8, ignore_end=True)


def base(architecture: str = "Llama") -> FrozenLM:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return FrozenLM.wrap(tiny_model(architecture), tokenizer, "tiny")


def prompts_of(lm: FrozenLM) -> list[Any]:
    return [
        prompt_of(lm, 1, "plain"),
        prompt_of(lm, 2, "around", "Tweet: {text}{soft:4} Complaint?"),
        prompt_of(lm, 3, "polite", "{soft:4}{messages}"),
        prompt_of(lm, 4, "rude", "Be brief. {soft:4}{messages}"),
    ]


def continued(model: Any, ids: torch.Tensor) -> list[int]:
    """Greedy tokens of plain transformers, without the list of suppressed tokens, which engines of GGUF files do not read."""
    model.generation_config.suppress_tokens = None
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_one_copy_serves_every_prompt_by_its_text_or_its_name_in_the_chat_template(
    architecture: str, tmp_path: Path
) -> None:
    lm = base(architecture)
    before = lm.weights_sha256()
    prompts = prompts_of(lm)
    about = gguf_ready(lm, prompts, tmp_path / "copy")
    assert lm.weights_sha256() == before
    assert json.loads((tmp_path / "copy" / "softprompt_merged.json").read_text())["prompts"] == about
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for text in TEXTS:
        # Nothing but the added tokens is new: texts are read as before, of which the converter knows the tokenizer.
        assert tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
        for prompt in prompts[:2]:
            ids = tokenizer(about[prompt.name]["text"].replace("{text}", text), return_tensors="pt")
            (ours,) = generate(lm, [text], prompt, EIGHT)
            assert continued(model, ids["input_ids"]) == list(ours.token_ids)
        turns = [{"role": "user", "content": text}]
        for prompt in (*prompts[2:], None):
            named = {} if prompt is None else {"softprompt": prompt.name}
            chat: Any = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **named
            )
            ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
            example = Example({}, (Message("user", text),))
            if prompt is None:
                assert chat == lm.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
                continue
            (ours,) = generate(lm, [example], prompt, EIGHT)
            assert continued(model, ids["input_ids"]) == list(ours.token_ids)


def test_added_tokens_are_no_likelier_than_the_least_likely_token(tmp_path: Path) -> None:
    lm = base()
    gguf_ready(lm, prompts_of(lm), tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(logits[: lm.vocab_size], lm.model(input_ids=ids).logits[0, -1])
    added = logits[lm.vocab_size :]
    assert len(added) == 16
    assert torch.equal(added, added[:1].expand(16))  # all have one row
    assert added[0] < logits[: lm.vocab_size].quantile(0.2)


def test_prompts_that_cannot_be_tokens_and_two_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = base()
    with pytest.raises(PromptError, match="deep prompt"):
        gguf_ready(lm, [deep_of(lm)], tmp_path / "copy")
    with pytest.raises(PromptError, match="another name"):
        gguf_ready(lm, [prompt_of(lm, 1, "a"), prompt_of(lm, 2, "a")], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    monkeypatch.chdir(tmp_path)
    lm.model.save_pretrained("base")
    lm.tokenizer.save_pretrained("base")
    lm = FrozenLM.load("base", dtype="float32")
    for prompt in prompts_of(lm)[:2]:
        save_prompt(prompt, prompt.name)
    arguments = ["export", "plain", "around", "--to", "gguf-ready", "--out", "copy", "--dtype", "float32"]
    assert main(arguments) == 0
    assert "convert_hf_to_gguf.py copy" in capsys.readouterr().out
    assert main(arguments) != 0  # nothing is replaced unasked
    assert main([*arguments, "--overwrite"]) == 0
