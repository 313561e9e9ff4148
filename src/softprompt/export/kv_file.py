"""One file of keys and values: what a prompt compiles to, for engines that can load them in front of a request.

    DIGEST.kv.safetensors     keys [L, P, H, K], values [L, P, H, K], and in its metadata what they are
    DIGEST.slot, DIGEST.slot.json     the same for llama-server (export.llama_slot), and what it is

The digest is that of the prompt (store.library.digest_of), so one folder holds the files of many prompts, and a new prompt
is a new file. Keys are as transformers caches them, after the rotation by position. No transformers is imported here: this
is also read inside of vLLM's processes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.store.atomic import write_together
from softprompt.store.ownership import check_file

FORMAT = "softprompt-kv-1"
ENDING, SLOT = ".kv.safetensors", ".slot"
DIGEST = re.compile(r"[0-9a-f]{64}")
WORDS = ("digest", "name", "kind", "dtype", "base", "base_sha256", "tensors_sha256")


@dataclass(frozen=True)
class KvHeader:
    """The description of a file of keys and values.

    `marks` are the positions: a token's id, or -1 - i for vector i. A row takes over as many of them as it shares."""

    marks: tuple[int, ...]
    shape: tuple[int, ...]
    digest: str
    name: str
    kind: str
    dtype: str
    base: str
    base_sha256: str
    tensors_sha256: str

    @property
    def positions(self) -> int:
        """Positions that the file holds."""
        return len(self.marks)


def file_of(folder: str | Path, digest: str) -> Path:
    """The path of a digest's file. Raises PromptError for what is no digest, so that it cannot be another path."""
    return Path(folder) / f"{_digest(digest)}{ENDING}"


def slot_of(folder: str | Path, digest: str) -> Path:
    """The path of a digest's slot file. Raises PromptError for what is no digest."""
    return Path(folder) / f"{_digest(digest)}{SLOT}"


def slot_header_of(folder: str | Path, digest: str) -> Path:
    """The path of the description of a slot file."""
    return Path(folder) / f"{_digest(digest)}{SLOT}.json"


def write_slot_header(path: Path, slot: Path, content: bytes, header: Mapping[str, Any]) -> None:
    """Writes a slot file and what it holds. Raises SaveError."""
    record = {
        **header,
        "shape": [0, len(header["marks"]), 0, 0],
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_together(path.parent, {slot.name: content, path.name: json.dumps(record).encode()})


def read_slot_header(path: Path) -> KvHeader:
    """The description of a slot file. Raises PromptError if there is none, DamagedPrompt if it is not what was written."""
    slot = path.with_suffix("")
    try:
        record, content = json.loads(path.read_text(encoding="utf-8")), slot.read_bytes()
        header = _header(record)
    except FileNotFoundError:
        raise PromptError(
            f"{slot.name}: there is no such file. Make it with `softprompt export PROMPT --to llama-slot --out {path.parent.name}`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedPrompt(f"{path.name}: cannot be read ({error}). Export the prompt again.") from error
    if (
        not slot.name.startswith(header.digest)
        or hashlib.sha256(content).hexdigest() != header.tensors_sha256
    ):
        raise DamagedPrompt(f"{slot.name}: its content is not what was written. Export the prompt again.")
    return header


def _digest(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise PromptError(f"{digest[:80]!r}: wanted a prompt's digest, 64 hexadecimal digits.")
    return digest


def write_kv(path: Path, header: Mapping[str, Any], keys_LPHK: Tensor, values_LPHK: Tensor) -> None:
    """Writes a file; one that was written here before is replaced. Raises SaveError."""
    check_file(path, is_kv_file)
    tensors = {"keys": keys_LPHK.contiguous().cpu(), "values": values_LPHK.contiguous().cpu()}
    record = {**header, "shape": list(keys_LPHK.shape), "tensors_sha256": tensors_sha256(tensors)}
    content = safetensors.torch.save(tensors, metadata={"format": FORMAT, "softprompt": json.dumps(record)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_together(path.parent, {path.name: content})


def read_header(path: Path) -> KvHeader:
    """The description of a file, without its tensors. Raises PromptError if there is none, DamagedPrompt for another file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise PromptError(
            f"{path.name}: there is no such file. Make it with `softprompt export PROMPT --to vllm-kv --out {path.parent.name}`."
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedPrompt(f"{path.name}: cannot be read ({error}). Export the prompt again.") from error
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, wanted {FORMAT}")
        record = json.loads(metadata["softprompt"])
        header = _header(record)
        if len(header.shape) != 4 or header.shape[1] != header.positions:
            raise ValueError(
                f"it holds {header.positions} positions in tensors of shape {list(header.shape)}"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedPrompt(
            f"{path.name}: is no file of keys and values ({error}). Export the prompt again."
        ) from error
    if not path.name.startswith(header.digest):
        raise DamagedPrompt(
            f"{path.name}: holds the prompt {header.digest}. Files are named by their digest."
        )
    return header


def _header(record: Any) -> KvHeader:
    words = {name: str(record[name]) for name in WORDS}
    return KvHeader(marks=tuple(map(int, record["marks"])), shape=tuple(map(int, record["shape"])), **words)


def read_kv(path: Path) -> tuple[KvHeader, Tensor, Tensor]:
    """A file's header, keys and values. Raises DamagedPrompt where they are not those that were written."""
    header = read_header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedPrompt(f"{path.name}: cannot be read ({error}). Export the prompt again.") from error
    if set(tensors) != {"keys", "values"} or tensors_sha256(tensors) != header.tensors_sha256:
        raise DamagedPrompt(f"{path.name}: its content is not what was written. Export the prompt again.")
    return header, tensors["keys"], tensors["values"]


def is_kv_file(path: Path) -> bool:
    """Whether a file was written here."""
    try:
        read_header(path)
    except PromptError:
        return False
    return True


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of keys and values, their shapes and dtypes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.tobytes())
    return digest.hexdigest()


def placeholder_ids(digest: str, positions: int, vocabulary: int) -> list[int]:
    """Token ids that stand for a prompt's positions in a request. They depend on the digest, so that an engine that caches
    by token ids never takes one prompt's positions for another's; they are never embedded."""
    ids: list[int] = []
    block = 0
    while len(ids) < positions:
        drawn = hashlib.sha256(f"{digest} {block}".encode()).digest()
        ids += [int.from_bytes(drawn[at : at + 8], "little") % vocabulary for at in range(0, 32, 8)]
        block += 1
    return ids[:positions]


def shared(header: KvHeader, marks: Sequence[int]) -> int:
    """The number of the file's positions that a row with these marks takes over: its last one is always computed."""
    same = 0
    for mine, other in zip(header.marks, marks[:-1], strict=False):
        if mine != other:
            break
        same += 1
    return same
