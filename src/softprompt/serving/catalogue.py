"""Which prompt a model's name means now: the base, prompts given by folder, and a library that is watched."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from softprompt.data.template import Template
from softprompt.errors import PromptError, SoftPromptError
from softprompt.prompt.soft_prompt import Prompt
from softprompt.serving.engine import LocalEngine
from softprompt.store.artifact import load_prompt
from softprompt.store.library import Library, digest_of

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

    def __init__(self, engine: LocalEngine, library: Library | None = None) -> None:
        self.engine, self.library = engine, library
        self._lock = threading.Lock()
        self._given: dict[str, Served] = {}
        self._from_library: dict[str, Served] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        self.problems: dict[str, str] = {}
        self.started = int(time.time())
        self.refresh()

    def add(self, folder: str | Path, name: str | None = None) -> Served:
        """Serve the prompt of a folder under its folder's name, or `name`."""
        prompt = load_prompt(folder)
        name = name or Path(folder).resolve().name
        if name == BASE or "@" in name:
            raise PromptError(
                f"{folder}: would be served as {name}, which means something else here. Rename the folder."
            )
        served = self._load(name, prompt, digest_of(prompt))
        with self._lock:
            self._given[name] = served
        return served

    def remove(self, name: str) -> bool:
        """Serve a prompt that was added no longer."""
        with self._lock:
            served = self._given.pop(name, None)
        if served is not None and served.digest is not None and not self._named(served.digest):
            self.engine.unload(served.digest)
        return served is not None

    def refresh(self, *, now: bool = False) -> None:
        """Read the library again where its index has changed; looked at every two seconds at most."""
        if self.library is None or (not now and time.monotonic() - self._looked < LOOK_EVERY_SECONDS):
            return
        self._looked = time.monotonic()
        stamp = self.library.stamp()
        if stamp == self._stamp:
            return
        names: dict[str, Served] = {}
        known = {served.digest: served for served in self._from_library.values()}
        problems: dict[str, str] = {}
        for entry in self.library.entries():
            try:
                served = known.get(entry.digest) or self._load(entry.full_name, entry.load(), entry.digest)
            except SoftPromptError as error:  # one prompt of another base must not stop the others
                problems[entry.full_name] = str(error)
                continue
            names[entry.full_name] = _renamed(served, entry.full_name)
            if entry.is_current:
                names[entry.name] = _renamed(served, entry.name)
        with self._lock:
            self._from_library, self._stamp, self.problems = names, stamp, problems

    def models(self) -> list[Served]:
        """All that is served, the base first."""
        self.refresh()
        with self._lock:
            return [self._base(), *({**self._from_library, **self._given}).values()]

    def find(self, name: str) -> Served | None:
        """What a name means now; None where there is nothing of that name."""
        self.refresh()
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

    def _named(self, digest: str) -> bool:
        with self._lock:
            return any(
                served.digest == digest for served in (*self._given.values(), *self._from_library.values())
            )


def _renamed(served: Served, name: str) -> Served:
    return Served(
        name, served.digest, served.template, served.kind, served.virtual_tokens, served.created, served.root
    )
