"""`softprompt preview`: every token of a few rows by its part in the loss, and counts over all rows."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, line, screen
from softprompt.progress.console import Screen
from softprompt.tuning.recipe import Recipe

if TYPE_CHECKING:
    from softprompt.data.preview import Preview, ShownRow

STYLES = {"soft": "bold cyan", "context": "dim", "trained": "green", "special": "magenta"}
WORDS = {"soft": "soft", "context": "context", "trained": "trained", "special": "start token"}


EXAMPLE = "softprompt preview --data rows.csv --column text"


@takes(Recipe)
def command(
    recipe: Recipe,
    *,
    show: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 3,
    as_json: asked.AsJson = False,
) -> None:
    """Show exactly what would be trained: tokens, soft slots, what the loss counts."""
    asked.demand_paths(recipe, writes=False)
    from softprompt.base.outline import Outline
    from softprompt.tuning.task import task_of

    base = Outline.load(
        recipe.base, revision=recipe.base_revision, trust_remote_code=recipe.trust_remote_code
    )
    task = task_of(recipe, base)
    shown = task.preview(task.splits.train, show=show)
    console = screen(as_json=as_json)
    for note in task.splits.notes:
        line(console, note)
    show_preview(console, shown)
    if as_json:
        emit(shown.to_record())


def show_preview(console: Screen, shown: Preview) -> None:
    """A line for each stretch of one kind, its tokens parted by |, so that it reads without colours too."""
    fact(console, "template", repr(shown.template))
    fact(console, "learns", shown.learns)
    for row in shown.shown:
        _show_row(console, row)
    lengths = ", ".join(f"{name} {length}" for name, length in shown.lengths.items())
    console.print()
    fact(console, "rows", shown.examples)
    fact(console, "tokens", f"{shown.tokens:,} of text, {shown.trained_tokens:,} of them trained; {lengths}")
    fact(console, "virtual tokens", f"{shown.soft_positions:,} positions over all rows")
    fact(console, "truncated", f"{shown.truncated} rows, by {shown.cut_tokens} tokens in all")
    fact(console, "dropped", f"{shown.dropped} rows")
    fact(
        console,
        "too long",
        f"{shown.too_long} rows" + (" (a run would refuse them)" if shown.too_long else ""),
    )
    fact(
        console,
        "unlabelled",
        f"{shown.unlabelled} rows" + (" (a run would refuse them)" if shown.unlabelled else ""),
    )
    for remark in shown.remarks:
        console.print(Text(remark), soft_wrap=True)
    for problem in shown.problems:
        line(console, problem, "red")


def _show_row(console: Screen, row: ShownRow) -> None:
    console.print()
    cut = f", {row.cut} tokens cut" if row.cut else ""
    console.print(Text(f"row {row.row}: {len(row.tokens)} positions{cut}", "bold"))
    for kind, group in groupby(row.tokens, key=lambda token: token.kind):
        tokens = list(group)
        shown = Text(f"  {WORDS[kind]:<12}", "dim")
        if kind == "soft":
            first, last = tokens[0].text, tokens[-1].text
            shown.append(f"[{len(tokens)} virtual tokens: {first} to {last}]", STYLES[kind])
        else:
            for token in tokens:
                shown.append("|", "dim")
                shown.append(token.text.replace("\n", "\\n"), STYLES[kind])
            shown.append("|", "dim")
        console.print(shown, soft_wrap=False)
