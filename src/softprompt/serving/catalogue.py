"""The prompt that a model's name means now: the base, prompts given by folder, and a library that is watched."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.data.template import Template
from softprompt.errors import PromptError, SoftPromptError
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import Engine
from softprompt.store.artifact import load_prompt
from softprompt.store.digest import digest_of
from softprompt.store.library import NAME, RESERVED, Library

LOOK_EVERY_SECONDS = 2.0
BASE = "base"


@dataclass(frozen=True)
class Served:
    """A model of the server. `digest` is None for the base alone; `template` is how its input is laid out."""

    name: str
    digest: str | None
    template: Template
    kind: str
    virtual_tokens: int
    created: int
    root: str


class Catalogue:
    """Names to prompts. A request keeps the digest that it began with, whatever a name means later."""

    def __init__(self, engine: Engine, library: Library | None = None) -> None:
        self.engine, self.library = engine, library
        self._lock = threading.Lock()
        self._given: dict[str, Served] = {}
        self._from_library: dict[str, Served] = {}
        self._stamp: str | None = None
        self._refreshing = threading.Lock()
        self.problems: dict[str, str] = {}
        self.started = int(time.time())
        self.refresh()

    def add(self, folder: str | Path, name: str | None = None) -> Served:
        """Serves a prompt (whatever `load_prompt` takes) under its folder's name, or `name`, in place of what the name
        meant before."""
        name = name or Path(folder).resolve().name.partition("@")[0]
        if not NAME.fullmatch(name) or name in RESERVED:
            raise PromptError(
                f"{name}: wanted a name of letters, digits, '.', '_' and '-', and not `base`. Rename the folder."
            )
        prompt = load_prompt(folder)
        served = self._load(name, prompt, digest_of(prompt))
        with self._lock:
            former = self._given.get(name)
            self._given[name] = served
        self._unload(former)
        return served

    def remove(self, name: str) -> bool:
        """Serves a prompt that was added no longer."""
        with self._lock:
            served = self._given.pop(name, None)
        self._unload(served)
        return served is not None

    def refresh(self, *, again: bool = False) -> None:
        """Reads the library again where its index has changed. Call it every LOOK_EVERY_SECONDS, beside the answers.

        A prompt that cannot be served is left out and named in `problems`, and tried `again` where that is asked; an index
        that cannot be read leaves everything as it was."""
        if self.library is None:
            return
        with self._refreshing:
            stamp = self.library.stamp()
            if stamp == self._stamp and not again:
                return
            try:
                entries = self.library.entries()
            except SoftPromptError as error:
                self.problems = {**self.problems, "index": str(error)}
                return
            former = {served.digest: served for served in self._from_library.values()}
            names: dict[str, Served] = {}
            problems: dict[str, str] = {}
            for entry in entries:
                try:
                    served = former.get(entry.digest) or self._load(
                        entry.full_name, entry.load(), entry.digest
                    )
                except SoftPromptError as error:  # one prompt of another base must not stop the others
                    problems[entry.full_name] = str(error)
                    continue
                names[entry.full_name] = replace(served, name=entry.full_name)
                if entry.is_current:
                    names[entry.name] = replace(served, name=entry.name)
            with self._lock:
                self._from_library, self._stamp, self.problems = names, stamp, problems
        for served in former.values():
            self._unload(served)

    def models(self) -> list[Served]:
        """All that is served, the base first."""
        with self._lock:
            return [self._base(), *({**self._from_library, **self._given}).values()]

    def find(self, name: str) -> Served | None:
        """The prompt or base that a name means now; None for an unknown name."""
        if name == BASE:
            return self._base()
        with self._lock:
            return self._given.get(name) or self._from_library.get(name)

    def _base(self) -> Served:
        return Served(BASE, None, Template.parse("{text}"), "none", 0, self.started, self.engine.lm.name)

    def _load(self, name: str, prompt: Prompt, digest: str) -> Served:
        self.engine.load(prompt, digest)
        template = Template.parse(prompt.template or "{text}", target=prompt.target, length=prompt.length)
        return Served(name, digest, template, prompt.kind, prompt.length, self.started, self.engine.lm.name)

    def _unload(self, former: Served | None) -> None:
        """Holds a prompt no longer, unless another name still means it."""
        if former is None or former.digest is None:
            return
        with self._lock:
            served = [*self._given.values(), *self._from_library.values()]
        if all(each.digest != former.digest for each in served):
            self.engine.unload(former.digest)
