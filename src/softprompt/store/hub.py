"""Prompts on the Hugging Face hub: one is a model repository with PEFT's files, ours and a model card."""

from __future__ import annotations

import re
from pathlib import Path

from softprompt.errors import PromptError
from softprompt.store.shelves import FILES

SCHEME = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?")


def is_hub_id(text: str) -> bool:
    """Whether it has the form of a repository's id: owner/name, or owner/name@revision."""
    return _ID.fullmatch(text) is not None


def pulled(reference: str) -> Path:
    """The folder of a prompt on the hub, downloaded if it is not there: owner/name, at `@revision` if one is given.

    Nothing but a prompt's files is downloaded. Raises PromptError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = reference.removeprefix(SCHEME)
    if not is_hub_id(name):
        raise PromptError(f"{reference}: wanted hf://OWNER/NAME, with @REVISION for one that never changes.")
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PromptError(
            f"{reference}: there is no such folder, and the hub gives no such prompt ({what}). Check the name, the "
            "revision, your network and your token (`hf auth login`)."
        ) from error
