"""The two outputs of a command: text for people on the screen, one JSON object for programs on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from softprompt.progress.console import Screen, visible
from softprompt.progress.console import figure as figure
from softprompt.progress.console import size as size
from softprompt.progress.console import table as table
from softprompt.store.json_values import plain

LABEL_WIDTH = 18


def screen(*, as_json: bool = False) -> Screen:
    """The console for people. With `as_json` it is stderr, since stdout then carries only the record."""
    return Screen(stderr=as_json, quiet=os.environ.get("SOFTPROMPT_QUIET") == "1" or is_follower())


def is_follower() -> bool:
    """Whether this is one of several processes that learn together, and not the first, which speaks for all."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def emit(record: Any) -> None:
    """Writes one JSON object on stdout; figures that are not known (nan) become null."""
    if is_follower():
        return
    sys.stdout.write(json.dumps(plain(record)) + "\n")
    sys.stdout.flush()


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
