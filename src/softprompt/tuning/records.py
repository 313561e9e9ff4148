"""Records that a run leaves beside its prompt: the settled recipe, and every figure it measured."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from softprompt.errors import SaveError
from softprompt.progress.events import Event, Started
from softprompt.store.atomic import replace_file, sweep_drafts
from softprompt.store.json_values import plain
from softprompt.store.lock import FolderLock
from softprompt.store.ownership import (
    PROMPT_FILES,
    check_replaceable,
    claim,
    folder_named,
    make_folder,
    run_of,
)
from softprompt.tuning.recipe import Recipe

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"
SCHEMA = 2  # of results and metrics; 1 is what version 0.1 wrote, without a number


class RunFolder:
    """Writes `recipe.yaml`, and `metrics.jsonl`, a line per event. No file is changed, and events wait, until `begin`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.recipe, self.path = recipe, folder / METRICS
        self.recorded_bytes = 0
        self.run = ""
        """The run's id, which its prompt's notes carry too; empty until `begin`."""
        self._whole = True
        self._waiting = io.BytesIO()
        self._file: IO[bytes] = self._waiting
        self._lock = FolderLock(folder, "a run")

    def own(self) -> None:
        """Makes a folder that exists this run's alone, before its checkpoints are read: another process may still be writing
        newer ones. Raises SaveError where that goes on."""
        if self.path.parent.is_dir():
            self._lock.take()

    def begin(self, kept_bytes: int = 0) -> None:
        """Writes the recipe, and cuts the records to the first `kept_bytes`, those that the checkpoint knows of, so that
        no step is recorded twice. From here to `close` the folder is this run's alone. Raises SaveError where another
        run is writing there, or where it holds what softprompt did not write."""
        folder, waiting = self.path.parent, self._waiting.getvalue()
        folder_named(self.recipe.out)
        check_replaceable(folder, (RECIPE, METRICS, *PROMPT_FILES), kind="run")
        make_folder(folder)
        self._lock.take()
        run = run_of(folder, "run") if kept_bytes else ""
        self.run = claim(folder, "run", (RECIPE, METRICS), later=PROMPT_FILES, run=run)
        try:
            sweep_drafts(folder, (RECIPE,))
            self._file = self.path.open("ab")
            kept_bytes = min(kept_bytes, self.path.stat().st_size)
            self._file.truncate(kept_bytes)  # first, so that no kill leaves former figures under this recipe
            replace_file(folder / RECIPE, self.recipe.to_yaml())
            self._file.write(waiting)
            self._file.flush()
        except OSError as error:
            raise SaveError(
                f"{folder}: the run cannot be recorded there ({error.strerror}). Choose another folder with --out."
            ) from error
        self.recorded_bytes = kept_bytes + len(waiting)

    def __call__(self, event: Event) -> str | None:
        """Records an event. If that fails the run continues; the first time, returns why."""
        figures = plain(event)
        if isinstance(event, Started):
            figures["schema"] = SCHEMA
        line = json.dumps({"event": type(event).__name__, **figures}, ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            first, self._whole = self._whole, False
            return f"{self.path}: cannot be written ({error.strerror}); the run continues." if first else None
        self.recorded_bytes += len(line.encode())
        return None

    def close(self) -> None:
        """Closes the file; what was recorded stays."""
        with contextlib.suppress(OSError):  # a full disk was reported before
            self._file.close()
        self._lock.release()


def versions() -> dict[str, str]:
    """The versions that a run was made with: packages, Python, and the git revision of the working folder if it has one."""
    versions = {"python": platform.python_version()}
    for package in ("softprompt", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    revision = _git_revision()
    return versions | ({"git": revision} if revision else {})


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
