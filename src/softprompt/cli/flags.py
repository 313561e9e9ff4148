"""Flags from tables of settings: a verb is called with its tables filled, and each setting has the flag it declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.settings.section import Setting, joined, settings
from softprompt.settings.table import Table, fill

Verb = Callable[..., None]
LINE_BREAK = "\\n"  # how people write a line break of a template in a shell, whose quotes keep the backslash


def takes(*tables: type[Table]) -> Callable[[Verb], Verb]:
    """Makes a command out of `verb(*filled_tables, ...)`.

    The tables are filled from a YAML file, then `--set KEY=VALUE`, then their flags. The verb's own parameters stay
    beside them. The file is the argument of a verb without its own argument, otherwise the flag --config."""
    flagged = [each for each in settings(joined(tables)) if each.flag]

    def decorate(verb: Verb) -> Verb:
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[len(tables) :]

        def command(**values: Any) -> None:
            path = values.pop("settings_file")
            overrides = [_with_line_breaks(override) for override in values.pop("overrides") or []]
            flags = {str(each.flag): _value(each, values.pop(_name(each))) for each in flagged}
            verb(*fill(tables, flags, overrides, path=path), **values)

        derived = {
            "settings_file": Annotated[Path | None, _file(own)],
            **{_name(each): Annotated[_kind(each), _option(each)] for each in flagged},
            "overrides": Annotated[list[str] | None, _OVERRIDES],
        }
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in derived.items()
        ]
        own = [parameter.replace(kind=keyword) for parameter in own]
        arguments = [each for each in own if _is_argument(each)]
        options = [each for each in own if not _is_argument(each)]
        command.__signature__ = inspect.Signature([*arguments, *options, *parameters])  # type: ignore[attr-defined]
        command.__doc__ = verb.__doc__
        command.tables = tables  # type: ignore[attr-defined]
        return command

    return decorate


_OVERRIDES = typer.Option(
    "--set", metavar="KEY=VALUE", help="Any setting by its key; `softprompt settings VERB` lists them."
)


def _file(own: Sequence[inspect.Parameter]) -> Any:
    if any(_is_argument(parameter) for parameter in own):
        return typer.Option("--config", metavar="FILE.yaml", help="Read settings from a file.")
    return typer.Argument(metavar="[FILE.yaml]", help="Read settings from a file.", show_default=False)


def _is_argument(parameter: inspect.Parameter) -> bool:
    notes = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(note, typer.models.ArgumentInfo) for note in notes)


def _name(each: Setting) -> str:
    return str(each.flag).removeprefix("--").replace("-", "_")


def _kind(each: Setting) -> Any:
    return {"value": str | None, "switch": bool | None}.get(each.shape, list[str] | None)


def _value(each: Setting, value: Any) -> Any:
    """A flag's value, None where it was not given; typer gives an empty list for a repeated one."""
    if each.path.split(".")[-1] == "template" and isinstance(value, str):
        return value.replace(LINE_BREAK, "\n")
    return value if value != [] else None


def _with_line_breaks(override: str) -> str:
    """A `--set` override of a template with its line breaks; any other as it is."""
    key, equals, text = override.partition("=")
    if key.strip().split(".")[-1] != "template":
        return override
    return f"{key}{equals}{text.replace(LINE_BREAK, chr(10))}"


def _option(each: Setting) -> Any:
    if each.shape == "switch":
        names = [f"{name}/--no-{name.removeprefix('--')}" for name in (str(each.flag),)]
        return typer.Option(*names, *each.aliases, help=each.help, show_default=False)
    return typer.Option(
        each.flag,
        *each.aliases,
        help=_help(each),
        metavar=_metavar(each),
        show_default=_shown_default(each),
        autocompletion=_completes(each.choices) if each.choices else None,
    )


def _help(each: Setting) -> str:
    """The setting's help, with the words that it takes where the metavar has no room for them."""
    text = each.help
    if each.choices and _metavar(each) == "WORD" and not all(word in text for word in each.choices):
        text += f" One of {', '.join(each.choices)}."
    return text if each.shape == "value" else f"{text} May be repeated."


def _shown_default(each: Setting) -> Any:
    if each.default in (None, [], (), {}):
        return False
    if isinstance(each.default, list | tuple):
        return ",".join(str(value) for value in each.default)
    return str(each.default)


def _completes(choices: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


def _metavar(each: Setting) -> str:
    """The kind of value in a word: N, NUMBER|auto, TEXT, or the choices."""
    if each.shape == "mapping":
        return "NAME=VALUE"
    words = each.wanted.removeprefix("a list of ").removeprefix("a list: ")
    for start, short in {"a whole number": "N", "a number": "NUMBER", "text": "TEXT"}.items():
        if words.startswith(start):
            return f"{short}|auto" if words.endswith("or auto") else short
    if each.choices:
        joined_choices = "|".join(each.choices)
        return joined_choices if len(joined_choices) <= 16 else "WORD"
    return "VALUE"
