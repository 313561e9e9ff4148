"""`softprompt report`: the report of any runs, made again from their records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.screen import emit, fact, screen

EXAMPLE = "softprompt report runs/compared"


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders that compare, evaluate or tune wrote."),
    ],
    out: Annotated[
        str | None, typer.Option(help="Where to write the report.", show_default="the first run's folder")
    ] = None,
    as_json: asked.AsJson = False,
) -> None:
    """Make the report of any runs again: one page, and the same in Markdown, CSV and JSON."""
    from softprompt.report.render import write_reports

    console = screen(as_json=as_json)
    written = write_reports(runs, runs[0] if out is None else out)
    for path in written:
        fact(console, path.suffix.removeprefix("."), path)
    if as_json:
        emit({"written": written})
