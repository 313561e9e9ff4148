"""Trains small bases of other architectures, for the benchmark of the automatic rate: a few minutes of one CPU thread each.

    python benchmarks/rate_bases.py --architecture neox --text ../shared/data/pretrain --out WORK/neox
    python benchmarks/rate_bases.py --architecture qwen3 --embeddings ../shared/data/weights/TinyStories-656K \
        --text ../shared/data/pretrain --out WORK/qwen3
    python benchmarks/rate_bases.py --fold 8 --of ../shared/data/weights/TinyStories-656K --out WORK/tinystories-x8

`neox` is GPT-NeoX (parallel attention and MLP, LayerNorm with biases, a quarter of each head rotated, an output layer of
its own) and `qwen3` is Qwen3 (RMSNorm, normed queries and keys, grouped heads, SwiGLU): 12 layers. Embeddings and tokenizer are those of
a trained base and stay as they are, since minutes do not make a table. `--fold` makes no new function: it multiplies a Llama's residual stream by a number, so that embeddings are that
much larger and every loss is what it was; a rate that follows the base must scale with it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen3Config

from softprompt.base.frozen_lm import FrozenLM

HERE = Path(__file__).resolve().parent
SOURCES = ("children", "own", "dialogues")
LENGTH, BATCH, WARM_STEPS = 128, 8, 20


def configuration(architecture: str, vocab_size: int, width: int) -> Any:
    """The shape of each architecture, around a given embedding table."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": width, "max_position_embeddings": 512}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3 if vocab_size > 2048 else 2}
    if architecture == "neox":
        return GPTNeoXConfig(
            num_hidden_layers=4, num_attention_heads=width // 32, intermediate_size=4 * width, **common
        )
    return Qwen3Config(
        num_hidden_layers=12,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        intermediate_size=width * 11 // 4,
        tie_word_embeddings=True,
        **common,
    )


def train(architecture: str, embeddings: str, text: Path, own: Path, minutes: float, out: Path) -> None:
    """Trains all but the embeddings: Muon for matrices, AdamW for the rest, a linear decay over minutes of CPU time."""
    sys.path.insert(0, str(HERE.parent / "pretrain"))
    from prepare import sources
    from train import Stream

    torch.manual_seed(0)
    lm = FrozenLM.load(embeddings, dtype="float32")
    model: Any = AutoModelForCausalLM.from_config(
        configuration(architecture, lm.vocab_size, lm.width), dtype=torch.float32
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(lm.model.get_output_embeddings().weight)
        model.get_input_embeddings().weight.copy_(lm.embed(torch.arange(lm.vocab_size)))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.requires_grad_(False)
    streams = []
    for name, texts in sources(text, own):
        if name in SOURCES:
            encoded = lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            ids = np.array([token for row in encoded for token in (1, *row, 2)], dtype=np.uint16)
            streams.append(Stream(ids, LENGTH, len(streams)))
    moved = [p for p in model.parameters() if p.requires_grad]
    optimisers = [
        torch.optim.Muon(
            [p for p in moved if p.ndim == 2], lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for p in moved if p.ndim == 1], lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    began, step, recent = time.process_time(), 0, math.nan
    while (done := (time.process_time() - began) / (60 * minutes)) < 1:
        rows = torch.stack(
            [torch.from_numpy(streams[(step + n) % len(streams)].next()) for n in range(BATCH)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / WARM_STEPS) * (1 - done)
            optimiser.step()
            optimiser.zero_grad()
        step, recent = step + 1, loss.item() if math.isnan(recent) else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 0:
            print(json.dumps({"step": step, "done": round(done, 3), "loss": round(recent, 3)}), flush=True)
    model.save_pretrained(out)
    lm.tokenizer.save_pretrained(out)


def folded(model: Any, factor: float) -> Any:
    """A Llama whose residual stream is `factor` times as large and whose logits are the same, but for the norms' eps.

    What is added to the stream (embeddings, attention's and the MLP's outputs) is multiplied. Every RMSNorm divides by
    the stream's size, so that nothing else changes, and the last norm's gain makes up for a tied output layer."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
        if model.config.tie_word_embeddings:
            model.model.norm.weight.div_(factor)
    model.config.rms_norm_eps *= factor**2
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=["neox", "qwen3"], default="neox")
    parser.add_argument("--embeddings", default="builtin", help="a trained base whose table is taken over")
    parser.add_argument("--text", type=Path, help="the text mix of pretrain/prepare.py")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--fold", type=float, help="multiply the residual stream of --of by this instead")
    parser.add_argument("--of", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.fold:
        model = AutoModelForCausalLM.from_pretrained(given.of)
        folded(model, given.fold).save_pretrained(given.out)
        for path in given.of.glob("*token*"):
            shutil.copy(path, given.out)
    else:
        own = HERE.parent / "pretrain" / "text"
        train(given.architecture, given.embeddings, given.text, own, given.minutes, given.out)


if __name__ == "__main__":
    main()
