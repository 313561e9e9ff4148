"""Parts that several verbs share: the flag --json, loading a base, and describing it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from softprompt.base.base_name import demand_there
from softprompt.data.files import data_suffix
from softprompt.data.source import load_splits
from softprompt.errors import BaseError, DataError, PromptError, SaveError
from softprompt.progress.console import visible
from softprompt.settings.base_settings import BaseSettings
from softprompt.store.ownership import check_replaceable

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.prompt.soft_prompt import Fingerprint, Prompt
    from softprompt.tuning.recipe import Recipe

AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")
]

RESUME = "To continue, give the same command with --resume."
ContinuesByItself: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue what an interrupted call left; without it too, as nothing kept is done twice.",
    ),
]
"""The same flag where work that is kept is never done again, whether it is given or not."""


def demand_folders(folders: Iterable[Path]) -> None:
    """Refuses a prompt that is not there, before anything that takes seconds is imported. An address is asked later."""
    for folder in folders:
        if not (folder.exists() or ":/" in str(folder) or (folder.parent / "index.json").is_file()):
            raise PromptError(
                f"{visible(folder)}: there is no such folder. Give the folder that `tune` or PEFT saved."
            )


def demand_paths(recipe: Recipe, *, writes: bool = True) -> None:
    """Refuses a data file or a base's folder that is not there, and, where something `writes`, a folder that cannot be
    written into, before anything that takes seconds is imported."""
    source = recipe.data.source
    path = Path(source).expanduser()
    if data_suffix(path) and not path.exists() and "*" not in source and "://" not in source:
        load_splits(source)  # which refuses it, with the nearest file's name
    demand_there(recipe.base)
    if writes:
        demand_writable(recipe.out)


def demand_writable(out: str) -> None:
    """Refuses a folder to write to that is a file, or that cannot be made or written into. Raises SaveError."""
    folder = check_replaceable(out, ())
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SaveError(
            f"{folder}: cannot be made, since {there} is a file. Choose another folder with --out."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise SaveError(f"{folder}: {there} may not be written to. Choose another folder with --out.")


def demand_local_data(*prompts: Prompt) -> None:
    """Refuses to download the data that a prompt says it was learned on: a prompt may come from anyone."""
    for prompt in prompts:
        recipe = prompt.notes.get("recipe")
        data = recipe.get("data") if isinstance(recipe, Mapping) else None
        source = data.get("source") if isinstance(data, Mapping) else None
        if not isinstance(source, str) or source.startswith("builtin:") or Path(source).expanduser().exists():
            continue
        raise DataError(
            f"{prompt.name} was learned on {source}, which is not on this machine, and a prompt alone downloads "
            f"nothing. If you trust that source, pass --data {source}; otherwise name other data."
        )


def load_base(settings: BaseSettings, *prompts: Prompt) -> FrozenLM:
    """The base that the settings name, otherwise the one that the prompts were learned on, otherwise the bundled one.

    A base that only a prompt names is loaded if it is on this machine; the hub is not asked for it, since a prompt may
    come from anyone."""
    by_prompt = own_base(prompts) if settings.base is None else None
    if by_prompt is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
    from softprompt.base.frozen_lm import FrozenLM

    try:
        return FrozenLM.load(
            settings.base or (by_prompt.name if by_prompt else "builtin"),
            revision=settings.base_revision or (by_prompt.revision if by_prompt else None),
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
            spread=settings.spread,
        )
    except BaseError as error:
        if by_prompt is None or "HF_HUB_OFFLINE" not in str(error):
            raise
        raise BaseError(
            f"{prompts[0].name} names the base {by_prompt.name}, which is not on this machine, and a prompt alone "
            f"downloads nothing. If you trust that base, pass --base {by_prompt.name}."
        ) from None


def own_base(prompts: Sequence[Prompt]) -> Fingerprint | None:
    """The base that the prompts name; None without prompts. Prompts of several bases are refused."""
    named = {prompt.base.name: prompt.base for prompt in prompts if prompt.base.name}
    if len(named) > 1:
        raise PromptError(
            f"The prompts were learned on {', '.join(sorted(named))}. Use prompts of one base together."
        )
    if prompts and not named:
        raise PromptError(
            f"{prompts[0].name} does not say which base it was learned on. Name it with --base."
        )
    return next(iter(named.values()), None)


def describe_base(lm: FrozenLM) -> dict[str, object]:
    """The base as facts for people and records for machines."""
    dtype = str(lm.dtype).removeprefix("torch.")
    return {
        "name": lm.name,
        "revision": lm.revision,
        "parameters": lm.num_parameters,
        "layers": lm.num_layers,
        "width": lm.width,
        "vocabulary": lm.vocab_size,
        "context": lm.max_positions,
        "dtype": dtype,
        "dtype_reason": lm.dtype_reason,
        "device": str(lm.device),
        "fingerprint": lm.fingerprint.sha256,
    }
