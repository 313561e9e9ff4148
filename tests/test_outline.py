"""A base without its weights tells of its texts what the whole base tells: so a preview reads none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from layouts import preview
from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.cli.app import main
from softprompt.errors import BaseError
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.task import read_splits, settle_template, task_of
from test_learn import learn, lm_of
from tiny_models import HEADS_OF_8, tiny_model, tiny_tokenizer

LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}


def save(folder: Path, model: Any, *, bos: bool = True) -> Path:
    """The base as transformers saves it."""
    model.save_pretrained(folder)
    tiny_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def gemma_that_sees() -> Any:
    """A Gemma 3 with an image tower: its language model's config is a part of its own."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**HEADS_OF_8, "max_position_embeddings": 96},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return AutoModelForCausalLM.from_config(config)


BASES: dict[str, Callable[[], Any]] = {
    "Llama": tiny_model,
    "ALiBi": lambda: tiny_model("BLOOM (ALiBi)"),
    "GPT-2": lambda: tiny_model("GPT-2"),
    "longrope": lambda: tiny_model("Phi-3 (sliding window)", **LONGROPE),
    "Gemma 3 with images": gemma_that_sees,
}


@pytest.mark.parametrize("base", BASES)
def test_a_preview_without_the_weights_is_that_of_the_whole_base(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among the rows are some that only the base's own length cuts; the start's text decides the slot's."""
    folder = save(tmp_path / "base", BASES[base]())
    (tmp_path / "rows.csv").write_text(
        "text\na quick fox\n" + "lazy dog " * 14 + "\n" + "lazy dog " * 60 + "\n"
    )
    settings = [f"base={folder}", "dtype=float32", f"data.source={tmp_path}/rows.csv", "data.column=text"]
    settings += ["data.on_overflow=truncate", "prompt.init_text=Classify the text"]
    recipe = Recipe.from_flags({}, settings)
    lm = FrozenLM.load(str(folder), dtype="float32", device="cpu")
    whole = preview(
        settle_template(recipe, lm),
        read_splits(recipe).train,
        lm.tokenizer,
        max_length=task_of(recipe, lm).max_positions,
        on_overflow="truncate",
    )
    assert (whole.truncated > 0) is (longest_text(lm) is not None)
    given = ["preview", *(part for one in settings for part in ("--set", one))]
    shown = []
    for weights in (True, False):
        if not weights:
            without_weights(folder)
        assert main([*given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(whole)))
        assert main(given) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    with pytest.raises(BaseError, match="cannot be loaded"):
        FrozenLM.load(str(folder), dtype="float32")


def test_the_bundled_base_in_outline() -> None:
    outline, lm = Outline.load(), FrozenLM.load(device="cpu")
    assert (outline.name, longest_text(outline)) == (lm.name, longest_text(lm))
    assert outline.fingerprint.layers == lm.num_layers


def test_a_start_from_a_prompt_gives_the_slots_length_and_a_base_of_other_layers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(tmp_path / "learned", lm=lm_of())
    (tmp_path / "rows.csv").write_text("text\na quick fox\n")
    given = ["preview", "--data", str(tmp_path / "rows.csv"), "--column", "text"]
    given += ["--set", f"prompt.init_from=[{tmp_path}/learned]", "--json", "--base"]
    assert main([*given, str(without_weights(save(tmp_path / "same", tiny_model(), bos=False)))]) == 0
    assert json.loads(capsys.readouterr().out)["template"] == "{soft:4}{text}"
    assert (
        main([*given, str(without_weights(save(tmp_path / "other", tiny_model(num_hidden_layers=3))))]) != 0
    )
    assert "learned on tiny (layers 2), but the loaded base is" in capsys.readouterr().err


def test_what_no_prompt_can_be_learned_on_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="there is no such folder"):
        Outline.load(str(tmp_path / "nowhere"))
    with pytest.raises(BaseError, match=r"a folder without config\.json"):
        Outline.load(str(tmp_path))
    with pytest.raises(BaseError, match="not a folder here"):
        Outline.load("no/such")
    for name, config, told in (
        ("encoder-decoder", T5Config(), "not a causal language model.*T5Config"),
        (
            "Gemma 3n",
            tiny_model("Gemma 3n (vectors for each token in every layer)").config,
            "looks up a vector for each token in every layer",
        ),
    ):
        config.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(BaseError, match=told):
            Outline.load(str(tmp_path / name))
    no_tokenizer = tmp_path / "no tokenizer"
    tiny_model().config.save_pretrained(no_tokenizer)
    with pytest.raises(BaseError, match="cannot be loaded"):
        Outline.load(str(no_tokenizer))


def test_a_base_with_code_of_its_own_is_read_only_on_trust(tmp_path: Path) -> None:
    folder = without_weights(save(tmp_path / "base", tiny_model()))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    for model in ({}, {"AutoModelForCausalLM": "own.OwnModel"}):
        config["auto_map"] |= model
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BaseError, match="brings its own code"):
            Outline.load(str(folder))
        if model:
            assert longest_text(Outline.load(str(folder), trust_remote_code=True)) == 128
        else:
            with pytest.raises(BaseError, match="not a causal language model"):
                Outline.load(str(folder), trust_remote_code=True)


def test_after_a_preview_the_weights_are_still_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache then has the tokenizer alone; both come anew, for the hub may have changed since."""
    asked: list[tuple[str, bool]] = []

    def tokenizer(where: str, *, local_files_only: bool, **options: Any) -> Any:
        asked.append(("tokenizer", local_files_only))
        return tiny_tokenizer()

    def model(where: str, *, local_files_only: bool, **options: Any) -> Any:
        asked.append(("weights", local_files_only))
        if local_files_only:
            raise OSError("there are no weights in the cache")
        assert options["output_loading_info"]
        return tiny_model().to(torch.float32), {}

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    assert FrozenLM.load("some/base", device="cpu").num_layers == 2
    assert asked == [("tokenizer", True), ("weights", True), ("tokenizer", False), ("weights", False)]
