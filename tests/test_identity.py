"""A prompt belongs to all of its base: weights, config and tokenizer, whatever the files and dtype they came in."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_checkpoint
from softprompt.base import disk_cache, identity
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.cli.app import main
from softprompt.errors import RecipeError, WrongBase
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.tuning import checkpoint
from softprompt.tuning.recipe import Recipe
from test_learn import lm_of
from tiny_models import tiny_model, tiny_tokenizer

# What version 0.1 recorded of the bundled base (docs/report of that version).
BUILTIN_0_1 = "499519efd78bdfacd8e97fd066643993c8813e1710aa1bb7dbe235e6a9924caa"
LARGE = {"hidden_size": 256, "intermediate_size": 1024}  # matrices of four times the values that 0.1 sampled


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of this test alone, in which digests of new files are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_cache, "SETTLED_SECONDS", -1.0)


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (model or tiny_model("Llama")).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: str = "float32") -> Fingerprint:
    return FrozenLM.load(str(folder), dtype=dtype, device="cpu").fingerprint


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def difference(before: Fingerprint, after: Fingerprint) -> str:
    """What WrongBase says of the two; both ways round it is refused."""
    with pytest.raises(WrongBase):
        after.demand(before, "p")
    with pytest.raises(WrongBase) as caught:
        before.demand(after, "p")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps was 1e-06, is 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act was silu, is gelu"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_parameters.rope_theta was 10000.0, is 500.0",
        ),
    ],
)
def test_a_config_that_computes_otherwise_is_another_base_and_the_setting_is_named(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    base = saved(tmp_path / "base")
    before = loaded(base)
    outline = Outline.load(str(base)).fingerprint
    change_json(base / "config.json", lambda config: config.update(change))
    assert told in difference(before, loaded(base))
    assert told in difference(before, Outline.load(str(base)).fingerprint)
    assert told in difference(outline, loaded(base))


def test_settings_that_change_no_logits_do_not_count(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    before = loaded(base)
    quiet = {"use_cache": False, "transformers_version": "4.0", "attention_dropout": 0.5, "pad_token_id": 3}
    change_json(base / "config.json", lambda config: config.update(quiet))
    assert loaded(base).parts == before.parts
    known_now = dataclasses.replace(before, config=json.dumps(json.loads(before.config) | {"new_switch": 1}))
    before.demand(known_now, "p")  # a later transformers knows one setting more
    known_now.demand(before, "p")


def test_few_zeroed_weights_that_version_0_1_did_not_look_at_are_seen(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_model("Llama", **LARGE))
    before = loaded(base)
    tensors = load_file(base / "model.safetensors")
    matrix = tensors["model.layers.0.mlp.up_proj.weight"].view(-1)
    assert matrix.numel() == 4 * identity.SAMPLED_VALUES
    matrix[1::4] = 0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    after = loaded(base)
    assert after.sha256 == before.sha256
    assert "the same sizes and other weights" in difference(before, after)


def test_layers_that_changed_places_are_seen() -> None:
    model = tiny_model("Llama")
    swapped = copy.deepcopy(model)
    layers = swapped.model.layers
    state = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for layer, other in zip(layers, reversed(state), strict=True):
        layer.load_state_dict(other)
    before, after = (FrozenLM.wrap(one, tiny_tokenizer()).fingerprint for one in (model, swapped))
    assert after.sha256 == before.sha256
    assert "other weights" in difference(before, after)


def swap_two_ids(content: Any) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def lower_case(content: Any) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def forget_merges(content: Any) -> None:
    content["model"]["merges"] = content["model"]["merges"][:5]


@pytest.mark.parametrize("change", [swap_two_ids, lower_case, forget_merges])
def test_a_tokenizer_that_gives_other_ids_is_another_base(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    base = saved(tmp_path / "base")
    before = loaded(base)
    change_json(base / "tokenizer.json", change)
    assert "the same sizes and other tokenizer" in difference(before, loaded(base))
    assert "other tokenizer" in difference(before, Outline.load(str(base)).fingerprint)


def test_a_start_token_belongs_to_the_tokenizer_and_a_chat_template_does_not(tmp_path: Path) -> None:
    plain = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer()).fingerprint
    with_bos = FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(bos=True)).fingerprint
    assert "other tokenizer" in difference(plain, with_bos)
    base = saved(tmp_path / "base")
    before = loaded(base)
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert loaded(base) == before


@pytest.mark.parametrize(
    "architecture",
    [
        "BLOOM (ALiBi)",
        "GPT-2",
        "GPT-J",
        "OPT",
        "Llama",
        "Qwen3",
        "Gemma 3 (sliding window)",
        "Falcon (rotary, grouped heads)",
        "Phi-3 (sliding window)",
        "Mixtral (experts)",
        "gpt-oss (experts, sliding window)",
        "DeepSeek-V3 (latent heads, experts)",
    ],
)
def test_it_is_the_same_in_either_dtype_from_other_files_without_weights_and_in_memory(
    tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture)
    base = saved(tmp_path / "base", model)
    whole = loaded(base)
    assert loaded(base, "bfloat16") == whole
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert loaded(tmp_path / "shards").parts == whole.parts
    assert FrozenLM.wrap(model, tiny_tokenizer()).fingerprint.digest == whole.digest
    outline = Outline.load(str(base)).fingerprint
    assert (outline.config, outline.tokenizer_sha256) == (whole.config, whole.tokenizer_sha256)


def test_digests_are_computed_once_for_files_and_again_when_a_byte_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "base")
    first = loaded(base)
    with monkeypatch.context() as patch:
        for name in ("compute_weights_sha256", "compute_tokenizer_sha256"):
            patch.setattr(identity, name, lambda *given: pytest.fail("it was computed again"))
        assert loaded(base) == first
    path = base / "model.safetensors"
    times = path.stat()
    with path.open("r+b") as file:  # one value's exponent, and the clock set back as rsync and tar do
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start + 4 * 100 + 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x01]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert loaded(base).weights_sha256 != first.weights_sha256


def prompt_of_0_1(folder: Path, sha256: str) -> Path:
    """A prompt of the bundled base as version 0.1 wrote it."""
    lm = FrozenLM.load("builtin", dtype="float32", device="cpu")
    save_prompt(SoftPrompt(torch.ones(3, lm.width), lm.fingerprint, "{soft:3}{text}"), folder)

    def as_then(ours: Any) -> None:
        keys = ("name", "revision", "width", "layers", "vocabulary", "kv_heads", "head_width")
        ours["base"] = {key: ours["base"][key] for key in keys} | {"sha256": sha256}

    change_json(folder / "softprompt.json", as_then)
    return folder


def test_a_prompt_of_version_0_1_still_loads_on_its_base_and_is_said_to_be_known_less_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = FrozenLM.load("builtin", dtype="float32", device="cpu")
    folder = prompt_of_0_1(tmp_path / "old", BUILTIN_0_1)
    prompt = load_prompt(folder, base=lm.fingerprint)
    assert prompt.base.sampled_only
    assert not lm.fingerprint.sampled_only
    assert main(["inspect", str(folder)]) == 0
    assert "as version 0.1 recorded it" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(WrongBase, match="other weights"):
        load_prompt(prompt_of_0_1(tmp_path / "foreign", "0" * 64), base=lm.fingerprint)


def test_a_run_goes_on_over_the_same_base_alone_and_names_what_changed() -> None:
    recipe = Recipe.from_flags({}, ["data.source=rows.csv", "data.column=text"])
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer()
    now = FrozenLM.wrap(model, tokenizer).fingerprint
    then = checkpoint.identity(recipe, now, "rows")
    checkpoint.demand_same(then, then, "runs/x")
    model.config.rms_norm_eps = 1e-3
    changed = checkpoint.identity(recipe, FrozenLM.wrap(model, tokenizer).fingerprint, "rows")
    with pytest.raises(RecipeError, match=r"the base's rms_norm_eps was 1e-06, is 0\.001"):
        checkpoint.demand_same(then, changed, "runs/x")
    other = checkpoint.identity(
        recipe, FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(bos=True)).fingerprint, "rows"
    )
    with pytest.raises(RecipeError, match="the base's tokenizer was"):
        checkpoint.demand_same(then, other, "runs/x")
    # A checkpoint of version 0.1 knows a sample of the weights.
    old = checkpoint.identity(recipe, Fingerprint("tiny", sha256=now.sha256), "rows")
    checkpoint.demand_same(old, then, "runs/x")
    with pytest.raises(RecipeError, match="the base's weights was"):
        checkpoint.demand_same(old | {"the base's weights": "0" * 64}, then, "runs/x")


def test_a_killed_run_is_not_resumed_on_a_base_whose_config_changed(tmp_path: Path) -> None:
    test_checkpoint.cut_short(tmp_path / "p")
    changed = copy.deepcopy(lm_of().model)
    changed.config.rms_norm_eps = 0.25
    for module in changed.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.25
    lm = FrozenLM.wrap(changed, tiny_tokenizer(), "tiny")
    with pytest.raises(RecipeError, match=r"the base's rms_norm_eps was 1e-06, is 0\.25"):
        test_checkpoint.learn(tmp_path / "p", lm=lm, resume=True)
