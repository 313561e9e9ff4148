"""`softprompt publish`: a prompt into a library under a name and a version; or a name back to a former version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.screen import emit, fact, screen, size
from softprompt.errors import RecipeError

EXAMPLE = "softprompt publish runs/support support --library library/"


def command(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt's folder; or NAME@VERSION with --switch.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME[@VERSION]]", help="Its name; the next version if none is given."),
    ] = None,
    library: Annotated[Path, typer.Option("--library", help="The library's folder.")] = Path("library"),
    switch: Annotated[
        bool,
        typer.Option(
            "--switch", help="Publish nothing; let the name mean this version: an update or a rollback."
        ),
    ] = False,
    keep_current: Annotated[
        bool, typer.Option("--keep-current", help="Publish, but let the bare name mean what it meant.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Put a prompt into a library, or switch a name to another version."""
    from softprompt.store.library import Library

    shelf = Library(library)
    if switch:
        entry = shelf.switch(prompt)
    else:
        if name is None:
            name = Path(prompt).resolve().name
        if not Path(prompt).is_dir():
            raise RecipeError(
                f"{prompt}: there is no such folder. Give a prompt that `tune` or `distil` saved."
            )
        entry = shelf.publish(prompt, name, current=not keep_current)
    console = screen(as_json=as_json)
    fact(
        console,
        "published",
        f"{entry.full_name} ({entry.kind}, {entry.virtual_tokens} virtual tokens, {size(entry.bytes)})",
    )
    meaning = "means this version" if entry.is_current else "means another version still"
    fact(console, entry.name, meaning)
    fact(console, "digest", entry.digest)
    if as_json:
        emit(
            {
                "name": entry.name,
                "version": entry.version,
                "digest": entry.digest,
                "current": entry.is_current,
            }
        )
