"""`softprompt recipe`: a recipe to start from, and the reference page, both from the settings' own declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any

import typer
import yaml

from softprompt.settings.section import Section, Setting, sections, settings
from softprompt.tuning.recipe import Recipe

EXAMPLE = "softprompt recipe > my.yaml"
SECTIONS = sections(Recipe)
EXAMPLES = {"data.source": "builtin:roles", "data.column": "prompt"}
"""What a file to start from gives if there is no default, so that it runs as it is."""


def command(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference page instead.")] = False,
) -> None:
    """Write a recipe to start from, with every setting explained."""
    print(reference() if markdown else starting_recipe(), end="")


def starting_recipe() -> str:
    """A recipe with every setting at its default."""
    return starting_file(Recipe)


def starting_file(table: type[Section]) -> str:
    """Every setting with its help and default, as YAML; those without a default are commented out."""
    lines = ["# Every setting of softprompt, at its default. Keep the lines that you change."]
    inner = sections(table)
    for section, group in _by_section(table):
        if section:
            lines += ["", f"{section}:  # {inner[section].__doc__}"]
        indent = "  " if section else ""
        for each in group:
            lines += textwrap.wrap(
                each.help, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
            name = each.path.split(".")[-1]
            if each.path in EXAMPLES:
                lines.append(f"{indent}{name}: {EXAMPLES[each.path]}  # an example: put your own here")
            elif each.default is None:
                lines.append(f"{indent}# {name}:")
            else:
                lines.append(f"{indent}{name}: {_written(each.default)}")
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
    for section, group in _by_section(Recipe):
        title = f"`{section}`: {str(SECTIONS[section].__doc__).rstrip('.').lower()}" if section else "The run"
        lines += [
            "",
            f"## {title}",
            "",
            *table_of(group),
        ]
    return "\n".join(lines) + "\n"


def table_of(group: Iterable[Setting]) -> list[str]:
    """Settings as the lines of a Markdown table."""
    lines = ["| setting | flag | kind | default | meaning |", "|---|---|---|---|---|"]
    for each in group:
        default = (
            "(required)" if each.required else "" if each.default is None else f"`{_written(each.default)}`"
        )
        flags = ", ".join(f"`{name}`" for name in (each.flag, *each.aliases) if name)
        lines.append(f"| `{each.path}` | {flags} | {each.wanted} | {default} | {each.help} |")
    return lines


def _by_section(table: type[Section]) -> list[tuple[str, list[Setting]]]:
    named = groupby(settings(table), key=lambda each: each.path.rpartition(".")[0])
    return [(section, list(group)) for section, group in named]


def _written(default: Any) -> str:
    default = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
