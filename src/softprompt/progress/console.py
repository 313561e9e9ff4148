"""A screen that names and texts cannot harm: control characters are spelled out, and nothing is read as markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# C0 and C1 controls but for tab and line feed, and the marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: object) -> str:
    r"""The text with its control characters spelled out (`\x1b`), but for line breaks and tabs.

    Prompts, data and models come from anyone; an escape sequence in them could rewrite the screen."""
    return _CONTROLS.sub(lambda match: repr(match.group())[1:-1], str(text))


class Screen(Console):
    """A console for words from anywhere. What is not a rich object is plain text: no markup, no emoji codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that is printed, here made visible whatever they came from."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style, segment.control)

    @property
    def is_watched(self) -> bool:
        """Whether someone sees it as it comes: a terminal, or a notebook in which rich can draw."""
        # without ipywidgets rich warns of it at every bar
        return self.is_terminal or (self.is_jupyter and find_spec("ipywidgets") is not None)


class Lines(Protocol):
    """A live display of rich's: lines of a terminal that are drawn again and again."""

    @property
    def console(self) -> Console:
        """Where it draws."""

    def start(self) -> None:
        """Begins to draw."""

    def stop(self) -> None:
        """Draws for the last time."""


_DRAWN: list[Lines] = []


@contextmanager
def drawing(lines: Lines) -> Iterator[None]:
    """Draws live lines until the end of the context, but for what is `set_aside` in it."""
    lines.start()
    _DRAWN.append(lines)
    try:
        yield
    finally:
        _DRAWN.remove(lines)
        lines.stop()


@contextmanager
def set_aside() -> Iterator[None]:
    """Draws no live lines meanwhile, so that another library's bars can be seen."""
    aside = [lines for lines in _DRAWN if lines.console.is_terminal]
    for lines in reversed(aside):
        lines.stop()
    try:
        yield
    finally:
        for lines in aside:
            lines.start()


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, width: int, wraps: Sequence[int] = (0,)
) -> RenderableType:
    """Rows in columns where they fit into `width`; else each row as lines of "header  value".

    No number or word is ever cut: only the columns in `wraps` may break, and only between words."""
    cells = [[item if isinstance(item, Text) else Text(visible(item)) for item in row] for row in rows]
    least = [
        max(_widest(column, words=index in wraps), _widest([Text(header)], words=True))
        for index, (header, column) in enumerate(zip(headers, zip(*cells, strict=True), strict=False))
    ]
    if cells and sum(least) + 2 * (len(least) - 1) > width:
        return Group(*(_stacked(headers, row) for row in cells))
    grid = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column, header in enumerate(headers):
        grid.add_column(Text(header), min_width=least[column] if cells else None, overflow="fold")
    for row in cells:
        grid.add_row(*row)
    return grid


def _widest(cells: Iterable[Text], *, words: bool) -> int:
    parts = (part for cell in cells for part in (cell.plain.split() if words else cell.plain.splitlines()))
    return max((Text(part).cell_len for part in parts), default=0)


def _stacked(headers: Sequence[str], row: Sequence[Text]) -> RenderableType:
    lines = [
        Text.assemble((f"{header}  " if header else "", "dim"), item)
        for header, item in zip(headers, row, strict=True)
        if item.plain
    ]
    return Group(*lines, Text())


def figure(value: float, digits: int = 4) -> str:
    """A measured figure; "unknown" for nan."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "unknown"


def size(count: float | None) -> str:
    """Bytes in units that people read; "unknown" for None and nan."""
    if count is None or not math.isfinite(count):
        return "unknown"
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
