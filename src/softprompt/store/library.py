"""A library: prompts by name and version, in a folder or at an address of fsspec, and which version a bare name means.

    library/
      index.json            name -> version that the bare name means, and every version with its digest
      NAME/VERSION/         a prompt as store.artifact saves it; never changed once published

A version is published by renaming a whole folder, and a name is switched by replacing the index, so a reader sees the
former state or the new one. Poll `stamp` to see changes: network file systems send no notifications.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.digest import digest_of
from softprompt.store.index import INDEX, Index, Name, Version, parse_index
from softprompt.store.shelves import Shelf, shelf_at

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = frozenset({"base"})


@dataclass(frozen=True)
class Entry:
    """One version of a prompt: `name@version`, where it lies, and what it is."""

    name: str
    version: int
    path: str
    digest: str
    base: str
    kind: str
    virtual_tokens: int
    bytes: int
    published: str
    is_current: bool
    shelf: Shelf = field(repr=False, compare=False)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name that always means this version."""
        return f"{self.name}@{self.version}"

    def load(self) -> Prompt:
        """The prompt, copied here first where the library lies elsewhere. Raises DamagedPrompt where it is no longer
        what was published."""
        prompt = load_prompt(self.shelf.folder(f"{self.name}/{self.version}", self.digest))
        if digest_of(prompt) != self.digest:
            raise DamagedPrompt(
                f"{self.path}: is not the prompt that was published as {self.full_name}. Publish it again under a new version."
            )
        return replace(prompt, name=self.name)


class Library:
    """The prompts of one folder or address. Cheap to make: the index is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.shelf = shelf_at(path)
        self.path = self.shelf.name

    def stamp(self) -> str | None:
        """Changes whenever the index does; None while there is none."""
        return self.shelf.stamp()

    def entries(self, pattern: str = "*") -> list[Entry]:
        """Every version of every name that fits the pattern, by name and version."""
        return [entry for entry in self._entries(self._read()) if fnmatch.fnmatch(entry.name, pattern)]

    def find(self, name: str) -> Entry:
        """The current version of `name`, or the one that `name@3` means. Raises PromptError, naming what is near."""
        index = self._read()
        bare, number, _ = index.find(name, self.path)
        return next(entry for entry in self._entries(index) if (entry.name, entry.version) == (bare, number))

    def publish(self, folder: str | Path, name: str, *, current: bool = True) -> Entry:
        """Copies the prompt in `folder` into the library as `name` (the next version) or `name@3`.

        The bare name then means it, unless `current` is false. The same prompt under a version that exists changes
        nothing; another one is refused, since versions never change."""
        bare, _, asked = name.partition("@")
        if (
            not NAME.fullmatch(bare)
            or bare in RESERVED
            or (asked and not re.fullmatch(r"[1-9][0-9]{0,8}", asked))
        ):
            raise PromptError(
                f"{name}: wanted a name of letters, digits, '.', '_' and '-' (not `base`), with @ and a whole number for a "
                "version, such as support or support@3."
            )
        prompt = load_prompt(folder)
        digest = digest_of(prompt)
        with self.shelf.locked():
            index = self._read()
            existing = index.names.get(bare)
            version = int(asked) if asked else self._next(bare, existing)
            former = existing.versions.get(version) if existing else None
            if former is not None and former.digest != digest:
                raise PromptError(
                    f"{bare}@{version}: is published already, with other content. Versions never change: publish as {bare}."
                )
            if former is None:
                self._add(prompt, bare, version)
            entry = Version(
                digest=digest,
                base=prompt.base.name,
                kind=prompt.kind,
                virtual_tokens=prompt.length,
                bytes=sum(tensor.numel() * tensor.element_size() for tensor in prompt.plain),
                published=former.published if former else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                metrics=_metrics(prompt),
            )
            versions = {**(existing.versions if existing else {}), version: entry}
            now = version if current or existing is None else existing.current
            before = None
            if existing is not None:
                before = existing.current if now != existing.current else existing.former
            index.names[bare] = Name(current=now, former=before, versions=versions)
            self._write(index)
        return self.find(f"{bare}@{version}")

    def switch(self, name: str) -> Entry:
        """Lets the bare name mean the version of `name@2`: an update, or back to a former one."""
        entry = self.find(name)
        with self.shelf.locked():
            index = self._read()
            self._point(index, entry.name, entry.version)
        return self.find(entry.full_name)

    def rollback(self, name: str) -> Entry:
        """Lets the bare name mean what it meant before its last change; once more, and it is as it was."""
        with self.shelf.locked():
            index = self._read()
            bare, _, _ = index.find(name, self.path)
            former = index.names[bare].former
            if former is None:
                raise PromptError(
                    f"{name}: has always meant version {index.names[bare].current}, so there is no former one. "
                    f"`softprompt publish {bare}@VERSION --switch` chooses any version."
                )
            self._point(index, bare, former)
        return self.find(f"{bare}@{former}")

    def _point(self, index: Index, name: str, version: int) -> None:
        entry = index.names[name]
        if entry.current != version:
            index.names[name] = entry.model_copy(update={"current": version, "former": entry.current})
            self._write(index)

    def _next(self, name: str, known: Name | None) -> int:
        """The next version: behind those of the index, and behind a folder that a killed publisher left without one."""
        version = max(known.versions if known else [0]) + 1
        while self.shelf.has(f"{name}/{version}"):
            version += 1
        return version

    def _add(self, prompt: Prompt, name: str, version: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Its name is part of what is saved, so that the folder is called as it will be.
            save_prompt(prompt, Path(folder) / str(version))
            self.shelf.add(Path(folder) / str(version), f"{name}/{version}")

    def _entries(self, index: Index) -> Iterator[Entry]:
        for name, current_name in sorted(index.names.items()):
            for version, facts in sorted(current_name.versions.items()):
                path = f"{self.path}/{name}/{version}"
                is_current = version == current_name.current
                yield Entry(
                    name, version, path, **facts.model_dump(), is_current=is_current, shelf=self.shelf
                )

    def _read(self) -> Index:
        text = self.shelf.index()
        return Index() if text is None else parse_index(text, f"{self.path}/{INDEX}")

    def _write(self, index: Index) -> None:
        record: dict[str, Any] = index.model_dump(mode="json")
        self.shelf.write_index(json.dumps(record, indent=1) + "\n")


def _metrics(prompt: Prompt) -> dict[str, float]:
    """Figures that were measured when it was learned."""
    measured = prompt.notes.get("metrics")
    pairs = measured.items() if isinstance(measured, Mapping) else ()
    return {str(name): value for name, value in pairs if isinstance(value, float) and math.isfinite(value)}
