"""Ownership of files: nothing is replaced or removed before it is clear that softprompt wrote it.

A folder that softprompt writes into holds a marker, `.softprompt.json`: for every kind of thing in the folder its run
id and the names of its files. A prompt needs no marker, since its softprompt.json says the same. Folders that version
0.1 wrote have no marker and are recognised by their files. Links, devices and folders in the place of a file are never
ours.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from softprompt.errors import SaveError
from softprompt.store.atomic import replace_file
from softprompt.store.lock import RUN, locked
from softprompt.store.plain_file import read_bytes

MARKER = ".softprompt.json"
LOOKS, BETWEEN_LOOKS_SECONDS = 6, 0.02  # before a file counts as foreign: a publication takes milliseconds
PROMPT_FILES = ("softprompt.json", "adapter_model.safetensors", "adapter_config.json", "README.md")
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def check_replaceable(
    folder: str | Path, names: Iterable[str], *, kind: str = "prompt", overwrite: bool = True
) -> Path:
    """Raises SaveError unless every one of `names` that exists in `folder` was written by softprompt.

    With `overwrite` False our own files are refused too. A folder that holds a model takes nothing but another merged
    model. Gives the folder, with ~ expanded."""
    folder = folder_named(folder)
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder}: found {_what(folder)}, wanted a folder to write to. Choose another path.")
    if (
        kind != "merged"
        and (folder / "config.json").exists()
        and any((folder / name).exists() for name in WEIGHTS)
    ):
        raise SaveError(
            f"{folder}: holds a model, which files written beside it would change or break. Choose another folder."
        )
    names = list(names)
    for _ in range(LOOKS):
        there = [name for name in names if _lies(folder / name)]
        ours = written_by_us(folder) if there else set()
        foreign = [name for name in there if name not in ours or not _is_plain_file(folder / name)]
        if not foreign:
            break
        time.sleep(BETWEEN_LOOKS_SECONDS)  # another process may be between two renames of a save of ours
    if foreign:
        what = "; ".join(f"{name} ({_what(folder / name)})" for name in foreign)
        raise SaveError(
            f"{folder}: would replace what softprompt did not write: {what}. Move it away, or choose another folder."
        )
    if there and not overwrite:
        raise SaveError(
            f"{folder}: softprompt wrote {', '.join(there)} there before. Pass overwrite=True (--overwrite) to replace "
            "it, or choose another folder."
        )
    return folder


def check_file(path: str | Path, is_ours: Callable[[Path], bool], *, overwrite: bool = True) -> Path:
    """Raises SaveError if `path` exists and is not a plain file for which `is_ours` holds. Gives the path."""
    path = folder_named(path)
    if _lies(path):
        if not _is_plain_file(path) or not is_ours(path):
            raise SaveError(
                f"{path}: would replace what softprompt did not write ({_what(path)}). Choose another path."
            )
        if not overwrite:
            raise SaveError(
                f"{path}: softprompt wrote it before. Pass overwrite=True (--overwrite) to replace it, or choose "
                "another path."
            )
    return path


def claim(
    folder: str | Path,
    kind: str,
    names: Iterable[str],
    *,
    later: Iterable[str] = (),
    run: str = "",
    overwrite: bool = True,
) -> str:
    """Checks that `names` (and those that are written `later`) may be replaced, and marks `folder` as holding a `kind`
    of ours made of `names`. Gives the run id: `run`, or a new one. Raises SaveError."""
    names = list(names)
    folder = check_replaceable(folder, [*names, *later], kind=kind, overwrite=overwrite)
    run = run or secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {**_marked(folder), kind: {"run": run, "files": names}}
        replace_file(folder / MARKER, json.dumps({"format": 1, "holds": kinds}, indent=1) + "\n")
    except OSError as error:
        raise SaveError(
            f"{folder}: could not be written ({error.strerror or error}). Free some space or choose another folder."
        ) from error
    return run


@contextlib.contextmanager
def writing(
    folder: str | Path,
    names: Iterable[str],
    doing: str,
    *,
    kind: str,
    lock: str = RUN,
    wait_seconds: float = 0.0,
) -> Iterator[Path]:
    """Be the one writer of `names` in `folder`, which is made if there is none and removed again if it stays empty.

    Raises SaveError where they are not ours to replace, or where another process writes there."""
    folder = check_replaceable(folder, names, kind=kind)
    made = not folder.exists()
    try:
        make_folder(folder)
        with locked(folder, doing, name=lock, wait_seconds=wait_seconds):
            yield folder
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Raises SaveError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"{folder}: could not be written ({error.strerror or error}). Choose another folder."
        ) from error


def run_of(folder: Path, kind: str) -> str:
    """The run id of what the marker names as a `kind`; empty if there is none."""
    return str(_marked(folder).get(kind, {}).get("run", ""))


def remove_ours(folder: Path, kind: str, sign: str = "") -> None:
    """Removes a folder and all that is in it. Raises SaveError unless it is marked as a `kind` of ours, or (0.1) holds
    a JSON object named `sign`."""
    marked = kind in _marked(folder) or (sign and _json(folder / sign) is not None)
    if folder.is_symlink() or (any(folder.iterdir()) and not marked):
        raise SaveError(
            f"{folder}: is in the way, and softprompt did not write it ({_what(folder)}). Move it away, or choose another "
            "folder."
        )
    shutil.rmtree(folder)


def folder_named(path: str | Path) -> Path:
    """The path that was given. Raises SaveError for an empty one, which would mean the working folder."""
    if not str(path).strip():
        raise SaveError("The path to write to is empty. Name a folder, or `.` for the working folder.")
    return Path(path).expanduser()


def written_by_us(folder: Path) -> set[str]:
    """Names of the files in `folder` that softprompt wrote."""
    names = {MARKER}
    for held in _marked(folder).values():
        names.update(held["files"])
    ours = _json(folder / "softprompt.json")
    if ours is not None and isinstance(ours.get("format"), int):
        files = ours.get("files")
        if isinstance(files, list):
            names.update(name for name in files if isinstance(name, str))
            names.update(name for name in PROMPT_FILES if name != "README.md")
        else:  # version 0.1 wrote all four, and its card names its library
            names.update(PROMPT_FILES[:3])
            if b"\nlibrary_name: softprompt\n" in _head(folder / "README.md"):
                names.add("README.md")
    # Records of version 0.1 have no marker.
    first = _head(folder / "metrics.jsonl").split(b"\n", 1)[0]
    if first.startswith(b'{"event": '):
        names.update({"metrics.jsonl", "recipe.yaml"})
    if _head(folder / "sweep.jsonl").startswith(b'{"event": "Asked"'):
        names.add("sweep.jsonl")
    library = _json(folder / "index.json") or {}
    if isinstance(library.get("schema_version"), int) and isinstance(library.get("names"), dict):
        names.add("index.json")  # its own marker, as a prompt's softprompt.json is
    if "digest" in (_json(folder / "evaluation.json") or {}):
        names.update({"evaluation.json", "rows.jsonl"})
    if (_json(folder / "comparison.json") or {}).get("kind") == "comparison":
        names.add("comparison.json")
    if b"<title>softprompt: " in _head(folder / "report.html"):
        names.update(f"report.{ending}" for ending in ("html", "md", "csv", "json"))
    return names


def is_merged(folder: Path) -> bool:
    """Whether a folder is a merged model that softprompt wrote."""
    return "merged" in _marked(folder) or _json(folder / "softprompt_merged.json") is not None


def _marked(folder: Path) -> dict[str, dict[str, Any]]:
    """The marker's content: kind -> its run id and files. Anything else in a marker counts as no marker."""
    holds = (_json(folder / MARKER) or {}).get("holds")
    return {
        kind: held
        for kind, held in (holds.items() if isinstance(holds, dict) else ())
        if isinstance(held, dict)
        and isinstance(held.get("files"), list)
        and all(isinstance(name, str) for name in held["files"])
    }


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a small plain file; None for anything else."""
    try:
        if not _is_plain_file(path):
            return None
        value = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _head(path: Path) -> bytes:
    try:
        if not _is_plain_file(path):
            return b""
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _lies(path: Path) -> bool:
    """Whether anything has this name, a link to nothing included."""
    return path.exists() or path.is_symlink()


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _what(path: Path) -> str:
    """The kind of a path, for a message."""
    if path.is_symlink():
        return "a link"
    if path.is_dir():
        return "a folder"
    if path.is_file():
        return f"a file of {path.stat().st_size:,} bytes"
    return "a device, pipe or socket"
