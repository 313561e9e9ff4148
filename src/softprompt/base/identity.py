"""A base's identity: digests of every weight and of the tokenizer, and the settings that change what it computes.

The parts do not depend on the dtype that the base was loaded in (float32 or bfloat16), on names of files or tensors, or
on versions of transformers. Not part of it: the chat template, which belongs to texts and not to the base (a prompt that
is used without chats fits either; a continued run compares its encoded rows).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor

from softprompt.base.disk_cache import Stamp, kept_digest
from softprompt.base.quantised import quantisers, stored
from softprompt.base.split import fetched, is_dispatched, is_split, own_part, whole

SAMPLED_VALUES = 65_536  # of each weight go into the digest that version 0.1 recorded
THREADS = 4

# Settings that change no logits: names, versions, what is returned, training, special ids (those of the tokenizer count).
IMMATERIAL = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|transformers_version|.*name_or_path|tokenizer_class|model_name"
    r"|use_cache|output_.*|return_dict.*|chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|summary_.*"
    r"|task_specific_params|finetuning_task|.*dropout.*|.*pdrop|.*_token_id|initializer_.*|pretraining_tp|slow_but_exact"
    r"|gradient_checkpointing|router_aux_loss_coef|quantization_config"
)

# Texts whose ids show how a tokenizer splits, normalises, merges and begins, whatever its classes and files are called.
PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs.\n\n  Two  spaces,\ttab, end ",
    "na\u00efve cafe\u0301 \u00c0\u00c9\u00ce \ufb01 \u00bd \u0130stanbul stra\u00dfe \u201cquotes\u201d \u2013 \u2026",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f642\U0001f469\u200d\U0001f680",
    "def f(x): return x**2 != 1234567890  # 3.14e-10",
    "UPPER lower",
    "",
)


def base_files(where: str, revision: str | None) -> Stamp | None:
    """The stamp of the base's files: of its folder, or of its snapshot in the hub's cache; None where it has none."""
    folder = Path(where)
    if not folder.is_dir():
        config = huggingface_hub.try_to_load_from_cache(where, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = [path for path in folder.iterdir() if path.is_file()]
    return Stamp.of(files) if any(path.suffix in (".safetensors", ".bin") for path in files) else None


def weights_sha256(model: Any, files: Stamp | None = None) -> str:
    """Digest of all values of all weights and stored buffers as bfloat16, in the model's own order.

    What bfloat16 rounds away is not seen: that is the price of one digest for a base in float32 and in bfloat16.
    `files` are those that the model was just loaded from: their digest is computed once."""
    dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
    if is_split(model):
        files = None  # all processes must gather, whatever one of them has kept
    way = f"weights, {type(model).__name__}, {dtypes}, transformers {transformers.__version__}"
    if libraries := quantisers(model):  # the same files hold other weights then
        way += f", {libraries}, {sorted({type(weight).__name__ for weight in model.parameters()})}"
    return kept_digest(files, way, lambda: compute_weights_sha256(model))


def tokenizer_sha256(tokenizer: Any, files: Stamp | None = None) -> str:
    """Digest of every token's id, of where texts begin and end, and of the ids of a few test texts."""
    way = f"tokenizer, {type(tokenizer).__name__}, transformers {transformers.__version__}"
    return kept_digest(files, way, lambda: compute_tokenizer_sha256(tokenizer))


def config_identity(config: Any) -> str:
    """The settings that matter of a language model's config, as JSON in a fixed order."""
    return json.dumps(_material(config.to_dict()), sort_keys=True, default=str)


def sampled_sha256(weights: Iterable[Tensor]) -> str:
    """The digest that version 0.1 recorded: of evenly spaced values of every weight, as bfloat16, in no order."""
    parts = []
    for weight in weights:
        content = ",".join(map(str, weight.shape)).encode()
        for part in stored(whole(weight)):
            flat = part.reshape(-1)
            stride = max(1, flat.numel() // SAMPLED_VALUES)
            values = flat[::stride][:SAMPLED_VALUES].to(torch.bfloat16).cpu().contiguous()
            content += values.view(torch.uint8).numpy().tobytes()
        parts.append(hashlib.sha256(content).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def compute_weights_sha256(model: Any) -> str:
    kept = {
        part.data_ptr()
        for tensor in model.parameters()
        for part in stored(own_part(tensor))
        if not part.is_meta
    }
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [
        tensor
        for name, tensor in model.state_dict().items()  # parameters again, and buffers that are saved with them
        if name not in named
        and isinstance(tensor, Tensor)
        and stored(own_part(tensor))[0].data_ptr() not in kept
    ]
    weights = chain((weight for _, weight in fetched(model)), buffers)
    if is_split(model) or is_dispatched(model):  # gathered or fetched one tensor at a time
        return hashlib.sha256(b"".join(map(_tensor_digest, weights))).hexdigest()
    # Hashing runs outside the interpreter's lock, so a few threads share it; one tensor's copy each is held meanwhile.
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(_tensor_digest, weights))).hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    for values in stored(whole(tensor.detach())):
        if values.is_floating_point():
            values = values.to(torch.bfloat16)  # the same numbers from a base in float32 and in bfloat16
        content: Any = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    shape = ",".join(map(str, tensor.shape)).encode()
    return hashlib.sha256(shape + b":" + digest.digest()).digest()


def compute_tokenizer_sha256(tokenizer: Any) -> str:
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "begin and end": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probes": [tokenizer(text)["input_ids"] for text in PROBES],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _material(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _material(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not IMMATERIAL.fullmatch(str(key))
    }
