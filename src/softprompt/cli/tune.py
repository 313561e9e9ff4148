"""`softprompt tune`: a recipe, flags, or both, to a prompt on disk."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.cli import asked
from softprompt.tune.recipe import Recipe, Setting, settings


def command(**given: Any) -> None:
    """Learn a soft prompt from a recipe, or from flags alone."""
    path, overrides = given.pop("recipe"), given.pop("overrides") or []
    dry_run, as_json = given.pop("dry_run"), given.pop("as_json")
    flags = {one.flag: given[_name(one)] for one in settings() if one.flag}
    recipe = Recipe.from_flags(flags, overrides, path=path)
    from softprompt.cli.tuning import plan, run

    if dry_run:
        plan(recipe, as_json=as_json)
    else:
        run(recipe, as_json=as_json)


def _name(one: Setting) -> str:
    assert one.flag is not None
    return one.flag.removeprefix("--").replace("-", "_")


def _metavar(one: Setting) -> str:
    """The kind of value in a word: N, NUMBER|auto, TEXT, or the choices."""
    words = one.wanted
    for start, short in {"a whole number": "N", "a number": "NUMBER", "text": "TEXT"}.items():
        if words.startswith(start):
            return f"{short}|auto" if words.endswith("or auto") else short
    return words.removeprefix("one of ").replace(", ", "|")


def _signature() -> inspect.Signature:
    """The verb's parameters: a flag for every setting that declares one, and the few that are no settings."""
    parameters = {
        "recipe": Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
        **{
            _name(one): Annotated[
                str | None,
                typer.Option(
                    one.flag,
                    help=one.help,
                    metavar=_metavar(one),
                    show_default=False if one.default is None else str(one.default),
                ),
            ]
            for one in settings()
            if one.flag
        },
        "overrides": Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="KEY=VALUE",
                help="Any setting of the recipe; `softprompt recipe` lists them.",
            ),
        ],
        "dry_run": Annotated[
            bool, typer.Option("--dry-run", help="Show what would be trained, and how, without training.")
        ],
        "as_json": asked.AsJson,
    }
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name in ("dry_run", "as_json") else None,
                annotation=annotation,
            )
            for name, annotation in parameters.items()
        ]
    )


command.__signature__ = _signature()  # type: ignore[attr-defined]
