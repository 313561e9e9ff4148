"""Everything that a killed run needs to continue, on disk: written whole or not at all, the two newest kept.

A file is one line (what it is, and the digest of the rest) and then what torch.save makes of tensors and plain values.
Reading it runs no code.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt.errors import RecipeError, SaveError
from softprompt.prompt.soft_prompt import Fingerprint
from softprompt.store.atomic import sweep_drafts, write_together
from softprompt.store.plain_file import read_bytes
from softprompt.tuning.recipe import Recipe, TuneSettings

FOLDER, ENDING, KEPT = "checkpoints", ".checkpoint", 2
BASE, DATA = "the base's ", "the data"
HEAD = b"softprompt checkpoint 1 "
# Settings that are newer than runs which may still be resumed; at these values they change nothing and are not recorded.
ADDED_LATER = {
    "tune.keep": "0.0",
    "tune.keep_text": "null",
    "prompt.upper_layers": "1.0",
    "prompt.place": '"front"',
}
MAY_DIFFER = {
    "out",
    "device",
    "spread",
    "tune.trackers",
}  # settings that do not change what is computed, or only where


class Checkpoints:
    """The checkpoints of the run in `out`. A checkpoint that cannot be written is reported and does not end the run."""

    def __init__(self, out: Path, settings: TuneSettings, tell: Callable[[str], None]) -> None:
        self.folder = out / FOLDER
        self.every_steps, self.every_seconds = settings.checkpoint_steps, settings.checkpoint_seconds
        self.tell = tell
        self.last_step, self.last_time = 0, time.monotonic()
        self.own = False  # what lies in the folder belongs to this run

    def due(self, step: int) -> bool:
        """Whether it is time for the next one."""
        if self.every_steps is not None and step - self.last_step >= self.every_steps:
            return True
        return time.monotonic() - self.last_time >= self.every_seconds

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes `state`, then removes all but the two newest."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        head = HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n"
        self.last_step, self.last_time = step, time.monotonic()
        try:
            if not self.own:
                self.clear()  # of a former run
                sweep_drafts(self.folder)
            write_together(self.folder, {f"{step:09}{ENDING}": head + content})
        except (SaveError, OSError) as error:
            self.tell(f"No checkpoint of step {step}: {error} The run continues, and tries again later.")
            return
        self.own = True
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; damaged ones are reported and skipped. None if there is none."""
        paths = self._newest_first()
        for number, path in enumerate(paths, 1):
            try:
                state = _read(path)
            except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                then = (
                    "the one before is taken" if number < len(paths) else "the run starts from the beginning"
                )
                self.tell(f"{path} is damaged ({error}): {then}.")
                continue
            self.last_step, self.own = int(path.name.removesuffix(ENDING)), True
            return state
        return None

    def clear(self) -> None:
        """Removes all of them."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{ENDING}"), reverse=True)


def _read(path: Path) -> dict[str, Any]:
    head, _, content = read_bytes(path, sys.maxsize).partition(b"\n")
    if not head.startswith(HEAD):
        raise ValueError("it does not begin like a checkpoint")
    if hashlib.sha256(content).hexdigest().encode() != head.removeprefix(HEAD):
        raise ValueError("its content is not what was written")
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def identity(recipe: Recipe, base: Fingerprint, rows_sha256: str) -> dict[str, str]:
    """Everything that must be equal for a run to continue: every setting that counts, the base, the rows."""
    flat = {f"{BASE}{part}": value for part, value in base.parts.items()} | {DATA: rows_sha256}
    for section, value in recipe.model_dump().items():
        settings = value if isinstance(value, dict) else {"": value}
        for name, setting in settings.items():
            path = f"{section}.{name}".rstrip(".")
            value_json = json.dumps(setting, sort_keys=True)
            if path not in MAY_DIFFER and not name.startswith("checkpoint_"):
                flat[path] = value_json
            if ADDED_LATER.get(path) == value_json:
                del flat[path]
    return flat


def demand_same(then: Mapping[str, str], now: Mapping[str, str], out: str) -> None:
    """Raises RecipeError, naming what differs, unless a checkpoint's run is the one that is asked for."""
    differing = [
        name
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
        # Version 0.1 recorded a sample of the weights alone, and settings of a config come with new transformers.
        and (not name.startswith(BASE) or (name in then and name in now))
    ]
    # Settings choose the rows, by a seed or a number of steps: where one differs, that the rows do too says nothing more.
    named = [name for name in differing if name != DATA] or differing
    if named:
        was = (f"{name} was {then.get(name, 'not known')}, is {now.get(name, 'not known')}" for name in named)
        raise RecipeError(
            f"{out}: its checkpoint is of another run: {'; '.join(was)}. Set these back to continue, or leave out "
            "--resume to start from the beginning."
        )
