"""Where a command prints: people read the screen, machines one JSON object on stdout."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

# C0 and C1 controls but for tab and line feed, and the marks that turn the direction of writing.
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")


def screen(*, as_json: bool = False) -> Console:
    """What people read. With `as_json` it is stderr, since stdout then belongs to the record alone."""
    quiet = os.environ.get("SOFTPROMPT_QUIET") == "1"
    return Console(stderr=as_json, highlight=False, quiet=quiet)


def visible(text: object) -> str:
    """A name or text as characters that a terminal shows: control characters are spelled out (\\x1b).

    Prompts, data and models come from anyone; an escape sequence in them could rewrite the screen. Line breaks and
    tabs stay."""
    return _CONTROLS.sub(lambda match: repr(match.group())[1:-1], str(text))


def cell(text: object, style: str = "") -> Text:
    """A name or text for a table or a line: visible characters, never markup."""
    return Text(visible(text), style)


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
    console.rule(cell(title, "bold"), align="left")


def fact(console: Console, name: str, value: object) -> None:
    """One line "name   value", the value as it is, never as markup."""
    label = visible(name)
    label = f"{label:<18}" if len(label) < 18 else f"{label}  "
    console.print(Text.assemble((label, "dim"), visible(value)), soft_wrap=True)


def line(console: Console, text: object, style: str = "") -> None:
    """One line of text, long ones left to the terminal to wrap."""
    console.print(cell(text, style), soft_wrap=True)


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
