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
        str,
        typer.Argument(
            metavar="PROMPT", help="The prompt's folder; NAME@VERSION with --switch; NAME with --rollback."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME[@VERSION]]",
            help="Its name, the next version if none is given; or hf://OWNER/NAME for the hub.",
        ),
    ] = None,
    library: Annotated[
        str,
        typer.Option("--library", help="The library: a folder, or an address such as s3://bucket/prompts."),
    ] = "library",
    switch: Annotated[
        bool, typer.Option("--switch", help="Publish nothing; let the name mean this version.")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Publish nothing; let the name mean what it meant before.")
    ] = False,
    keep_current: Annotated[
        bool, typer.Option("--keep-current", help="Publish, but let the bare name mean what it meant.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Of a new repository on the hub.")] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Put a prompt into a library or on the hub, or let a name mean another version."""
    if switch and rollback:
        raise RecipeError("--switch and --rollback exclude each other. Give one.")
    if not (switch or rollback):
        asked.demand_folders([Path(prompt)])
    console = screen(as_json=as_json)
    if name is not None and name.startswith("hf://"):
        from softprompt.store.artifact import load_prompt
        from softprompt.store.hub_push import push

        commit = push(load_prompt(prompt), name, private=private)
        fact(console, "published", name)
        fact(console, "for ever", f"{name.partition('@')[0]}@{commit}")
        if as_json:
            emit({"name": name, "commit": commit})
        return
    from softprompt.store.library import Library

    shelf = Library(library)
    if rollback:
        entry = shelf.rollback(prompt)
    elif switch:
        entry = shelf.switch(prompt)
    else:
        entry = shelf.publish(prompt, name or Path(prompt).resolve().name, current=not keep_current)
    fact(
        console,
        "current" if switch or rollback else "published",
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
