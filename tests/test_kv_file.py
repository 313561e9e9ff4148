"""Files of keys and values, and which slots of a paged cache they fill: what vLLM's connector does, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.identity import sampled_sha256
from softprompt.base.kv import batch_cache
from softprompt.cli.app import main
from softprompt.errors import DamagedPrompt, PromptError
from softprompt.export.kv_file import file_of, placeholder_ids, read_header, read_kv, shared, write_kv
from softprompt.export.states import save_kv
from softprompt.inference.compiled import as_deep, compile_prompt
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.scale.kv_loading import POSITIONS, LoadedStates, Scheduling, own_heads
from softprompt.store.artifact import save_prompt
from softprompt.store.library import digest_of
from test_begun import deep_of
from test_serving import prompt_of
from tiny_models import tiny_model, tiny_tokenizer

TEXT = "Tweet: my order never came"


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM.wrap(tiny_model("Llama"), tiny_tokenizer(), "tiny")


def prompts(lm: FrozenLM) -> list[Any]:
    soft = prompt_of(lm, 1, "soft", "Be brief. {soft:4}{text} Answer:")
    return [soft, deep_of(lm), as_deep(lm, prompt_of(lm, 2, "was-soft"))]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_model_that_starts_from_the_file_gives_the_logits_of_the_whole_sequence(
    lm: FrozenLM, tmp_path: Path, number: int
) -> None:
    """The independent road: transformers' own cache, filled from the file, over the row's remaining tokens."""
    from transformers import DynamicCache

    prompt = prompts(lm)[number]
    header, keys, values = read_kv(save_kv(lm, prompt, tmp_path))
    compiled = compile_prompt(lm, prompt)
    marks = compiled.marks(lm, TEXT)
    used = shared(header, marks)
    assert used == header.positions == len(header.marks)
    assert all(mark >= 0 for mark in marks[used:])
    pairs = [(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in zip(keys, values, strict=True)]
    with torch.no_grad():
        logits = lm.model(
            input_ids=torch.tensor([marks[used:]]), past_key_values=DynamicCache(pairs), use_cache=True
        ).logits[0, -1]
        whole = lm.logits(_hidden(lm, compiled, marks))
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=1e-4)
    assert header.base_sha256 == lm.fingerprint.sha256
    assert header.digest == digest_of(prompt)


def _hidden(lm: FrozenLM, compiled: Any, marks: list[int]) -> torch.Tensor:
    """The last hidden state of a sequence; for vectors by their embeddings, for a deep prompt behind its own keys."""
    if compiled.vectors_PD is not None:
        rows = [
            compiled.vectors_PD[-1 - mark] if mark < 0 else lm.embed(torch.tensor([mark]))[0]
            for mark in marks
        ]
        embeddings = torch.stack(rows)[None]
        mask = torch.ones(1, len(marks), dtype=torch.int64)
        return lm.hidden(embeddings, mask, torch.arange(len(marks))[None])[0, -1]
    cache, columns = batch_cache([compiled.state])
    ids = torch.tensor([marks[columns:]])
    mask = torch.ones(1, len(marks), dtype=torch.int64)
    return lm.hidden(lm.embed(ids), mask, torch.arange(columns, len(marks))[None], past=cache)[0, -1]


def test_a_row_takes_over_what_it_shares_and_its_last_position_is_computed(
    lm: FrozenLM, tmp_path: Path
) -> None:
    header = read_header(save_kv(lm, prompts(lm)[0], tmp_path))
    marks = list(header.marks)
    assert shared(header, [*marks, 5, 6]) == len(marks)
    assert shared(header, [*marks[:3], 7, *marks[4:], 5]) == 3
    assert shared(header, marks) == len(marks) - 1
    assert shared(header, [9, 9]) == 0


def test_vectors_behind_the_rows_text_are_refused(lm: FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="behind text of the row"):
        save_kv(lm, prompt_of(lm, 1, "soft", "{text}{soft:4} go"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_changed_or_named_otherwise_is_refused(lm: FrozenLM, tmp_path: Path) -> None:
    path = save_kv(lm, prompts(lm)[0], tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert read_header(path).positions > 0  # the scheduler reads no tensors
    with pytest.raises(DamagedPrompt, match="not what was written"):
        read_kv(path)
    other = file_of(tmp_path, "0" * 64)
    path.rename(other)
    with pytest.raises(DamagedPrompt, match="named by their digest"):
        read_header(other)
    other.write_bytes(b"nonsense")
    with pytest.raises(DamagedPrompt):
        read_header(other)
    safetensors.torch.save_file({"keys": torch.zeros(1)}, other)
    with pytest.raises(DamagedPrompt, match="format"):
        read_header(other)
    for name in ("..", "../x", "A" * 64, ""):
        with pytest.raises(PromptError, match="digest"):
            file_of(tmp_path, name)


def test_placeholders_belong_to_their_digest_alone() -> None:
    one, other = (placeholder_ids(digest * 64, 50, 49_152) for digest in "ab")
    assert one == placeholder_ids("a" * 64, 50, 49_152)
    assert one[:20] == placeholder_ids("a" * 64, 20, 49_152)
    assert sum(a == b for a, b in zip(one, other, strict=True)) <= 1
    assert all(0 <= token < 7 for token in placeholder_ids("a" * 64, 50, 7))


def scheduling(lm: FrozenLM, folder: Path, **changes: Any) -> Scheduling:
    shape = (lm.num_layers, int(lm.fingerprint.kv_heads), int(lm.fingerprint.head_width))
    settings: dict[str, Any] = {
        "block_size": 16,
        "vocabulary": lm.vocab_size,
        "shape": shape,
        "base_sha256": lm.fingerprint.sha256,
    }
    return Scheduling(folder, **{**settings, **changes})


def test_what_is_loaded_for_a_request_and_where_it_goes(lm: FrozenLM, tmp_path: Path) -> None:
    """Blocks of 4 positions by hand: 10 positions into blocks 7, 2 and 9, of which the first 4 are there already."""
    digest = "c" * 64
    keys = torch.zeros(2, 10, 2, 8)
    header = {
        "digest": digest,
        "name": "p",
        "kind": "deep",
        "marks": list(range(-1, -11, -1)),
        "dtype": "float32",
    }
    write_kv(file_of(tmp_path, digest), {**header, "base": "b", "base_sha256": "s"}, keys, keys + 1)
    plans = scheduling(lm, tmp_path, block_size=4, vocabulary=100, shape=(2, 2, 8), base_sha256="s")
    ids = [*placeholder_ids(digest, 10, 100), 1, 2]
    params = {"softprompt": digest, POSITIONS: 10}
    assert plans.matched(None, ids, None, 0) == 0
    assert plans.matched({"other": 1}, ids, None, 0) == 0
    assert plans.matched(params, ids, digest, 0) == 10
    assert plans.matched(params, ids, digest, 4) == 6
    assert plans.matched(params, ids, digest, 12) == 0
    plans.allocated("r", params, ids, digest, [7, 2, 9], 6)
    (load,) = plans.take()
    assert (load.start, load.end, load.fault) == (4, 10, None)
    assert load.slots == (8, 9, 10, 11, 36, 37)
    assert load.blocks == (2, 9)
    assert plans.take() == []
    plans.allocated("r", params, ids, digest, [7, 2, 9], 0)
    assert plans.take() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "f" * 64}, "no such file"),
        ({"digest": "../../etc/passwd"}, "wanted a prompt's digest"),
        ({"digest": None}, "wanted softprompt"),
        ({"positions": 99}, "asks for 99"),
        ({"positions": "4"}, "wanted softprompt"),
        ({"positions": -1}, "wanted softprompt"),
        ({"salt": None}, "cache_salt"),
        ({"ids": [1, 2, 3, 4, 5, 6]}, "placeholders"),
        ({"ids": "short"}, "no token follows"),
        ({"base": "other"}, "whose weights are not these"),
        ({"shape": (3, 2, 8)}, "3, 2, 8"),
    ],
)
def test_a_request_that_cannot_be_served_fails_as_a_load_and_raises_nothing(
    lm: FrozenLM, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    prompt = prompt_of(lm, 1, "soft")
    save_kv(lm, prompt, tmp_path)
    digest = digest_of(prompt)
    changes: dict[str, Any] = {"base_sha256": change["base"]} if "base" in change else {}
    changes |= {"shape": change["shape"]} if "shape" in change else {}
    plans = scheduling(lm, tmp_path, **changes)
    ids = [*placeholder_ids(digest, 4, lm.vocab_size), 9, 9]
    ids = ids[:4] if change.get("ids") == "short" else change.get("ids", ids)
    params = {"softprompt": change.get("digest", digest), POSITIONS: change.get("positions", 4)}
    salt = change.get("salt", digest) if "salt" in change else digest
    claimed = plans.matched(params, ids, salt, 0)
    assert claimed == len(ids) - 1
    plans.allocated("r", params, ids, salt, [3], claimed)
    (load,) = plans.take()
    assert load.fault is not None
    assert words in load.fault
    assert load.blocks == (3,)


@given(
    st.dictionaries(
        st.sampled_from(["softprompt", POSITIONS, "x"]),
        st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4),
    )
)
def test_no_parameters_make_the_scheduler_raise(params: dict[str, Any]) -> None:
    plans = Scheduling("nowhere", block_size=16, vocabulary=10, shape=(1, 1, 1), base_sha256=None)
    claimed = plans.matched(params, [1, 2, 3], None, 0)
    assert claimed in (0, 2)
    assert (claimed == 2) == ("softprompt" in params)


def test_states_in_memory_are_bounded_and_a_new_file_is_found(lm: FrozenLM, tmp_path: Path) -> None:
    several = [prompt_of(lm, seed, "p") for seed in range(3)]
    for prompt in several[:2]:
        save_kv(lm, prompt, tmp_path)
    first, second, third = map(digest_of, several)
    keys, _ = LoadedStates(tmp_path).get(first)
    size = 2 * keys.numel() * keys.element_size()
    states = LoadedStates(tmp_path, max_bytes=2 * size)
    for digest in (first, second, first):
        states.get(digest)
    assert (states.reads, states.bytes) == (2, 2 * size)
    with pytest.raises(PromptError, match="no such file"):
        states.get(third)
    save_kv(lm, several[2], tmp_path)
    states.get(third)  # takes the place of the second, which was not asked for since
    assert (states.reads, states.bytes) == (3, 2 * size)
    states.get(first)
    assert states.reads == 3
    states.get(second)
    assert states.reads == 4


def test_each_worker_has_its_own_heads() -> None:
    tensor = torch.arange(4.0)[None, None, :, None].expand(2, 3, 4, 5)
    assert [own_heads(tensor, rank, 2)[0, 0, :, 0].tolist() for rank in range(2)] == [[0.0, 1.0], [2.0, 3.0]]
    assert [own_heads(tensor, rank, 8)[0, 0, :, 0].tolist() for rank in range(8)] == [
        [0.0], [0.0], [1.0], [1.0], [2.0], [2.0], [3.0], [3.0]
    ]  # fmt: skip


def test_the_weights_files_of_a_base_have_the_digest_that_its_prompts_record(
    lm: FrozenLM, tmp_path: Path
) -> None:
    """What the connector computes at vLLM's start, from files; for a base with tied embeddings too."""
    for architecture in ("Llama", "GPT-2"):
        model = tiny_model(architecture)
        model.save_pretrained(tmp_path / architecture)
        (file,) = (tmp_path / architecture).glob("*.safetensors")
        tensors = list(safetensors.torch.load_file(file).values())
        base = FrozenLM.wrap(model, tiny_tokenizer(), architecture)
        assert sampled_sha256(tensors) == base.fingerprint.sha256


def test_the_verb_exports_several_prompts_into_one_folder(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lm.model.save_pretrained("base")
    lm.tokenizer.save_pretrained("base")
    lm = FrozenLM.load("base", dtype="float32")
    several: list[SoftPrompt] = [prompt_of(lm, seed, f"p{seed}") for seed in range(2)]
    for prompt in several:
        save_prompt(prompt, prompt.name)
    arguments = ["export", "p0", "p1", "--to", "vllm-kv", "--out", "kv", "--dtype", "float32", "--json"]
    for _ in range(2):  # again: the same files
        assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0]) == {"prompt": "p0", "to": "vllm-kv", "path": "kv"}
    assert {path.name[:64] for path in Path("kv").iterdir()} == set(map(digest_of, several))
    assert main(["export", "p0", "p1", "--to", "peft", "--out", "x"]) == 2
    assert "wanted one" in capsys.readouterr().err
