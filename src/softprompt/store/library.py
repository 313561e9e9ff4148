"""A library: prompts by name and version on disk, and which version a bare name means.

    library/
      index.json            name -> version that the bare name means, and every version with its digest
      NAME/VERSION/         a prompt as store.artifact saves it; never changed once published

A version is published by renaming a whole folder, and a name is switched by replacing the index, so a reader sees the
former state or the new one. Poll `stamp` to see changes: network file systems send no notifications.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt.errors import DamagedPrompt, PromptError, SaveError
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.atomic import replace_file
from softprompt.store.lock import locked

INDEX = "index.json"
LOCK_WAITS_SECONDS = 30.0  # for another program that publishes
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = frozenset({"base"})


def digest_of(prompt: Prompt) -> str:
    """A prompt's digest, over its numbers, template, target and base."""
    about = [prompt.kind, prompt.template, prompt.target, prompt.base.sha256]
    about += ["special_tokens"] if prompt.special_tokens else []
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in prompt.plain:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One version of a prompt: `name@version`, where it lies, and what it is."""

    name: str
    version: int
    path: Path
    digest: str
    base: str
    kind: str
    virtual_tokens: int
    bytes: int
    published: str
    is_current: bool

    @property
    def full_name(self) -> str:
        """The name that always means this version."""
        return f"{self.name}@{self.version}"

    def load(self) -> Prompt:
        """The prompt. Raises DamagedPrompt where it is no longer what was published."""
        prompt = load_prompt(self.path)
        if digest_of(prompt) != self.digest:
            raise DamagedPrompt(
                f"{self.path}: is not the prompt that was published as {self.full_name}. Publish it again under a new version."
            )
        return replace(prompt, name=self.name)


class _Version(BaseModel):
    model_config = ConfigDict(extra="ignore")
    digest: str
    base: str
    kind: str
    virtual_tokens: int
    bytes: int
    published: str


class _Name(BaseModel):
    model_config = ConfigDict(extra="ignore")
    current: int
    versions: dict[int, _Version]


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore")
    schema_version: int = 1
    names: dict[str, _Name] = {}


class Library:
    """The prompts of one folder. Cheap to make: the index is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever the index does; None while there is none."""
        try:
            status = (self.path / INDEX).stat()
        except OSError:
            return None
        # Two switches within a clock tick leave time and size as they were, but not the file: it is replaced by rename.
        return status.st_mtime_ns, status.st_size, status.st_ino

    def entries(self, pattern: str = "*") -> list[Entry]:
        """Every version of every name that fits the pattern, by name and version."""
        return [entry for entry in self._entries(self._read()) if fnmatch.fnmatch(entry.name, pattern)]

    def find(self, name: str) -> Entry:
        """The current version of `name`, or the one that `name@3` means. Raises PromptError, naming what is near."""
        bare, _, version = name.partition("@")
        entries = self.entries()
        for entry in entries:
            if entry.name == bare and (entry.is_current if not version else str(entry.version) == version):
                return entry
        names = ", ".join(sorted({entry.name for entry in entries})) or "nothing"
        raise PromptError(
            f"{self.path}: has no prompt {name}; it has {names}. `softprompt list {self.path}` shows all."
        )

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
        with self._locked():
            index = self._read()
            existing = index.names.get(bare)
            version = int(asked) if asked else max(existing.versions if existing else [0]) + 1
            former = existing.versions.get(version) if existing else None
            if former is not None and former.digest != digest:
                raise PromptError(
                    f"{bare}@{version}: is published already, with other content. Versions never change: publish as {bare}."
                )
            if former is None:
                self._copy(prompt, bare, version)
            entry = _Version(
                digest=digest,
                base=prompt.base.name,
                kind=prompt.kind,
                virtual_tokens=prompt.length,
                bytes=sum(tensor.numel() * tensor.element_size() for tensor in prompt.plain),
                published=former.published if former else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            )
            versions = {**(existing.versions if existing else {}), version: entry}
            now = version if current or existing is None else existing.current
            index.names[bare] = _Name(current=now, versions=versions)
            self._write(index)
        return self.find(f"{bare}@{version}")

    def switch(self, name: str) -> Entry:
        """Lets the bare name mean the version of `name@2`: an update, or back to a former one."""
        entry = self.find(name)
        with self._locked():
            index = self._read()
            index.names[entry.name] = index.names[entry.name].model_copy(update={"current": entry.version})
            self._write(index)
        return self.find(entry.full_name)

    def _copy(self, prompt: Prompt, name: str, version: int) -> None:
        folder = self.path / name / str(version)
        draft = self.path / name / f".{version}.{os.getpid()}.draft"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            save_prompt(prompt, draft)
            os.replace(draft, folder)
        except OSError as error:
            raise SaveError(
                f"{folder}: cannot be written ({error.strerror or error}). Nothing was published."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _entries(self, index: _Index) -> Iterator[Entry]:
        for name, named in sorted(index.names.items()):
            for version, entry in sorted(named.versions.items()):
                path = self.path / name / str(version)
                yield Entry(name, version, path, **entry.model_dump(), is_current=version == named.current)

    def _read(self) -> _Index:
        try:
            text = (self.path / INDEX).read_text(encoding="utf-8")
        except FileNotFoundError:
            return _Index()
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedPrompt(f"{self.path / INDEX}: cannot be read ({error}). Restore it.") from error
        try:
            return _Index.model_validate_json(text)
        except ValidationError as error:
            raise DamagedPrompt(
                f"{self.path / INDEX}: is not the index of a library ({error.errors()[0]['msg']}). Restore it."
            ) from error

    def _write(self, index: _Index) -> None:
        record: dict[str, Any] = index.model_dump(mode="json")
        try:
            replace_file(self.path / INDEX, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise SaveError(f"{self.path / INDEX}: cannot be written ({error.strerror}).") from error

    def _locked(self) -> AbstractContextManager[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(
                f"{self.path}: cannot be made ({error.strerror}). Choose another library."
            ) from error
        return locked(self.path, "publishing", wait_seconds=LOCK_WAITS_SECONDS)
