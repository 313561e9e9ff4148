"""Where a base comes from: bundled, a local folder, the hub's cache on this machine or the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import transformers

from softprompt.errors import BaseError

BUILTIN = Path(__file__).parent / "builtin"

Loaded = TypeVar("Loaded")


def locate(name_or_path: str) -> tuple[str, str]:
    """Where to load from, and the name to remember."""
    if name_or_path == "builtin":
        return str(BUILTIN), "builtin"
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BaseError(
                f"{name_or_path}: found a folder without config.json, wanted a model as transformers saves it. "
                "Check the path."
            )
        return str(path), str(name_or_path)
    if path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise BaseError(
            f"{name_or_path}: there is no such folder. Give a model's folder, its hub id, or `builtin`."
        )
    return name_or_path, name_or_path


def local_first(load: Callable[[bool], Loaded], where: str, name: str) -> Loaded:
    """What `load` gives without the network (True), or else with it. Raises BaseError where neither does."""
    with _quiet():
        try:
            return load(True)
        except Exception as error:
            offline = bool(os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"))
            missing = isinstance(error, OSError) and not Path(where).is_dir()
            if not missing or offline:
                raise _load_error(name, error, offline and missing) from error
        try:
            return load(False)
        except Exception as error:
            raise _load_error(name, error, False) from error


def _load_error(name: str, error: Exception, offline: bool) -> BaseError:
    if offline:
        return BaseError(
            f"{name}: not a folder here, not wholly in the local hub cache, and HF_HUB_OFFLINE forbids looking further. "
            "Give a model's folder, `builtin`, or unset HF_HUB_OFFLINE."
        )
    text = str(error).strip().splitlines()
    said = text[0] if text else type(error).__name__
    if "trust_remote_code" in str(error):
        return BaseError(
            f"{name}: brings code of its own. Pass trust_remote_code only if you trust its author."
        )
    if "Unrecognized configuration class" in str(error):
        return BaseError(f"{name}: not a causal language model, which is what a prompt is learned on. {said}")
    return BaseError(
        f"{name}: cannot be loaded as a causal language model: {said} Check the name or the folder."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and advice from the terminal; errors still come as exceptions."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
