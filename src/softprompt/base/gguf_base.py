"""GGUF files as bases: dequantised once into a folder as transformers saves it, kept in the cache by content.

A GGUF file holds no copy of the original weights, only what they were packed to. The folder is therefore a base
itself: a prompt learned on it does not fit the model that the file was made from.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from softprompt.base.disk_cache import cache_folder, file_sha256
from softprompt.base.foreign import bars_on_terminals_alone, gist
from softprompt.base.whole import demand_whole
from softprompt.errors import BaseError, MissingExtra, SaveError
from softprompt.store.atomic import new_folder

MAGIC = b"GGUF"
FORM = 1  # of the conversion: a change of what it gives makes another folder
LINK = "model.gguf"


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def converted(path: Path, name: str) -> Path:
    """The folder that `path` was converted to, now or earlier. Raises BaseError, or MissingExtra without `gguf`."""
    folder = cache_folder() / "gguf" / f"{file_sha256(path)}-{FORM}"
    if not (folder / "config.json").exists():
        convert(path, folder, name)
    return folder


def convert(path: Path, folder: Path, name: str) -> None:
    """Writes the GGUF file `path` as a transformers model with its tokenizer into `folder`, whole or not at all."""
    if find_spec("gguf") is None:
        raise MissingExtra(
            f"{name}: a GGUF file needs the package gguf, which is not installed: pip install 'softprompt[gguf]'."
        )
    try:
        with new_folder(folder) as draft:
            # Beside nothing else: a config, tokenizer or adapter that lies next to the file is not part of it.
            (draft / LINK).symlink_to(path.resolve())
            try:
                with bars_on_terminals_alone():
                    tokenizer, model = _read(draft, _stored_dtype(path), name)
            except BaseError:
                raise
            except Exception as error:
                raise BaseError(
                    f"{name}: this GGUF file cannot be read: it is damaged, or of a kind that transformers does not "
                    f"know ({gist(error)}). Fetch it again, or give the model's folder."
                ) from error
            (draft / LINK).unlink()
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            _drop_added_tokens(draft, int(model.get_input_embeddings().weight.shape[0]))
    except OSError as error:
        raise SaveError(
            f"{folder}: the converted base could not be written ({error.strerror or error}). Free some space, or set "
            "XDG_CACHE_HOME to a folder with room."
        ) from error


def _read(folder: Path, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=LINK, local_files_only=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=LINK,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    demand_whole(model, report, name)
    _demand_rotation(folder / LINK, model.config.get_text_config(), name)
    # The weights are plain numbers now; transformers would still call them packed and refuse to save them.
    vars(model.config).pop("quantization_config", None)
    vars(model).pop("hf_quantizer", None)
    model.is_quantized = False
    return tokenizer, model


def _drop_added_tokens(folder: Path, rows: int) -> None:
    """Takes out tokens that transformers' converter adds to every vocabulary, where the base has no row for them."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        return
    content, settings = (json.loads(file.read_text(encoding="utf-8")) for file in (path, settings_path))
    added = {token["content"] for token in content["added_tokens"] if token["id"] >= rows}
    if added:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
        settings = {key: value for key, value in settings.items() if value not in list(added)}
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings_path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _stored_dtype(path: Path) -> torch.dtype:
    """The dtype that keeps most of the file's numbers: their own where they are plain, bfloat16 for packed ones."""
    import gguf

    sizes: Counter[Any] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    (most, _), *_ = sizes.most_common(1)
    kinds = gguf.GGMLQuantizationType
    return {kinds.F32: torch.float32, kinds.F16: torch.float16}.get(most, torch.bfloat16)


def _demand_rotation(path: Path, config: Any, name: str) -> None:
    """Raises BaseError where the file stretches its rotary angles in a way that transformers left out of `config`."""
    import gguf

    reader = gguf.GGUFReader(path)
    kind = next(
        (
            str(field.contents())
            for key, field in reader.fields.items()
            if key.endswith(".rope.scaling.type") and field.contents() != "none"
        ),
        None,
    )
    ropes = getattr(config, "rope_parameters", None) or {}
    lost = [f"a scaling of type {kind}"] if kind and ropes.get("rope_type", "default") == "default" else []
    lost += [
        f"the tensor {tensor.name}"
        for tensor in reader.tensors
        if tensor.name.startswith("rope_") and bool((tensor.data != 1).any())
    ]
    if lost:
        raise BaseError(
            f"{name}: this GGUF file stretches its rotary angles by {lost[0]}, which transformers leaves out: it would "
            "load another model than the file holds. Give the original model's folder or hub id."
        )
