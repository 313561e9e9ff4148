"""Names of bases: which are paths, and which of those are not there. Needs no torch, so that a mistype is said at once."""

from __future__ import annotations

from pathlib import Path

from softprompt.errors import BaseError

FILE_ENDINGS = (
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".json",
    ".zip",
    ".gz",
    ".tar",
)


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here is a mistyped path rather than a model on the hub."""
    first, separator, rest = name.replace("\\", "/").partition("/")
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or "/" in rest
        or (separator == "/" and Path(first).is_dir())
        or name.lower().endswith(FILE_ENDINGS)
    )


def demand_there(name: str) -> None:
    """Raises BaseError for a path at which nothing is."""
    if looks_like_path(name) and not Path(name).expanduser().exists():
        raise BaseError(f"{name}: there is no such folder. Give a model's folder, its hub id, or `builtin`.")
