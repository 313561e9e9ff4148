"""What is refused as a base, and how: damaged files, foreign ones, adapters, sizes that do not fit, mistyped paths."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file

from softprompt.base.base_name import looks_like_path
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.locate import locate
from softprompt.base.outline import Outline
from softprompt.errors import BaseError, DataError
from tiny_models import tiny_model, tiny_tokenizer

Tensors = dict[str, torch.Tensor]


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (model or tiny_model("Llama")).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(base: Path | str, **options: Any) -> str:
    with pytest.raises(BaseError) as caught:
        FrozenLM.load(str(base), device="cpu", **{"dtype": "float32", **options})
    message = str(caught.value)
    assert message.startswith(str(base))
    assert "\n" not in message
    return message


def rename_head(tensors: Tensors) -> None:
    tensors["lm_heads.weight"] = tensors.pop("lm_head.weight")


def cut_a_matrix(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:40].clone()


def drop_a_layer(tensors: Tensors) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rename_head, ["1 missing: lm_head.weight", "no place for: lm_heads.weight"]),
        (drop_a_layer, ["9 missing: model.layers.1.", "and 6 more"]),
        (
            cut_a_matrix,
            ["1 of another shape: model.layers.0.mlp.up_proj.weight (found [40, 32], wanted [48, 32])"],
        ),
        (lambda tensors: tensors.update(more=torch.ones(2)), ["1 that the model has no place for: more"]),
    ],
)
def test_tensors_that_are_missing_foreign_or_of_another_shape_are_named(
    tmp_path: Path, damage: Callable[[Tensors], Any], told: list[str]
) -> None:
    base = saved(tmp_path / "base")
    change_tensors(base, damage)
    message = refusal(base)
    for part in told:
        assert part in message


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """Llama's weights under GPT-2's model_type: every tensor of GPT-2 is missing."""
    base = saved(tmp_path / "base")
    config = tiny_model("GPT-2").config.to_dict()
    (base / "config.json").write_text(json.dumps(config))
    assert "do not hold the weights of a GPT2LMHeadModel" in refusal(base)


def test_what_a_class_recomputes_or_ties_is_no_fault(tmp_path: Path) -> None:
    tied = saved(tmp_path / "tied", tiny_model("Llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    change_tensors(
        tied, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert FrozenLM.load(str(tied), device="cpu").num_layers == 2
    masks = saved(tmp_path / "masks", tiny_model("GPT-2"))
    old_names = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.ones(())}  # fmt: skip
    change_tensors(masks, lambda tensors: tensors.update(old_names))
    assert FrozenLM.load(str(masks), device="cpu").num_layers == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    base = saved(tmp_path / "base")
    change_tensors(base, spoil)
    assert "1 of its weights hold NaN or infinite numbers in float32: model.layers.1.mlp.down" in refusal(
        base
    )
    model = tiny_model("Llama")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(BaseError, match=r"mine: 1 of its weights.*model\.norm\.weight"):
        FrozenLM.wrap(model, tiny_tokenizer(), "mine")


def test_a_tokenizer_larger_than_the_table_is_refused_before_a_text_meets_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    larger = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>"
    )
    larger.add_tokens(["<tool>", "<call>"])
    base = saved(tmp_path / "base", tokenizer=larger)
    message = refusal(base)
    assert "its tokenizer has ids up to 321" in message
    assert "320 rows" in message
    assert "'<tool>', '<call>'" in message
    with pytest.raises(BaseError, match="ids up to 321"):
        FrozenLM.wrap(tiny_model("Llama"), larger)
    with pytest.raises(BaseError, match="ids up to 321"):
        Outline.load(str(base))


def test_padding_and_unknown_may_have_no_row_since_no_text_becomes_them() -> None:
    tokenizer = tiny_tokenizer()
    own = {"tokenizer_object": tokenizer.backend_tokenizer, "pad_token": "<none>", "unk_token": "<unknown>"}
    lm = FrozenLM.wrap(tiny_model("Llama"), type(tokenizer)(**own, eos_token="</s>"))
    assert max(lm.tokenizer.get_vocab().values()) == 321
    with pytest.raises(DataError, match=r"token id 32[01], wanted ids below 320"):
        lm.embed(torch.tensor(lm.tokenizer("a <unknown>")["input_ids"]))
    with pytest.raises(BaseError, match="Tokens without a row: '<end>'"):
        FrozenLM.wrap(tiny_model("Llama"), type(tokenizer)(**own, eos_token="<end>"))


def test_a_model_that_peft_has_wrapped_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT, an optional package")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("Llama"), config)
    with pytest.raises(BaseError, match=r"PeftModelForCausalLM.*merge_and_unload"):
        FrozenLM.wrap(wrapped, tiny_tokenizer())
    assert FrozenLM.wrap(wrapped.merge_and_unload(), tiny_tokenizer()).num_layers == 2


def test_what_is_no_causal_language_model_at_all_is_refused() -> None:
    with pytest.raises(BaseError, match="found a Linear"):
        FrozenLM.wrap(torch.nn.Linear(2, 2), tiny_tokenizer())
    with pytest.raises(BaseError, match="found a str"):
        FrozenLM.wrap("builtin", tiny_tokenizer())


def test_a_folder_with_a_base_and_an_adapter_is_refused_and_an_adapter_alone_names_its_base(
    tmp_path: Path,
) -> None:
    base = saved(tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert "holds a base and an adapter" in refusal(base)
    (base / "config.json").unlink()
    assert "the base that it was learned on: some/base." in refusal(base)


def test_files_that_are_no_base_say_what_is_wanted(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        message = refusal(base / name)
        assert "a file that is no GGUF file" in message
        assert f"Give the folder: {base}." in message
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "m.gguf").write_bytes(b"GGUF")
    assert f"Give the GGUF file itself: {tmp_path}/packed/m.gguf." in refusal(tmp_path / "packed")


def test_a_base_without_tokenizer_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_model("Llama").save_pretrained(folder)
    assert "its tokenizer cannot be loaded" in refusal(folder)


def test_messages_of_other_libraries_come_whole_or_cut_at_a_word(tmp_path: Path) -> None:
    cut = saved(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:1000])
    assert "transformers says: " in refusal(cut)
    unknown = saved(tmp_path / "unknown")
    change_config(unknown, model_type="never-heard-of")
    message = refusal(unknown)
    assert "never-heard-of" in message
    assert len(message) < 600
    broken = saved(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "config.json" in refusal(broken)


def test_a_mistyped_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*given: Any, **options: Any) -> Any:
        pytest.fail(f"the hub was asked for {given}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names = [
        "models/tinystory",
        "./x",
        "../x",
        "~/x",
        "/x",
        "a/b/c",
        "tiny.gguf",
        "m.safetensors",
        "a\\b",
        "x/",
    ]
    for name in names:
        for load in (FrozenLM.load, Outline.load):
            with pytest.raises(BaseError, match=r"there is no such folder|a hub id"):
                load(name)
    for name in ("", " ", "two words", "a b/c"):
        with pytest.raises(BaseError, match=r"empty name|nor a hub id"):
            Outline.load(name)


def test_hub_ids_stay_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "bigscience/bloomz-560m", "Qwen/Qwen2.5-0.5B"):
        assert not looks_like_path(name)
        assert locate(name) == (name, name)
    shutil.copytree(saved(tmp_path / "base"), tmp_path / "gpt2")  # a folder of that name is nearer
    assert locate("gpt2") == ("gpt2", "gpt2")
    assert FrozenLM.load("gpt2", device="cpu").num_layers == 2


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "the hub has no such model, or not for you"),
        (403, "GatedRepo", "those alone who were granted access"),
        (404, "RevisionNotFound", "not this revision of it"),
        (401, "", "the hub does not give it"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, said: str
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *given: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        with pytest.raises(BaseError, match=said) as error:
            FrozenLM.load("someone/something", device="cpu")
        hub.shutdown()
    assert str(error.value).startswith("someone/something: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cause", [ConnectionRefusedError("Connection refused"), socket.gaierror(-2, "Name or service not known")]
)
def test_a_hub_that_cannot_be_reached_is_called_so(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    def unreachable(*given: Any, **options: Any) -> Any:
        try:
            try:
                raise cause
            except OSError as error:
                raise LocalEntryNotFoundError("not in the cache") from error
        except LocalEntryNotFoundError as error:
            raise OSError("We couldn't connect") from error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(BaseError, match=f"the hub does not give it .*{cause.args[-1]}.* Check the network"):
        FrozenLM.load("someone/something", device="cpu")


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_download_shows_the_hubs_bars_on_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_a_terminal: bool
) -> None:
    shown = []

    def asked(*given: Any, local_files_only: bool, **options: Any) -> Any:
        shown.append((local_files_only, not are_progress_bars_disabled()))
        raise OSError("not here")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_a_terminal)
    before = are_progress_bars_disabled()
    with pytest.raises(BaseError):
        FrozenLM.load("someone/something", device="cpu")
    assert shown == [(True, False), (False, on_a_terminal)]
    assert are_progress_bars_disabled() == before
    said = "someone/something: not in the local hub cache, so the hub is asked\n"
    assert capsys.readouterr().err == said * on_a_terminal
