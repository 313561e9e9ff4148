"""`softprompt list`: what a library holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.screen import emit, screen, size
from softprompt.errors import RecipeError
from softprompt.progress.console import visible

if TYPE_CHECKING:
    from softprompt.store.library import Entry

EXAMPLE = "softprompt list library/"


def command(
    library: Annotated[
        str,
        typer.Argument(
            metavar="LIBRARY", help="The library: a folder, or an address such as s3://bucket/prompts."
        ),
    ],
    base: Annotated[str | None, typer.Option("--base", help="Show which prompts fit this base.")] = None,
    as_json: asked.AsJson = False,
) -> None:
    """Show every prompt of a library: name, version, base, kind, size and figure."""
    if "://" not in library and not Path(library).expanduser().is_dir():
        raise RecipeError(f"{library}: there is no such folder. `softprompt publish` makes a library.")
    from softprompt.store.library import Library

    entries = Library(library).entries()
    fits = {} if base is None else _fits(entries, base)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (
        "name",
        "",
        "base",
        "kind",
        "virtual tokens",
        "size",
        "metric",
        "published",
        *(["fits"] if base else []),
    ):
        table.add_column(column, overflow="fold")
    for entry in entries:
        row: list[str | Text] = [
            Text(entry.full_name),
            Text(entry.name if entry.is_current else ""),
            Text(visible(entry.base)),
            entry.kind,
            str(entry.virtual_tokens),
            size(entry.bytes),
            Text(_figure(entry.metrics)),
            entry.published,
        ]
        if base is not None:
            row.append(Text(fits[entry.full_name] or "yes"))
        table.add_row(*row)
    console = screen(as_json=as_json)
    if entries:
        console.print(table)
    else:
        console.print(
            f"{library} holds no prompt yet. `softprompt publish RUN NAME --library {library}` adds one.",
            markup=False,
        )
    if as_json:
        emit(
            [
                {
                    "name": entry.name,
                    "version": entry.version,
                    "current": entry.is_current,
                    "base": entry.base,
                    "kind": entry.kind,
                    "virtual_tokens": entry.virtual_tokens,
                    "bytes": entry.bytes,
                    "digest": entry.digest,
                    "metrics": entry.metrics,
                    **({} if base is None else {"fits": not fits[entry.full_name]}),
                }
                for entry in entries
            ]
        )


def _figure(metrics: Mapping[str, float]) -> str:
    """The figure that says most: one of answers before one of losses."""
    losses = ("nll", "perplexity", "bits", "byte")
    names = sorted(metrics, key=lambda name: any(word in name for word in losses))
    return f"{names[0].replace('_', ' ')} {metrics[names[0]]:.3f}" if names else ""


def _fits(entries: Sequence[Entry], base: str) -> dict[str, str]:
    """The reason why each prompt does not fit the base; empty where it does."""
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.errors import SoftPromptError

    lm = FrozenLM.load(base)
    reasons = {}
    for entry in entries:
        try:
            entry.load().base.demand(lm.fingerprint, entry.full_name)
            reasons[entry.full_name] = ""
        except SoftPromptError as error:
            reasons[entry.full_name] = str(error)
    return reasons
