"""`softprompt recipe`: a recipe to start from, and the reference page, both from the settings' own declarations."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Annotated, Any

import typer
import yaml

from softprompt.settings.table import Setting, sections, settings
from softprompt.tuning.recipe import Recipe

SECTIONS = sections(Recipe)


def command(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference page instead.")] = False,
) -> None:
    """Write a recipe to start from, with every setting explained."""
    print(reference() if markdown else starting_recipe(), end="")


def starting_recipe() -> str:
    """Every setting with its help and default, as YAML; those without a default stand commented out."""
    lines = ["# Every setting of softprompt, at its default. Keep the lines that you change."]
    for section, group in _by_section():
        if section:
            lines += ["", f"{section}:  # {SECTIONS[section].__doc__}"]
        indent = "  " if section else ""
        for one in group:
            lines += textwrap.wrap(
                one.help, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
            name = one.path.split(".")[-1]
            if one.required:
                lines.append(f"{indent}{name}: builtin:roles")
            elif one.default is None:
                lines.append(f"{indent}# {name}:")
            else:
                lines.append(f"{indent}{name}: {_written(one.default)}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """docs/recipe.md."""
    lines = [
        "# Recipe reference",
        "",
        "<!-- Written by `softprompt recipe --markdown`; `make docs` renews it, `make check` compares it. -->",
        "",
        "Every setting is declared once, in `softprompt/tuning/recipe.py`. It can be written into a YAML file, passed",
        "as `--set section.name=value` or, where a flag is named, as that flag. Flags win over `--set`, and `--set`",
        "over the file. Numbers may be written `5e-3`, `.5` or `1_000`; only `true` and `false` are booleans; an",
        "empty value or `null` means not set. Unknown settings, settings given twice and values of the wrong kind",
        "are refused with file and line.",
    ]
    for section, group in _by_section():
        title = f"`{section}`: {str(SECTIONS[section].__doc__).rstrip('.').lower()}" if section else "The run"
        lines += [
            "",
            f"## {title}",
            "",
            "| setting | flag | kind | default | meaning |",
            "|---|---|---|---|---|",
        ]
        for one in group:
            default = (
                "(required)" if one.required else "" if one.default is None else f"`{_written(one.default)}`"
            )
            flag = f"`{one.flag}`" if one.flag else ""
            lines.append(f"| `{one.path}` | {flag} | {one.wanted} | {default} | {one.help} |")
    return "\n".join(lines) + "\n"


def _by_section() -> list[tuple[str, list[Setting]]]:
    named = groupby(settings(Recipe), key=lambda one: one.path.rpartition(".")[0])
    return [(section, list(group)) for section, group in named]


def _written(default: Any) -> str:
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
