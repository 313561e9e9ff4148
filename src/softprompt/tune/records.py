"""What a run leaves beside its prompt: the recipe as settled, and every figure it measured."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from softprompt.errors import SaveError
from softprompt.tune.events import Event
from softprompt.tune.recipe import Recipe

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"


class RunFolder:
    """`recipe.yaml`, written at the start, and `metrics.jsonl`, a line an event."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            self._metrics = (folder / METRICS).open("w", encoding="utf-8")
        except OSError as error:
            raise SaveError(
                f"{folder}: the run cannot be recorded there ({error.strerror}). Choose another folder with --out."
            ) from error

    def __call__(self, event: Event) -> None:
        line = json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=False)
        try:
            self._metrics.write(line + "\n")
            self._metrics.flush()
        except OSError as error:
            raise SaveError(f"{self.folder / METRICS}: cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        """Close the file; what was recorded stays."""
        self._metrics.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on the GPU where the base lies on one."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """What the run was made with: packages, Python, and the git revision of the working folder if it has one."""
    found = {"python": platform.python_version()}
    for package in ("softprompt", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    revision = _git_revision()
    return found | ({"git": revision} if revision else {})


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def number_or_none(value: float) -> Any:
    """A figure for JSON, which has no NaN: None where it is unknown."""
    return value if value == value else None
