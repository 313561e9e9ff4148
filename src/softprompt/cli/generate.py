"""`softprompt generate`: continue texts with the base alone, with a prompt, or with several side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, screen
from softprompt.cli.streams import read_input
from softprompt.errors import RecipeError
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.console import Screen, visible
from softprompt.settings.base_settings import BaseSettings

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.inference.generate import Generation
    from softprompt.prompt.soft_prompt import Prompt


EXAMPLE = 'softprompt generate --prompt runs/mine "Where is my parcel?"'


@takes(BaseSettings, DecodeSettings)
def command(
    base: BaseSettings,
    settings: DecodeSettings,
    *,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="What to continue; - reads standard input.")
    ],
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompt", help="A prompt's folder; give it again for more prompts.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Show the base's own answer beside the prompt's.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Continue texts with the base, with one prompt or with several."""
    folders = prompts or []
    asked.demand_folders(folders)
    if side_by_side and not folders:
        raise RecipeError("--side-by-side needs a prompt to compare with the base. Add --prompt FOLDER.")
    from softprompt.store.artifact import load_prompt

    loaded = [load_prompt(folder) for folder in folders]
    lm = asked.load_base(base, *loaded)
    for folder, prompt in zip(folders, loaded, strict=True):
        prompt.base.demand(lm.fingerprint, str(folder))
    inputs = [read_input() if text == "-" else text for text in texts]
    alone = len(loaded) + side_by_side <= 1
    streams = alone and len(inputs) == 1 and settings.drawn == 1 and not as_json and sys.stdout.isatty()
    if streams:
        _write(inputs[0])
    rows = answers(
        lm,
        inputs,
        loaded,
        settings,
        with_base=side_by_side or not loaded,
        on_text=(lambda index, piece: _write(piece)) if streams else None,
        progress=False if screen().quiet else None,
    )
    if streams:
        _write("\n")
    elif as_json:
        emit(
            {
                "outputs": [
                    {
                        "prompt": row.prompt,
                        "input": row.input,
                        "text": row.text,
                        "tokens": row.tokens,
                        "finish_reason": row.finish_reason,
                    }
                    for row in rows
                ]
            }
        )
    elif not alone:
        show_side_by_side(screen(), rows)
    else:
        for row in rows:
            # Exactly as generated where it goes to a file or another program.
            text = f"{row.input}{row.text}"
            print(visible(text) if sys.stdout.isatty() else text)


def _write(piece: str) -> None:
    """Prints a piece of a text to the terminal as soon as it is generated."""
    print(visible(piece), end="", flush=True)


def answers(
    lm: FrozenLM,
    inputs: Sequence[str],
    prompts: Sequence[Prompt],
    settings: DecodeSettings,
    *,
    with_base: bool,
    on_text: Callable[[int, str], None] | None = None,
    progress: bool | None = None,
) -> list[Generation]:
    """Each input continued by the base (if wanted) and by each prompt, in that order, in one batch.

    Beside a prompt, the base reads the same template without its soft slots, so that only the vectors differ."""
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.generate import generate

    columns = [compile_prompt(lm, prompt) for prompt in prompts]
    if with_base:
        layout = columns[0].template if columns else None
        special_tokens = bool(columns) and columns[0].special_tokens
        columns.insert(0, compile_prompt(lm, None, template=layout, special_tokens=special_tokens))
    rows = generate(
        lm,
        [text for text in inputs for _ in columns],
        [column for _ in inputs for column in columns],
        settings,
        on_text=on_text,
        progress=progress,
    )
    given = [text for text in inputs for _ in columns for _ in range(settings.n)]
    return [replace(row, input=text) for row, text in zip(rows, given, strict=True)]


def show_side_by_side(console: Screen, rows: Sequence[Generation]) -> None:
    """A table for each input: who answered, and how."""
    inputs = list(dict.fromkeys(row.input for row in rows))
    for given in inputs:
        answered = [row for row in rows if row.input == given]
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        names = [visible(row.prompt or "base") for row in answered]
        table.add_column(style="dim", min_width=min(max(map(len, ["input", *names])), console.width // 2))
        table.add_column(overflow="fold")
        table.add_row("input", Text(visible(given), "italic"))
        for name, row in zip(names, answered, strict=True):
            table.add_row(name, visible(row.text.strip() or "(nothing)"))
        console.print(table)
        console.print()
