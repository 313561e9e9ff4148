"""Locating a base: bundled, a local folder, a GGUF file, the hub's cache on this machine, or the hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from softprompt.base.base_name import demand_there
from softprompt.base.foreign import gist, quiet, shown_on_terminals
from softprompt.base.gguf_base import converted, is_gguf
from softprompt.errors import BaseError
from softprompt.store.plain_file import read_text

BUILTIN = Path(__file__).parent / "builtin"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Rest = TypeVar("Rest")


def locate(name_or_path: str) -> tuple[str, str]:
    """The source to load from, and the name to record. A name that looks like a path is never looked up on the hub."""
    if name_or_path == "builtin":
        return str(BUILTIN), "builtin"
    if not name_or_path.strip():
        raise BaseError("base: found an empty name. Give a model's folder, its hub id, or `builtin`.")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        _demand_base_folder(path, name_or_path)
        return str(path), name_or_path
    if path.is_file():
        if is_gguf(path):
            with quiet():
                return str(converted(path, name_or_path)), name_or_path
        raise BaseError(
            f"{name_or_path}: found a file that is no GGUF file, wanted a model's folder (config.json, weights and "
            f"tokenizer together) or a GGUF file. Give the folder: {path.parent}."
        )
    if path.exists():
        raise BaseError(f"{name_or_path}: neither a folder nor a regular file. Give a model's folder.")
    demand_there(name_or_path)
    if not HUB_ID.fullmatch(name_or_path):
        raise BaseError(
            f"{name_or_path}: neither a folder here nor a hub id (owner/name). Give one of these, or `builtin`."
        )
    return name_or_path, name_or_path


def load_local_first(
    where: str, name: str, options: dict[str, Any], rest: Callable[[bool], Rest]
) -> tuple[Any, Rest]:
    """The tokenizer, and what `rest` gives: both without the network (`rest(True)`), or else both with it.

    Together, for a preview leaves a tokenizer in the hub's cache without weights, and the hub may have moved on since.
    Raises BaseError where neither is to be had."""
    loading = "its tokenizer"

    def both(local: bool) -> tuple[Any, Rest]:
        nonlocal loading
        loading = "its tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=local, **options)
        loading = ""
        return tokenizer, rest(local)

    with quiet():
        try:
            return both(True)
        except BaseError:
            raise
        except Exception as error:
            offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
            absent = isinstance(error, OSError) and not Path(where).is_dir()
            if not absent or offline:
                raise _load_error(name, error, loading, offline and absent) from error
        try:
            with shown_on_terminals(name):
                return both(False)
        except BaseError:
            raise
        except Exception as error:
            raise _hub_error(name, error) or _load_error(name, error, loading, False) from error


def demand_no_adapter(model: Any, name: str) -> None:
    """Raises BaseError where transformers put an adapter from the same repository into the base."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseError(_with_adapter(name))


def _demand_base_folder(path: Path, name: str) -> None:
    """Raises BaseError for a folder that holds no base, or a base and something that would change it."""
    has_config, adapter = (path / "config.json").exists(), path / "adapter_config.json"
    if has_config and adapter.exists():
        raise BaseError(_with_adapter(name))
    if adapter.exists():
        base = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            base = json.loads(read_text(adapter)).get("base_model_name_or_path")
        raise BaseError(
            f"{name}: found an adapter or prompt ({adapter.name}), wanted the base that it was learned on"
            f"{f': {base}' if isinstance(base, str) else ''}. Give that as the base, and this folder as the prompt."
        )
    if not has_config:
        packed = sorted(file.name for file in path.glob("*.gguf"))
        raise BaseError(
            f"{name}: found a folder without config.json, wanted a model as transformers saves it. "
            f"{f'Give the GGUF file itself: {path / packed[0]}.' if packed else 'Check the path.'}"
        )


def _with_adapter(name: str) -> str:
    return (
        f"{name}: holds a base and an adapter (adapter_config.json), and transformers would load the base with the "
        "adapter in it. Move the adapter's files to their own folder, or merge them."
    )


def _load_error(name: str, error: Exception, loading: str, offline: bool) -> BaseError:
    if offline:
        return BaseError(
            f"{name}: not a folder here, not wholly in the local hub cache, and HF_HUB_OFFLINE forbids looking further. "
            "Give a model's folder, `builtin`, or unset HF_HUB_OFFLINE."
        )
    if "trust_remote_code" in str(error):
        return BaseError(f"{name}: brings its own code. Pass trust_remote_code only if you trust its author.")
    if "Unrecognized configuration class" in str(error):
        return BaseError(
            f"{name}: not a causal language model, which is what a prompt is learned on. {gist(error)}"
        )
    if loading:
        return BaseError(
            f"{name}: {loading} cannot be loaded. Put the tokenizer's files (tokenizer.json, tokenizer_config.json) "
            f"beside config.json. transformers says: {gist(error)}"
        )
    return BaseError(
        f"{name}: cannot be loaded as a causal language model. Check the name or the folder. transformers says: "
        f"{gist(error)}"
    )


def _hub_error(name: str, error: Exception) -> BaseError | None:
    """What kept the hub from giving a model, and what to do; None where it was not the hub."""
    causes = _causes(error)

    def came_from(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if came_from(GatedRepoError):
        return BaseError(
            f"{name}: the hub gives this model to those alone who were granted access. Ask for it on the model's page, then "
            "`hf auth login`."
        )
    if came_from(RepositoryNotFoundError):
        return BaseError(
            f"{name}: not a folder here, and the hub has no such model, or not for you. Check the name; for a private model "
            "`hf auth login`."
        )
    if came_from(RevisionNotFoundError):
        return BaseError(
            f"{name}: the hub has the model, but not this revision of it. Give a branch, a tag or a commit, or none."
        )
    if came_from(RemoteEntryNotFoundError):  # a file that the model lacks
        return None
    if came_from(LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError, socket.gaierror):
        return BaseError(
            f"{name}: not a folder here, not wholly in the local hub cache, and the hub does not give it "
            f"({gist(causes[-1])}). Check the network and your access (`hf auth login`), or give a model's folder or `builtin`."
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what it came from, and so on to the first of all."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = following.__cause__ or following.__context__
    return causes
