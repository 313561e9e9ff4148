"""Flags from the recipe: a verb that takes a recipe gets one for every setting that declares its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.cli import asked
from softprompt.settings.table import Setting, settings
from softprompt.tuning.recipe import Recipe


def takes_recipe(verb: Callable[..., None]) -> Callable[..., None]:
    """Call `verb(recipe, ...)` with the recipe that file, `--set` and flags amount to; its own options stay beside."""
    flagged = [one for one in settings(Recipe) if one.flag]

    def command(**given: Any) -> None:
        path, overrides = given.pop("recipe_file"), given.pop("overrides") or []
        flags = {str(one.flag): given.pop(_name(one)) for one in flagged}
        verb(Recipe.from_flags(flags, overrides, path=path), **given)

    parameters = {
        "recipe_file": Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
        **{_name(one): Annotated[str | None, _option(one)] for one in flagged},
        "overrides": asked.Overrides,
    }
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    derived = [
        inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in parameters.items()
    ]
    command.__signature__ = inspect.Signature([*derived, *own])  # type: ignore[attr-defined]
    command.__doc__ = verb.__doc__
    return command


def _name(one: Setting) -> str:
    return str(one.flag).removeprefix("--").replace("-", "_")


def _option(one: Setting) -> Any:
    default = False if one.default is None else str(one.default)
    return typer.Option(one.flag, help=one.help, metavar=_metavar(one), show_default=default)


def _metavar(one: Setting) -> str:
    """The kind of value in a word: N, NUMBER|auto, TEXT, or the choices."""
    words = one.wanted
    for start, short in {"a whole number": "N", "a number": "NUMBER", "text": "TEXT"}.items():
        if words.startswith(start):
            return f"{short}|auto" if words.endswith("or auto") else short
    return words.removeprefix("one of ").replace(", ", "|")
