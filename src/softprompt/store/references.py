"""References to a prompt, wherever one is read: a folder, a name in a library, an address, or an id of the hub.

runs/support               a folder
library/support            the version that the name means now in the library `library`
library/support@2          always that version
s3://bucket/support        any address of fsspec; also a library's name there
hf://owner/name@revision   on the Hugging Face hub; owner/name alone where there is no folder `owner`
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from softprompt.errors import PromptError
from softprompt.store.hub import SCHEME, is_hub_id, pulled
from softprompt.store.index import INDEX, parse_index
from softprompt.store.shelves import RemoteShelf, Shelf, copied, is_address, shelf_at


@dataclass(frozen=True)
class Located:
    """A prompt's folder on this machine, and the digest and name that it has in a library."""

    folder: Path
    digest: str | None = None
    name: str | None = None


def located(reference: str | Path) -> Located:
    """Finds a prompt; what lies elsewhere is copied here. A path of which nothing is known is given back as it is.

    Raises PromptError."""
    text = re.sub(
        r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(reference)
    )  # a Path loses a slash of an address
    if text.startswith(SCHEME):
        return Located(pulled(text))
    if is_address(text):
        return _at_an_address(text.rstrip("/"))
    path = Path(text).expanduser()
    if not (path / "softprompt.json").exists() and _is_library(path.parent):
        return _in_library(shelf_at(path.parent), path.name)
    if not path.exists() and is_hub_id(text) and not path.parent.exists():
        return Located(pulled(text))
    return Located(path)


def _is_library(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _in_library(shelf: Shelf, name: str) -> Located:
    text = shelf.index()
    if text is None:
        raise PromptError(f"{shelf.name}: is no library; it has no {INDEX}.")
    bare, number, version = parse_index(text, f"{shelf.name}/{INDEX}").find(name, shelf.name)
    return Located(shelf.folder(f"{bare}/{number}", version.digest), version.digest, bare)


def _at_an_address(url: str) -> Located:
    parent, _, name = url.rpartition("/")
    if parent and not parent.endswith((":", "/")):
        shelf = RemoteShelf(parent)
        if shelf.stamp() is not None:
            return _in_library(shelf, name)
    # Without a digest to name it by, a copy is kept for each state of the file that says what it is.
    there = RemoteShelf(url)
    try:
        state = there.files.ukey(f"{there.root}/softprompt.json")
    except Exception as error:
        raise PromptError(f"{url}: holds no prompt that can be read ({error}). Check the address.") from error
    return Located(copied(url, hashlib.sha256(f"{url} {state}".encode()).hexdigest()))
