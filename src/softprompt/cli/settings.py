"""`softprompt settings`: the settings of every verb, as a file to start from or as the reference page."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from softprompt.cli.recipe import starting_file, table_of
from softprompt.errors import RecipeError
from softprompt.settings.section import Section, joined, settings
from softprompt.settings.table import Table
from softprompt.tuning.recipe import Recipe

EXAMPLE = "softprompt settings generate > generate.yaml"


def command(
    verb: Annotated[str | None, typer.Argument(metavar="[VERB]", show_default=False)] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page of all verbs instead.")
    ] = False,
) -> None:
    """Show the settings of a verb as a YAML file, or those of all verbs as a page."""
    if markdown:
        print(reference(), end="")
        return
    if verb is None:
        raise RecipeError(f"Name a verb, one of {', '.join(verbs_with_settings())}; or pass --markdown.")
    if verb not in verbs_with_settings():
        raise RecipeError(f"found {verb!r}, wanted one of {', '.join(verbs_with_settings())}.")
    print(starting_file(joined(verbs_with_settings()[verb])), end="")


def verbs_with_settings() -> dict[str, tuple[type[Table], ...]]:
    """Every verb that takes tables of settings, and which."""
    from softprompt.cli.app import VERBS

    taken = {
        verb: getattr(import_module(f"softprompt.cli.{verb}").command, "tables", ())
        for verb in VERBS
        if verb != "settings"
    }
    return {verb: tables for verb, tables in taken.items() if tables}


def reference() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings of every command",
        "",
        "<!-- Written by `softprompt settings --markdown`; `make docs` renews it, `make check` compares it. -->",
        "",
        "Each setting can be written into a YAML file, passed as `--set key=value`, or passed as its flag. Flags win",
        "over `--set`, and `--set` over the file. A command without an argument takes the file as its argument",
        "(`softprompt tune my.yaml`), the others by `--config my.yaml`. A flag that takes a list may be repeated.",
        "`softprompt settings VERB > my.yaml` writes a file to start from.",
        "",
        "Killed work continues by one rule. `tune`, `together` and `sweep` continue only with `--resume`, since the same command",
        "may as well mean a new run; where nothing but the same figures could come out, in `evaluate` and `compare`, rows",
        "and arms that are done are always kept.",
    ]
    for verb, tables in verbs_with_settings().items():
        lines += ["", f"## `softprompt {verb}`", ""]
        if issubclass(tables[0], Recipe):
            lines += ["Takes a recipe: every setting of the [recipe reference](recipe.md)."]
        rest: list[type[Section]] = [table for table in tables if not issubclass(table, Recipe)]
        if rest:
            lines += ["", *table_of(settings(joined(tuple(rest))))]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"
