"""Bases with weights in 8 or 4 bits (bitsandbytes): a large model in little memory, at some cost in quality.

Only layers inside the body are packed; embeddings and head stay as they are. A prompt learned so belongs to the packed
weights: its fingerprint is theirs, and the same model in full is another base.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import transformers

from softprompt.errors import MissingExtra

PACKED_BITS: Mapping[str, int] = {"int8": 8, "int4": 4}


def bitsandbytes_options(bits: int, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options for transformers' from_pretrained. Raises MissingExtra without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtra(
            f"dtype: int{bits} needs bitsandbytes, which is not installed: pip install 'softprompt[quantised]'."
        )
    settings: dict[str, Any] = {"load_in_8bit": True}  # Dettmers et al. 2022
    if bits == 4:  # Dettmers et al. 2023
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = transformers.BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    return {"quantization_config": config, "device_map": {"": device}}
