"""`softprompt plot`: a run's losses in the terminal and, if asked, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.screen import line, screen
from softprompt.report.plot import draw, for_terminal, picture_path, read_plotted

EXAMPLE = "softprompt plot runs/mine runs/other --out losses.png"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of a sweep.")],
    out: Annotated[str | None, typer.Option(help="Write a picture too: a .png, .svg or .pdf file.")] = None,
) -> None:
    """Draw how loss fell, for one run or several."""
    console = screen()
    picture = None if out is None else picture_path(out)
    curves = read_plotted(runs)
    chart, _, figures = for_terminal(curves, width=min(console.width, 100)).partition("\n\n")
    console.print(chart, soft_wrap=True)
    console.print()
    for figures_of_run in figures.splitlines():
        line(console, figures_of_run)
    if picture is not None:
        draw(curves, picture)
        line(console, f"Written to {picture}.")
