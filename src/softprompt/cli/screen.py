"""Where a command prints: people read the screen, machines one JSON object on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from softprompt.progress.console import Screen, visible
from softprompt.progress.console import figure as figure
from softprompt.progress.console import table as table

LABEL_WIDTH = 18


def screen(*, as_json: bool = False) -> Screen:
    """What people read. With `as_json` it is stderr, since stdout then belongs to the record alone."""
    return Screen(stderr=as_json, quiet=os.environ.get("SOFTPROMPT_QUIET") == "1")


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


def heading(console: Screen, title: str) -> None:
    """A rule with a title, one empty line before it."""
    console.print()
    console.rule(Text(visible(title), "bold"), align="left")


def fact(console: Screen, name: str, value: object) -> None:
    """One line "name   value"; on a terminal, a long value is broken between words and stays in its column."""
    label, text = Text(visible(name), "dim"), visible(value)
    wide = LABEL_WIDTH + Text(text).cell_len
    if not console.is_terminal or len(label) + 2 > LABEL_WIDTH or wide <= console.width:
        label.pad_right(max(2, LABEL_WIDTH - len(label)))
        line(console, Text.assemble(label, text))
        return
    grid = Table.grid()
    grid.add_column(width=LABEL_WIDTH)
    grid.add_column(overflow="fold")
    grid.add_row(label, Text(text))
    console.print(grid)


def line(console: Screen, text: str | Text, style: str = "") -> None:
    """A line of text; on a terminal it is broken between words."""
    console.print(
        text if isinstance(text, Text) else Text(visible(text), style), soft_wrap=not console.is_terminal
    )


def to_copy(console: Screen, command: str) -> None:
    """A command to copy: never broken by us."""
    console.print(Text(visible(command)), soft_wrap=True)


def size(count: float) -> str:
    """Bytes in units that people read."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
