"""Where a command prints: people read the screen, machines one JSON object on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text


def screen(*, as_json: bool = False) -> Console:
    """What people read. With `as_json` it is stderr, since stdout then belongs to the record alone."""
    return Console(stderr=as_json, highlight=False)


def emit(record: Any) -> None:
    """Write one JSON object on stdout; figures that are not known (nan) become null."""
    sys.stdout.write(json.dumps(plain(record)) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Records, paths and mappings as JSON knows them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def heading(console: Console, title: str) -> None:
    console.print()
    console.rule(Text(title, "bold"), align="left")


def fact(console: Console, name: str, value: object) -> None:
    """One line "name   value", the value as it is, never as markup."""
    console.print(Text.assemble((f"{name:<18}", "dim"), str(value)), soft_wrap=True)


def figure(value: float, digits: int = 4) -> str:
    """A measured figure; "unknown" for nan."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "unknown"


def size(count: float) -> str:
    """Bytes in units that people read."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
