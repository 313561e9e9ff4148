"""Whether a loaded base is whole: every tensor from its files, of the right shape, finite; none left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers

from softprompt.base.quantised import stored
from softprompt.base.split import fetched, own_part
from softprompt.errors import BaseError

# Buffers that old checkpoints hold and today's classes compute themselves: causal masks and rotary frequencies.
RECOMPUTED = re.compile(r"(^|\.)((attn|attention|self_attn)\.(masked_)?bias|inv_freq|position_ids)$")
NAMES_SHOWN = 3


def demand_whole(model: Any, report: Mapping[str, Any], name: str) -> None:
    """Raises BaseError, naming tensors, where transformers filled in, left out or reshaped some.

    `report` is what `from_pretrained(..., output_loading_info=True)` gives, in which tied weights and what a class
    declares as ignorable are no faults."""
    missing = sorted(report.get("missing_keys", ()))
    unexpected = sorted(key for key in report.get("unexpected_keys", ()) if not RECOMPUTED.search(key))
    mismatched = sorted(
        f"{key} (found {list(loaded)}, wanted {list(wanted)})"
        for key, loaded, wanted in report.get("mismatched_keys", ())
    )
    faults = [
        f"{len(keys)} {what}: {_shown(keys)}"
        for what, keys in (
            ("missing", missing),
            ("of another shape", mismatched),
            ("that the model has no place for", unexpected),
        )
        if keys
    ]
    if faults:
        raise BaseError(
            f"{name}: its files do not hold the weights of a {type(model).__name__}. Tensors {'; '.join(faults)}. The "
            "model would run on made-up numbers. Fetch it again, or correct model_type and sizes in config.json."
        )


def demand_finite(model: Any, name: str) -> None:
    """Raises BaseError, naming tensors, where weights are NaN or infinite."""
    broken = [
        key
        for key, weight in fetched(model)
        # The largest magnitude is NaN where any value is: one pass, no mask of the tensor's size.
        for part in stored(own_part(weight))
        if part.is_floating_point() and part.numel() and not bool(torch.isfinite(part.abs().max()))
    ]
    if broken:
        raise BaseError(
            f"{name}: {len(broken)} of its weights hold NaN or infinite numbers in "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')}: {_shown(broken)}. Fetch the base again, "
            "or load it with dtype: float32."
        )


def demand_causal_lm(model: Any, name: str) -> None:
    """Raises BaseError for what is no transformers model, or one inside a wrapper that changes what it computes."""
    if type(model).__module__.partition(".")[0] == "peft":
        raise BaseError(
            f"{name}: found a {type(model).__name__}, a model that PEFT has wrapped, wanted the model itself. Give "
            "`model.get_base_model()` of a prompt, or `model.merge_and_unload()` of LoRA and its like."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise BaseError(
            f"{name}: found a {type(model).__name__}, wanted a causal language model of transformers "
            "(AutoModelForCausalLM). Give that, or use FrozenLM.load."
        )


def demand_ids_in_table(tokenizer: Any, rows: int, name: str) -> None:
    """Raises BaseError where the tokenizer has ids that no row of the embedding table belongs to.

    The tokens for padding and for unknown text may: libraries add them by themselves, and no text becomes them."""
    unused = (tokenizer.pad_token_id, tokenizer.unk_token_id)
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    beyond = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and (index in used or index not in unused)
    }
    if beyond:
        raise BaseError(
            f"{name}: its tokenizer has ids up to {max(beyond)}, and its embedding table has {rows:,} rows. Tokens "
            f"without a row: {_shown([repr(beyond[index]) for index in sorted(beyond)])}. Use the tokenizer that "
            "belongs to the model, or a model with a row for each token (resize_token_embeddings, then training)."
        )


def _shown(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
