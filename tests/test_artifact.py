"""A prompt on disk: PEFT reads ours, we read PEFT's, and nothing is ever half there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.encoded import Encoded
from softprompt.errors import DamagedPrompt, PromptError, SaveError, WrongBase
from softprompt.prompt.soft_prompt import DeepPrompt, Fingerprint, Plain, SoftPrompt
from softprompt.store import artifact
from softprompt.store.artifact import load_prompt, save_prompt
from tiny_models import tiny_model, tiny_tokenizer

IDS = [30, 41, 5, 88, 17]


def save_as_tensor(path: Path, tensor: torch.Tensor) -> None:
    safetensors.torch.save_file({"prompt_embeddings": tensor}, path, metadata={"format": "pt"})


def base(architecture: str = "Llama", seed: int = 0) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture, seed=seed), tiny_tokenizer(), "tiny/base")


def soft_prompt(lm: FrozenLM, length: int = 3) -> SoftPrompt:
    vectors_PD = torch.randn(length, lm.width, generator=torch.Generator().manual_seed(5))
    return SoftPrompt(
        vectors_PD, lm.fingerprint, "{soft:3} {text}", name="greet", notes={"metrics": {"nll": 1.5}}
    )


def our_loss(lm: FrozenLM, prompt: Plain, slots: int) -> float:
    """Summed loss of all tokens but the first, by our own road."""
    row = Encoded(
        [0] * slots + IDS,
        [*range(slots), *([-1] * len(IDS))],
        [False] * (slots + 1) + [True] * (len(IDS) - 1),
        0,
        0,
    )
    return lm.nll(collate([row]), prompt)[0].item()


def pefts_loss(model: torch.nn.Module) -> float:
    """The same from a PEFT model."""
    ids_BT = torch.tensor([IDS])
    with torch.no_grad():
        logits_TV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[0, -len(IDS) :]
    return torch.nn.functional.cross_entropy(logits_TV[:-1], ids_BT[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("architecture", ["Llama", "BLOOM (ALiBi)", "GPT-2"])
def test_peft_computes_the_same_from_our_folder(architecture: str, tmp_path: Path) -> None:
    lm = base(architecture)
    prompt = soft_prompt(lm)
    save_prompt(prompt, tmp_path / "greet")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "greet").eval()
    assert pefts_loss(theirs) == pytest.approx(our_loss(lm, prompt.plain, 3), rel=1e-5)


def test_peft_computes_the_same_from_a_deep_prompt_of_ours(tmp_path: Path) -> None:
    lm = base()
    finger = lm.fingerprint
    shape = (finger.layers, 4, finger.kv_heads, finger.head_width)
    generator = torch.Generator().manual_seed(5)
    prompt = DeepPrompt(
        torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), finger
    )
    save_prompt(prompt, tmp_path / "deep")
    theirs = peft.PeftModel.from_pretrained(tiny_model("Llama"), tmp_path / "deep").eval()
    ours = our_loss(lm, prompt.plain, 0)
    assert pefts_loss(theirs) == pytest.approx(ours, rel=1e-5)
    again = load_prompt(tmp_path / "deep", base=finger)
    assert isinstance(again, DeepPrompt)
    assert torch.equal(again.keys_LPHK, prompt.keys_LPHK)
    assert torch.equal(again.values_LPHK, prompt.values_LPHK)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_what_peft_saves_computes_the_same_here(config: peft.PeftConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_model("Llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = load_prompt(tmp_path)
    assert isinstance(prompt, SoftPrompt)
    assert prompt.template == "{soft:4}{text}"
    assert our_loss(base(), prompt.plain, 4) == pytest.approx(pefts_loss(theirs), rel=1e-5)


def test_what_peft_saves_as_prefix_computes_the_same_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(tiny_model("Llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = load_prompt(tmp_path)
    assert isinstance(prompt, DeepPrompt)
    assert our_loss(base(), prompt.plain, 0) == pytest.approx(pefts_loss(theirs), rel=1e-5)


def test_a_saved_prompt_comes_back_with_everything(tmp_path: Path) -> None:
    prompt = soft_prompt(base())
    again = load_prompt(save_prompt(prompt, tmp_path / "greet"), base=prompt.base)
    assert isinstance(again, SoftPrompt)
    assert torch.equal(again.embeddings_PD, prompt.embeddings_PD)
    kept = ("base", "template", "target", "name", "notes")
    assert [getattr(again, field) for field in kept] == [getattr(prompt, field) for field in kept]
    assert (tmp_path / "greet" / "README.md").read_text().startswith("---\nbase_model: tiny/base\n")


def test_another_base_of_the_same_sizes_is_refused(tmp_path: Path) -> None:
    folder = save_prompt(soft_prompt(base()), tmp_path / "greet")
    with pytest.raises(WrongBase, match=r"same sizes and other weights .* tune again"):
        load_prompt(folder, base=base(seed=1).fingerprint)


def test_a_base_of_other_width_is_refused_with_both_widths(tmp_path: Path) -> None:
    folder = save_prompt(soft_prompt(base()), tmp_path / "greet")
    wider = dataclasses.replace(base().fingerprint, name="tiny/wide", width=64)
    with pytest.raises(WrongBase, match=r"tiny/base \(width 32\).*tiny/wide \(width 64\)"):
        load_prompt(folder, base=wider)


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    folder = save_prompt(soft_prompt(base()), tmp_path / "greet")
    tensors = folder / artifact.TENSORS
    whole = tensors.read_bytes()

    tensors.write_bytes(whole[:-7])
    with pytest.raises(DamagedPrompt, match="not a whole safetensors file"):
        load_prompt(folder)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedPrompt, match="digest"):
        load_prompt(folder)
    (folder / artifact.OURS).unlink()
    save_as_tensor(tensors, torch.full((3, 32), float("nan")))
    with pytest.raises(DamagedPrompt, match="96 of 96 values are NaN"):
        load_prompt(folder)
    save_as_tensor(tensors, torch.zeros(5, 32))
    with pytest.raises(DamagedPrompt, match=r"\(5, 32\), wanted .* 3 rows"):
        load_prompt(folder)
    save_as_tensor(tensors, torch.zeros(3, 16))
    with pytest.raises(DamagedPrompt, match="16 wide, wanted 32"):
        load_prompt(folder)
    tensors.unlink()
    with pytest.raises(DamagedPrompt, match="missing"):
        load_prompt(folder)
    (folder / artifact.CONFIG).write_text("{")
    with pytest.raises(DamagedPrompt, match="JSON"):
        load_prompt(folder)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = save_prompt(soft_prompt(base()), tmp_path / "greet")
    (folder / artifact.TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(PromptError, match="pickle"):
        load_prompt(folder)


def test_another_kind_of_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / artifact.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(PromptError, match="LORA"):
        load_prompt(tmp_path)


def test_a_full_disk_leaves_the_former_prompt_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_prompt(soft_prompt(base()), tmp_path / "greet")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = artifact.os.fsync, []

    def full_after_two(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(artifact.os, "fsync", full_after_two)
    with pytest.raises(SaveError, match=r"No space left on device.*unchanged"):
        save_prompt(soft_prompt(base(), length=3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(SaveError):
        save_prompt(soft_prompt(base()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def disks_at_every_moment(prompt: SoftPrompt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Save `prompt` in `folder`; copies of the folder as kill -9 would leave it before and after each step of that."""
    copies: list[Path] = []

    def photographed(real: Any) -> Any:
        def step(*arguments: Any) -> None:
            for part in (lambda: None, lambda: real(*arguments)):
                part()
                copies.append(folder.parent / f"{folder.name}.{len(copies)}")
                shutil.copytree(folder, copies[-1])

        return step

    with monkeypatch.context() as patched:
        patched.setattr(artifact.os, "fsync", photographed(os.fsync))
        patched.setattr(artifact.os, "replace", photographed(os.replace))
        save_prompt(prompt, folder)
    return copies


def test_a_kill_at_any_moment_of_saving_leaves_the_former_prompt_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a save that was killed is followed by another that is killed."""
    former, new, last = (
        dataclasses.replace(
            soft_prompt(base(), length), template=f"{{soft:{length}}} {{text}}", name=str(length)
        )
        for length in (2, 3, 4)
    )

    def loaded(folder: Path) -> str:
        found = load_prompt(folder)
        assert isinstance(found, SoftPrompt)
        (same,) = [one for one in (former, new, last) if torch.equal(one.embeddings_PD, found.embeddings_PD)]
        assert found.template == same.template
        assert artifact.prompt_bytes(folder) > 0
        return same.name

    save_prompt(former, tmp_path / "p")
    disks = disks_at_every_moment(new, tmp_path / "p", monkeypatch)
    assert len(disks) == 16
    found = [loaded(disk) for disk in disks]
    assert found == sorted(found)
    assert set(found) == {"2", "3"}
    for disk, then in zip(disks, found, strict=True):
        again = [loaded(one) for one in disks_at_every_moment(last, disk, monkeypatch)]
        assert again == sorted(again)
        assert set(again) == {then, "4"}
        peft_config = json.loads((disk / artifact.CONFIG).read_text())
        assert peft_config["num_virtual_tokens"] == 4


@pytest.mark.parametrize("error", [SystemExit, PermissionError])
@pytest.mark.parametrize("moved", range(5))
def test_a_failure_at_any_rename_leaves_the_former_prompt_or_the_new_one(
    error: type[BaseException], moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_prompt(soft_prompt(base(), 2), tmp_path / "p")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = os.replace, []

    def failing(draft: Path, final: Path) -> None:
        if len(calls) == moved:
            raise error
        real(draft, final)
        calls.append(final)

    with monkeypatch.context() as patched:
        patched.setattr(artifact.os, "replace", failing)
        with pytest.raises((error, SaveError)) if moved < 4 else contextlib.nullcontext() as raised:
            save_prompt(soft_prompt(base(), 3), folder)
    assert load_prompt(folder).length == (3 if moved else 2)
    if not moved:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    elif raised and error is PermissionError:
        assert "The prompt was saved" in str(raised.value)


def test_a_prompt_that_cannot_be_one_is_refused() -> None:
    finger = Fingerprint("tiny/base", width=32)
    with pytest.raises(PromptError, match="16 wide"):
        SoftPrompt(torch.zeros(2, 16), finger)
    with pytest.raises(PromptError, match="NaN or infinite"):
        SoftPrompt(torch.full((2, 32), float("inf")), finger)
    with pytest.raises(PromptError, match="shape"):
        SoftPrompt(torch.zeros(0, 32), finger)
