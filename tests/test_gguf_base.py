"""GGUF files as bases, against the transformers models that they were written from."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from softprompt.base import disk_cache, gguf_base
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.cli.app import main
from softprompt.errors import BaseError, MissingExtra, SaveError
from tiny_models import tiny_model, tiny_tokenizer

TEXT = "The quick brown fox"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "softprompt"


def as_llama_cpp_stores(weight_OI: Any, heads: int) -> Any:
    """Query and key rows in llama.cpp's order: each head's two halves interleaved."""
    width = weight_OI.shape[0] // heads // 2
    return weight_OI.reshape(heads, 2, width, -1).swapaxes(1, 2).reshape(weight_OI.shape)


def write(
    path: Path, model: Any, *, packed: bool = False, leave_out: str = "", scaling: bool = False
) -> Path:
    """The model and the tiny tokenizer as a GGUF file, by the package of llama.cpp's own authors."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, an optional package")
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        if "q_proj" in key or "k_proj" in key:
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            values = as_llama_cpp_stores(values, heads)
        name = names.get_name(key, try_suffixes=(".weight",))
        if name == leave_out:
            continue
        if packed and values.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes: Any) -> LlamaForCausalLM:
    model: Any = tiny_model("Llama", intermediate_size=64, tie_word_embeddings=False, **changes)
    return model


def logits(lm: FrozenLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits


def test_a_gguf_file_computes_what_the_model_that_it_was_written_from_computes(tmp_path: Path) -> None:
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-4)
    path = write(tmp_path / "tiny.gguf", model)
    lm = FrozenLM.load(str(path), dtype="float32", device="cpu")
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert lm.name == str(path)
    with torch.no_grad():
        torch.testing.assert_close(logits(lm, ids), model(input_ids=torch.tensor([ids])).logits)
    assert Outline.load(str(path)).config.rope_parameters["rope_theta"] == 5000.0


def test_packed_weights_come_out_as_their_nearest_plain_numbers(tmp_path: Path) -> None:
    """Q8_0 has 256 steps for each block of 32, from minus to plus its largest number."""
    model = llama()
    lm = FrozenLM.load(str(write(tmp_path / "t.gguf", model, packed=True)), dtype="float32", device="cpu")
    for key, weight in model.state_dict().items():
        off = (lm.model.state_dict()[key] - weight).abs().max()
        assert off <= weight.abs().max() * (1 / 254 + 2**-8), key  # half a step, and bfloat16's rounding
    assert not hasattr(lm.config, "quantization_config")


def test_a_file_is_converted_once_whatever_it_is_called(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path / "first.gguf", llama())
    (tmp_path / "elsewhere").mkdir()
    second = Path(shutil.copy(first, tmp_path / "elsewhere" / "second"))
    (second.parent / "config.json").write_text("{}")  # what lies beside the file is not part of it
    (second.parent / "adapter_config.json").write_text("{}")
    one = FrozenLM.load(str(first), device="cpu")
    monkeypatch.setattr(gguf_base, "convert", lambda *given: pytest.fail("it was converted again"))
    other = FrozenLM.load(str(second), device="cpu")
    assert one.weights_sha256() == other.weights_sha256()
    assert len(list((cache / "gguf").iterdir())) == 1


def test_other_content_under_the_same_name_is_another_base(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", llama())
    before = FrozenLM.load(str(path), device="cpu").weights_sha256()
    path.unlink()
    write(path, llama(seed=1))
    assert FrozenLM.load(str(path), device="cpu").weights_sha256() != before


def test_damaged_and_unsupported_files_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = write(tmp_path / "whole.gguf", llama()).read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "cut in its head": whole[:100],
        "nothing but its magic": b"GGUF",
        "of an architecture that nobody knows": whole.replace(b"llama", b"lhama"),
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(BaseError, match="this GGUF file cannot be read") as caught:
            FrozenLM.load(str(path))
        assert "\n" not in str(caught.value)
    (tmp_path / "no gguf.gguf").write_bytes(b"zip")
    with pytest.raises(BaseError, match="a file that is no GGUF file"):
        FrozenLM.load(str(tmp_path / "no gguf.gguf"))
    assert not list((cache / "gguf").iterdir())
    assert capfd.readouterr().err == ""


def test_what_transformers_would_leave_out_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "hole.gguf", llama(), leave_out="blk.1.attn_q.weight")
    with pytest.raises(BaseError, match=r"1 missing: model\.layers\.1\.self_attn\.q_proj\.weight"):
        FrozenLM.load(str(tmp_path / "hole.gguf"))
    write(tmp_path / "stretched.gguf", llama(), scaling=True)
    with pytest.raises(BaseError, match="stretches its rotary angles by a scaling of type linear"):
        FrozenLM.load(str(tmp_path / "stretched.gguf"))


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", llama())
    monkeypatch.setattr("softprompt.base.gguf_base.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'softprompt\[gguf\]'"):
        FrozenLM.load(str(path))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", llama())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SaveError, match="XDG_CACHE_HOME"):
        FrozenLM.load(str(path))


def test_the_command_line_takes_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "tiny.gguf", llama())
    assert main(["generate", "--base", str(path), "--max-new-tokens", "2", TEXT]) == 0
    assert capsys.readouterr().out.startswith(TEXT)


def test_a_files_digest_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "SETTLED_SECONDS", -1.0)
    computed: list[str] = []

    def compute() -> str:
        computed.append("once more")
        return str(len(computed))

    def digest(what: str = "x") -> str:
        return disk_cache.kept_digest(disk_cache.Stamp.of([path]), what, compute)

    path = tmp_path / "file"
    path.write_bytes(b"ab")
    assert [digest(), digest(), digest()] == ["1", "1", "1"]
    assert digest("y") == "2"
    time.sleep(0.02)
    path.write_bytes(b"ba")
    assert digest() == "3"
    monkeypatch.setattr(disk_cache, "SETTLED_SECONDS", 3600.0)
    path.write_bytes(b"bb")  # a change a moment ago is not relied on
    assert [digest(), digest()] == ["4", "5"]


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    lm = FrozenLM.load(str(smollm2), device="cpu")
    ids = lm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert lm.tokenizer.decode([int(lm.model(input_ids=ids).logits[0, -1].argmax())]) == " Paris"
