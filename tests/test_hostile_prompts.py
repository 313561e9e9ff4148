"""A prompt's files may come from anyone: whatever is in them, the prompt loads or one line says why not."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.prompt.soft_prompt import DeepPrompt, Fingerprint, SoftPrompt
from softprompt.store.artifact import CONFIG, OURS, TENSORS, load_prompt, prompt_bytes, save_prompt

BASE = Fingerprint("tiny/base", width=4, layers=2)


def soft(**changes: Any) -> SoftPrompt:
    about = {"base": BASE, "template": "{soft:2}{text}", "name": "greet", "notes": {"metrics": {"nll": 1.5}}}
    return SoftPrompt(torch.ones(2, 4), **{**about, **changes})


def deep() -> DeepPrompt:
    return DeepPrompt(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), BASE, "{soft:2}{text}")


@functools.cache
def saved(kind: str) -> dict[str, bytes]:
    """The files of a folder: ours, PEFT's alone, or as version 0.1 wrote them."""
    with tempfile.TemporaryDirectory() as folder:
        save_prompt(deep() if kind == "deep" else soft(), folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if kind == "peft":
        del files[OURS]
    if kind == "0.1":
        ours = json.loads(files[OURS])
        files[OURS] = json.dumps(
            {k: v for k, v in ours.items() if k not in ("files", "folder", "shape", "peft")}
        ).encode()
    return files


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def one_line(folder: Path) -> str:
    """How the folder is refused; empty where it loads."""
    try:
        prompt = load_prompt(folder)
    except PromptError as error:
        return str(error)
    assert prompt.length >= 1
    assert repr(prompt)
    return ""


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(
            [10**8, 10**30, -1, 0, 2**63, 1e308, float("nan"), float("inf"), "\ud800", "../../x", "\x1b[31m"]
        ),
        st.text(max_size=8),
        st.sampled_from(
            ["soft", "deep", "PROMPT_TUNING", "PREFIX_TUNING", "LORA", "SEQ_CLS", "{soft:9}{x}", "{"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, bytes]:
    """A saved folder in whose JSON some values were replaced, removed or added, or some bytes changed."""
    files = dict(saved(draw(st.sampled_from(["soft", "deep", "peft", "0.1"]))))
    name = draw(st.sampled_from([name for name in (OURS, CONFIG) if name in files]))
    if draw(st.booleans()):
        value = copy.deepcopy(json.loads(files[name]))
        for _ in range(draw(st.integers(1, 3))):
            target = value
            key = draw(st.sampled_from([*sorted(value), "new"]))
            if isinstance(value.get(key), dict) and draw(st.booleans()):
                target = value[key]
                key = draw(st.sampled_from([*sorted(target), "new"]))
            if draw(st.integers(0, 3)) == 0:
                target.pop(key, None)
            else:
                target[key] = draw(VALUES)
        files[name] = json.dumps(value).encode()
    else:
        content = bytearray(files[name])
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
        files[name] = bytes(content)
    return files


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_whatever_stands_in_the_json_the_prompt_loads_or_is_refused_in_one_line(
    files: dict[str, bytes],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert "\n" not in one_line(put(Path(folder), files))


@pytest.mark.parametrize("name", [OURS, CONFIG])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"num_virtual_tokens": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"name": "\xff\xfe"}', "utf-8"),
        (b'{"name": "\\ud800"}', "surrogates"),
        (b"[1]", "found a list, wanted a JSON object"),
        (b"", "cannot be read as JSON"),
    ],
    ids=["lists", "objects", "digits", "bytes", "surrogate", "list", "empty"],
)
def test_json_out_of_bounds_is_refused_at_once(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    put(tmp_path, {**saved("peft"), name: content})
    with pytest.raises(DamagedPrompt, match=reason):
        load_prompt(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_virtual_tokens": 10**8}, "less than or equal to 1000000"),
        ({"num_virtual_tokens": 10**30}, "num_virtual_tokens"),
        ({"num_virtual_tokens": "2"}, "valid integer"),
        ({"num_virtual_tokens": True}, "valid integer"),
        ({"num_virtual_tokens": float("nan")}, "valid integer"),
        ({"num_virtual_tokens": None}, "wanted floating-point numbers with None rows"),
        ({"base_model_name_or_path": ["a"]}, "valid string"),
        ({"token_dim": -4}, "greater than or equal to 0"),
    ],
)
def test_a_peft_config_of_wrong_types_is_refused_by_key(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    files = saved("peft")
    put(tmp_path, {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **change}).encode()})
    with pytest.raises(DamagedPrompt, match=reason):
        load_prompt(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"base": []},
        {"base": {"name": 7}},
        {"base": {"name": "b", "width": -1}},
        {"base": {"name": "b", "width": 10**20}},
        {"base": {}},
        {"base": {"name": "b", "config": "["}},
        {"base": {"name": "b", "config": "[1]"}},
        {"base": {"name": "b", "config": "[" * 100_000}},
        {"base": {"name": "b", "config": '{"a": ' * 100 + "1" + "}" * 100}},
        {"base": {"name": "b", "config": "1" * 300_000}},
        {"shape": [2]},
        {"shape": [4, 2]},
        {"shape": [2, 2, 2]},
        {"kind": "hard"},
        {"drafts": "../../../etc"},
        {"tensors_sha256": 5},
        {"notes": [1]},
        {"template": 3},
        {"name": "n" * 5000},
    ],
)
def test_a_softprompt_json_of_wrong_types_is_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    files = saved("soft")
    put(tmp_path, {**files, OURS: json.dumps({**json.loads(files[OURS]), **change}).encode()})
    with pytest.raises(DamagedPrompt):
        load_prompt(tmp_path)


def test_a_prompt_of_a_newer_format_asks_for_a_newer_softprompt(tmp_path: Path) -> None:
    files = saved("soft")
    put(tmp_path, {**files, OURS: json.dumps({**json.loads(files[OURS]), "format": 99}).encode()})
    with pytest.raises(PromptError, match="Upgrade softprompt"):
        load_prompt(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64]
)
def test_tensors_of_odd_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    files = saved("peft")
    content = safetensors.torch.save({"prompt_embeddings": torch.ones(2, 4).to(dtype)})
    put(tmp_path, {**files, TENSORS: content})
    with pytest.raises(DamagedPrompt, match=r"wanted floating-point numbers"):
        load_prompt(tmp_path)


@pytest.mark.parametrize("name", [OURS, CONFIG, TENSORS])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    put(tmp_path, saved("soft" if name == OURS else "peft"))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DamagedPrompt, match=r"not a plain file|a named pipe"):
        load_prompt(tmp_path)


def test_a_folder_of_version_0_1_loads_with_everything(tmp_path: Path) -> None:
    prompt = load_prompt(put(tmp_path, saved("0.1")))
    assert prompt == soft()
    assert prompt.notes == {"metrics": {"nll": 1.5}}
    assert prompt_bytes(tmp_path) == len(saved("0.1")[TENSORS])


def test_a_copied_or_renamed_folder_goes_by_its_new_name(tmp_path: Path) -> None:
    save_prompt(soft(name="greet"), tmp_path / "runs-1")
    assert load_prompt(tmp_path / "runs-1").name == "greet"  # a name of its own, given on purpose
    shutil.copytree(tmp_path / "runs-1", tmp_path / "mine")
    (tmp_path / "runs-1").rename(tmp_path / "old")
    assert load_prompt(tmp_path / "mine").name == "mine"
    assert load_prompt(tmp_path / "old").name == "old"


# The card


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return dict(yaml.safe_load(text.split("\n---\n")[0]))


@pytest.mark.parametrize(
    "template",
    ["{soft:2}{text}\n---\nbase_model: evil/base\n---\n", "{soft:2}```\n# {text}", "{soft:2}`{text}`: <b>"],
)
def test_the_card_survives_what_stands_in_a_template(template: str, tmp_path: Path) -> None:
    """As the hub's own library reads it: the front matter is ours, and the template is in the text in full."""
    save_prompt(soft(template=template, name="a\nb: [c]"), tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.base_model == "tiny/base"
    assert loaded.data.library_name == "softprompt"
    assert loaded.data.model_name == "a b: [c]"
    assert template in loaded.text
    assert front_matter(tmp_path)["base_model"] == "tiny/base"


def test_the_hubs_library_reads_the_figures_off_the_card(tmp_path: Path) -> None:
    notes = {
        "metrics": {"nll_after": 1.25, "steps": 3, "broken": float("nan")},
        "data": {"source": "builtin:messages"},
    }
    save_prompt(soft(notes=notes), tmp_path)
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("nll_after", 1.25)
    assert result.dataset_name == "builtin:messages"


def test_no_absolute_path_is_in_the_card(tmp_path: Path) -> None:
    notes = {"metrics": {"nll": 1.5}, "data": {"source": "/home/ann/secret/rows.csv"}}
    base = Fingerprint("/home/ann/models/small", width=4)
    save_prompt(soft(base=base, notes=notes), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "/home" not in text
    assert "ann" not in text
    assert "small" in text
    assert load_prompt(tmp_path).base.name == "/home/ann/models/small"  # where this machine finds it
