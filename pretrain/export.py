"""Put trained weights into the package: bfloat16, with the generation settings and the tokenizer that lie there.

python pretrain/export.py WORK/run/model src/softprompt/base/builtin
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

LIMIT_BYTES = 25_000_000


def export(trained: Path, package: Path) -> int:
    """Write package/model.safetensors and return its bytes. The package's config must describe the very same model."""
    kept = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in load_file(trained / "model.safetensors").items()
    }
    kept.pop("lm_head.weight", None)  # tied to the embeddings
    expected = AutoModelForCausalLM.from_pretrained(package).state_dict()
    expected.pop("lm_head.weight", None)
    found, wanted = ({name: tuple(value.shape) for name, value in part.items()} for part in (kept, expected))
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{trained}: tensors {odd[:4]} differ from what {package}/config.json asks for; change the config"
        )
    size = sum(value.numel() * 2 for value in kept.values())
    if size > LIMIT_BYTES:
        raise ValueError(
            f"{trained}: {size:,} bytes in bfloat16, wanted at most {LIMIT_BYTES:,}; train a smaller model"
        )
    save_file(kept, package / "model.safetensors", metadata={"format": "pt"})
    return (package / "model.safetensors").stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", type=Path)
    parser.add_argument("package", type=Path)
    arguments = parser.parse_args()
    print(f"{export(arguments.trained, arguments.package):,} bytes")
