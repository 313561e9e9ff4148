"""Bases with quantised weights, against the same model with its weights written out in float32 (transformers alone)."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from softprompt import load_prompt
from softprompt.base import frozen_lm
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.packed_weights import pack_weights
from softprompt.base.quantised import demand_gradients, is_quantised
from softprompt.cli.app import main
from softprompt.data.batch import Batch
from softprompt.errors import BaseError, MissingExtra, WrongBase
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.loss.fast import FastLoss
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.engine import Finished, Work
from softprompt.serving.local_engine import LocalEngine
from test_learn import learn
from tiny_models import tiny_model, tiny_tokenizer

LIBRARIES = {
    "int8": "bitsandbytes",
    "int4": "bitsandbytes",
    "int8-torchao": "torchao",
    "int4-torchao": "torchao",
}
# The 16 levels of NF4 (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
every_dtype = pytest.mark.parametrize("dtype", list(LIBRARIES))
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


@pytest.fixture
def base(tmp_path: Path) -> Path:
    wide = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
    }  # groups are of 32 or 64 weights
    tiny_model(**wide).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised layers compute in float32, so that only their weights differ from the model in full."""
    monkeypatch.setattr(frozen_lm, "cpu_has_bfloat16", lambda: False)


def quantised(base: Path, dtype: str) -> FrozenLM:
    pytest.importorskip(LIBRARIES[dtype], reason=f"needs {LIBRARIES[dtype]}, an optional package")
    return FrozenLM.load(str(base), dtype=dtype, device="cpu")


def by_blocks_of_64(weight_OI: Tensor) -> Tensor:
    """NF4 by hand: each block of 64 weights is scaled by its largest magnitude, and takes the nearest level."""
    blocks_N64 = weight_OI.reshape(-1, 64)
    scale_N1 = blocks_N64.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (blocks_N64[..., None] / scale_N1[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale_N1).reshape(weight_OI.shape)


def written_out(base: Path, lm: FrozenLM, dtype: str) -> Any:
    """transformers' model in float32 whose linear layers hold the quantised weights as plain numbers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = dict(lm.model.named_parameters())
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            full = module.weight.data
            if dtype == "int4":
                module.weight.data = by_blocks_of_64(full)
                continue
            weight: Any = held[f"model.{name}.weight"]
            if dtype == "int8":
                scale_O: Tensor = lm.model.get_submodule(f"model.{name}").state.SCB
                module.weight.data = weight.data.float() * scale_O[:, None] / 127
            else:
                module.weight.data = weight.dequantize().float()
            # The numbers are those of the file, rounded: nowhere off by more than half a step, and somewhere off.
            step = 2 * float(full.abs().max()) / (15 if dtype == "int4-torchao" else 254)
            assert 0 < float((module.weight.data - full).abs().max()) <= 0.51 * step
    return model.eval()


def prompt_of(lm: FrozenLM) -> SoftPrompt:
    drawn = torch.Generator().manual_seed(3)
    vectors_PD = 0.3 * torch.randn(4, lm.width, generator=drawn)
    return SoftPrompt(vectors_PD, lm.fingerprint, "{soft:4}{text}", name="drawn")


@every_dtype
@pytest.mark.usefixtures("float32")
def test_loss_and_gradient_are_those_of_the_weights_written_out(base: Path, dtype: str) -> None:
    lm = quantised(base, dtype)
    assert lm.dtype == torch.float32
    assert is_quantised(lm.model)
    model = written_out(base, lm, dtype)
    ids_BS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    soft_BS = torch.full_like(ids_BS, -1)
    soft_BS[:, :4] = torch.arange(4)
    trained_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    trained_BS[:, 6:] = True
    batch = Batch(ids_BS, soft_BS, trained_BS, torch.full((3,), 12), (0, 1, 2))
    vectors_PD = prompt_of(lm).embeddings_PD

    ours_PD = vectors_PD.clone().requires_grad_()
    ours = FastLoss(lm)(batch, (ours_PD,)).mean()
    ours.backward()

    theirs_PD = vectors_PD.clone().requires_grad_()
    text_BTD = model.get_input_embeddings()(ids_BS[:, 4:])
    inputs_BSD = torch.cat([theirs_PD.expand(3, -1, -1), text_BTD], 1)
    logits_BSV = model(inputs_embeds=inputs_BSD).logits
    theirs = nn.functional.cross_entropy(logits_BSV[:, 5:-1].flatten(0, 1), ids_BS[:, 6:].flatten())
    theirs.backward()

    assert float(ours) == pytest.approx(float(theirs), rel=2e-4)
    assert ours_PD.grad is not None
    torch.testing.assert_close(ours_PD.grad, theirs_PD.grad, rtol=2e-3, atol=2e-5)


@every_dtype
def test_a_prompt_learns_on_quantised_weights_and_belongs_to_them(
    tmp_path: Path, base: Path, dtype: str
) -> None:
    lm = quantised(base, dtype)
    before = lm.weights_sha256()
    tuned = learn(tmp_path / "p", "tune.epochs=6", lm=lm)
    assert tuned.nll_after < tuned.nll_before - 0.05
    assert lm.weights_sha256() == before
    assert f"{dtype[3]} bits ({LIBRARIES[dtype]}" in lm.dtype_reason
    full = FrozenLM.load(str(base), dtype="float32")
    assert lm.num_parameters == full.num_parameters
    with pytest.raises(WrongBase):
        load_prompt(tmp_path / "p", base=full.fingerprint)
    assert not pack_weights(lm)  # for a server: they are packed already
    # Loaded once more, also from what is kept of its digests, it is the same base.
    load_prompt(tmp_path / "p", base=quantised(base, dtype).fingerprint)


def test_every_way_to_quantise_makes_another_base(base: Path) -> None:
    lms = [quantised(base, dtype) for dtype in LIBRARIES]
    full = FrozenLM.load(str(base), dtype="float32", device="cpu")
    for digest in ("weights_sha256", "sha256"):
        assert len({getattr(lm.fingerprint, digest) for lm in (*lms, full)}) == 5


@every_dtype
@pytest.mark.usefixtures("float32")
def test_generated_and_served_text_is_that_of_the_weights_written_out(base: Path, dtype: str) -> None:
    lm = quantised(base, dtype)
    model, prompt = written_out(base, lm, dtype), prompt_of(lm)
    long = "thank you for the quick help. " * 8
    texts = ["Tweet: my order", "I want you to act", long]
    settings = DecodeSettings(max_new_tokens=8, ignore_end=True)

    wanted = []
    for text in texts:
        ids_1T = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        inputs_1SD = torch.cat([prompt.embeddings_PD[None], model.get_input_embeddings()(ids_1T)], 1)
        tokens: list[int] = []
        for _ in range(8):  # greedy, the whole sequence read each time
            with torch.no_grad():
                tokens.append(int(model(inputs_embeds=inputs_1SD).logits[0, -1].argmax()))
            new_11D = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            inputs_1SD = torch.cat([inputs_1SD, new_11D], 1)
        wanted.append(tuple(tokens))

    assert [answer.token_ids for answer in generate(lm, texts, prompt, settings)] == wanted

    async def served() -> list[tuple[int, ...]]:
        with LocalEngine(lm) as engine:
            engine.load(prompt, "digest")

            async def ask(text: str) -> tuple[int, ...]:
                answers = [answer async for answer in engine.submit(Work("digest", text, settings))]
                finished = answers[-1]
                assert isinstance(finished, Finished)
                return finished.token_ids

            return list(await asyncio.gather(*map(ask, texts)))

    assert asyncio.run(served()) == wanted


@every_dtype
@pytest.mark.usefixtures("float32")
def test_a_long_prompt_is_held_once_on_a_quantised_base_too(base: Path, dtype: str) -> None:
    lm = quantised(base, dtype)
    drawn = torch.Generator().manual_seed(5)
    vectors_PD = 0.3 * torch.randn(70, lm.width, generator=drawn)
    front = "The quick brown fox jumps over the lazy dog. " * 4
    prompt = SoftPrompt(vectors_PD, lm.fingerprint, f"{{soft:70}}{front}{{text}}", name="long")
    settings = DecodeSettings(max_new_tokens=4, ignore_end=True)
    together = generate(lm, ["a", "I want"], prompt, settings)
    for text, answer in zip(["a", "I want"], together, strict=True):
        assert answer.token_ids == generate(lm, [text], prompt, settings)[0].token_ids


@every_dtype
def test_the_command_line_learns_judges_and_generates_on_quantised_weights(
    tmp_path: Path, base: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(LIBRARIES[dtype], reason=f"needs {LIBRARIES[dtype]}, an optional package")
    on = ["--base", str(base), "--dtype", dtype, "--device", "cpu"]
    out = str(tmp_path / "p")
    rows = ["--data", "builtin:messages", "--target", "label", "--limit", "40"]
    tuned = ["--template", "{text}{soft:4} {label}", "--steps", "2", "--out", out, "--json"]
    assert main(["tune", *on, *rows, *tuned]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert main(["evaluate", *on, "--prompt", out, "--judge-rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert main(["generate", *on, "--prompt", out, "--max-new-tokens", "2", "--json", "my order"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["tokens"] <= 2
    # A copy in full would not be the base that the prompt was learned on.
    assert main(["export", *on, out, "--to", "merged", "--out", str(tmp_path / "merged")]) == 5
    assert "its weights are quantised" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged").exists()


@every_dtype
@pytest.mark.parametrize("spread", ["tensor", "layers"])
def test_quantised_weights_are_not_cut(base: Path, dtype: str, spread: Any) -> None:
    pytest.importorskip(LIBRARIES[dtype], reason=f"needs {LIBRARIES[dtype]}, an optional package")
    with pytest.raises(BaseError, match="quantised, which cannot be cut"):
        FrozenLM.load(str(base), dtype=dtype, device="cpu", spread=spread)


@every_dtype
def test_a_folder_that_holds_quantised_weights_is_loaded_as_they_are(
    tmp_path: Path, base: Path, dtype: str
) -> None:
    lm = quantised(base, dtype)
    lm.model.save_pretrained(tmp_path / "packed")
    lm.tokenizer.save_pretrained(tmp_path / "packed")
    again = FrozenLM.load(str(tmp_path / "packed"), device="cpu")
    assert is_quantised(again.model)
    assert again.fingerprint.weights_sha256 == lm.fingerprint.weights_sha256


def test_four_bits_that_were_repacked_before_are_refused(base: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, an optional package")
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with bfloat16 instructions alone")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.eval()
    FrozenLM.wrap(model, tiny_tokenizer())  # not used before
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(BaseError, match="repacked"):
        FrozenLM.wrap(model, tiny_tokenizer())


class Cut(nn.Linear):
    """A quantised layer through which no gradient passes, as some kernels have none."""

    __module__ = "bitsandbytes.made_up"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach() + 0 * input)


class Whole(Cut):
    __module__ = "bitsandbytes.made_up"

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


def test_a_layer_that_cuts_the_gradient_is_refused_for_learning() -> None:
    demand_gradients(nn.Sequential(Whole(8, 6)), torch.float32, "tiny")
    with pytest.raises(BaseError, match="off by 100%"):
        demand_gradients(nn.Sequential(Whole(8, 6), Cut(8, 6)), torch.float32, "tiny")


@every_dtype
def test_without_the_library_one_line_says_what_to_install(
    base: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[dtype], None)
    monkeypatch.setattr("softprompt.base.quantised.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=rf"{dtype} needs {LIBRARIES[dtype]}.*pip install 'softprompt\[quantised\]'"
    ):
        FrozenLM.load(str(base), dtype=dtype)
