"""Bases with packed weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import MissingExtra, WrongBase
from softprompt.store.artifact import load_prompt
from test_learn import learn
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    wide = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs blocks of 64
    tiny_model(**wide).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_learns_on_packed_weights_and_belongs_to_them(
    tmp_path: Path, base: Path, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, an optional package")
    lm = FrozenLM.load(str(base), dtype=dtype, device="cpu")
    before = lm.weights_sha256()
    tuned = learn(tmp_path / "p", "tune.epochs=6", lm=lm)
    assert tuned.nll_after < tuned.nll_before - 0.05
    assert lm.weights_sha256() == before
    assert "in 8 bits" in lm.dtype_reason or "in 4 bits" in lm.dtype_reason
    with pytest.raises(WrongBase):
        load_prompt(tmp_path / "p", base=FrozenLM.load(str(base), dtype="float32").fingerprint)


def test_without_bitsandbytes_one_line_says_what_to_install(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("softprompt.base.bitsandbytes_options.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"int8 needs bitsandbytes.*pip install 'softprompt\[quantised\]'"):
        FrozenLM.load(str(base), dtype="int8")
