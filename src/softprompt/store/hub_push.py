"""Putting a prompt on the Hugging Face hub, with its model card and its figures in the card's model index."""

from __future__ import annotations

import tempfile
from pathlib import Path

from softprompt.errors import PromptError, SaveError
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.artifact import save_prompt
from softprompt.store.card import shareable
from softprompt.store.hub import SCHEME, is_hub_id


def push(prompt: Prompt, reference: str, *, private: bool = False) -> str:
    """Uploads a prompt to hf://owner/name (`@branch` for one that is not main), and returns the commit, which
    `owner/name@commit` names for ever. The repository is made if it is not there. No absolute path is in what is sent.

    Raises PromptError for a name of another form, SaveError where the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    name = reference.removeprefix(SCHEME)
    if not is_hub_id(name):
        raise PromptError(f"{reference}: wanted hf://OWNER/NAME, with @BRANCH for another branch than main.")
    repository, _, branch = name.partition("@")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repository.rpartition("/")[2]
        save_prompt(shareable(prompt), target)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if branch:
                api.create_branch(repository, branch=branch, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=target,
                revision=branch or None,
                commit_message=f"Prompt {prompt.name}",
                allow_patterns=["softprompt.json", "adapter_*", "README.md"],
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SaveError(
                f"{reference}: the hub did not take the prompt ({what}). Check the name, your network and your token "
                "(`hf auth login`)."
            ) from error
    return str(commit.oid)
