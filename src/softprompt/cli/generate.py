"""`softprompt generate`: continue texts with the base alone, with a prompt, or with several side by side."""

from __future__ import annotations

import os
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
from softprompt.cli.screen import emit, fact, is_follower, line, screen
from softprompt.cli.streams import read_input
from softprompt.data.source import load_splits
from softprompt.errors import DataError, RecipeError
from softprompt.inference.settings import DecodeSettings
from softprompt.progress.console import Screen, visible
from softprompt.scale.cluster import workers_of
from softprompt.settings.base_settings import BaseSettings
from softprompt.settings.cluster_settings import ClusterSettings
from softprompt.store.ownership import PROMPT_FILES

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.inference.generate import Generation
    from softprompt.prompt.soft_prompt import Prompt


EXAMPLE = 'softprompt generate --prompt runs/mine "Where is my parcel?"'


@takes(BaseSettings, DecodeSettings, ClusterSettings)
def command(
    base: BaseSettings,
    settings: DecodeSettings,
    cluster: ClusterSettings,
    *,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="What to continue; - reads standard input. With --out, a file whose rows are continued.",
        ),
    ],
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompt", help="A prompt's folder; give it again for more prompts.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Show the base's own answer beside the prompt's.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(help="Continue every row of a file, and keep the answers here; run again to continue."),
    ] = None,
    resume: asked.ContinuesByItself = False,
    as_json: asked.AsJson = False,
) -> None:
    """Continue texts with the base, with one prompt or with several; or every row of a file (--out)."""
    folders = prompts or []
    if out is None and (cluster.cluster is not None or resume):
        flag = "--resume" if resume else "--on"
        raise RecipeError(
            f"{flag}: is for the rows of a file. Give the file in place of a text, and --out FOLDER for its answers."
        )
    if out is not None and (len(texts) != 1 or texts[0] == "-"):
        raise RecipeError(f"--out: found {len(texts)} texts, wanted one file, whose rows are continued.")
    if out is not None:
        load_splits(
            texts[0], validation=0, test=0, limit=1
        )  # refuses what is no file, before torch is imported
    asked.demand_folders(folders)
    for text in texts:
        if os.path.isfile(os.path.join(text, PROMPT_FILES[0])):  # which no text makes fail, unlike pathlib
            raise RecipeError(
                f"{text}: found a prompt's folder, wanted a text to continue. Give the folder as --prompt {text}."
            )
    if side_by_side and not folders:
        raise RecipeError("--side-by-side needs a prompt to compare with the base. Add --prompt FOLDER.")
    from softprompt.base.processes import demand_alone, joined
    from softprompt.store.artifact import load_prompt

    if base.spread not in ("tensor", "layers"):
        demand_alone("generate")
    loaded = [load_prompt(folder) for folder in folders]
    lm = asked.load_base(base, *loaded)
    for folder, prompt in zip(folders, loaded, strict=True):
        prompt.base.demand(lm.fingerprint, str(folder))
    if out is not None:
        _generate_file(
            lm, texts[0], out, loaded, settings, cluster, side_by_side=side_by_side, as_json=as_json
        )
        return
    # Several processes that hold the base in parts read the same texts; the first one has the input and speaks.
    inputs = joined().same([] if is_follower() else [read_input() if text == "-" else text for text in texts])
    alone = len(loaded) + side_by_side <= 1
    streams = (
        alone
        and len(inputs) == 1
        and settings.drawn == 1
        and not as_json
        and sys.stdout.isatty()
        and not is_follower()
    )
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
    elif is_follower():
        return
    elif not alone:
        show_side_by_side(screen(), rows)
    else:
        for row in rows:
            # Exactly as generated where it goes to a file or another program.
            text = f"{row.input}{row.text}"
            print(visible(text) if sys.stdout.isatty() else text)


def _generate_file(
    lm: FrozenLM,
    source: str,
    out: str,
    prompts: Sequence[Prompt],
    settings: DecodeSettings,
    cluster: ClusterSettings,
    *,
    side_by_side: bool,
    as_json: bool,
) -> None:
    """Continues the rows of a file."""
    from softprompt.inference.generate_file import generate_file

    console = screen(as_json=as_json)
    try:
        with workers_of(cluster, as_stream=True) as workers:
            answers = generate_file(
                lm,
                source,
                out,
                prompts,
                settings,
                with_base=side_by_side,
                workers=workers,
                progress=False if console.quiet else None,
            )
    except KeyboardInterrupt:
        line(console, f"{asked.RESUME} Answers that were finished are kept in {out}.")
        raise
    if answers.reused:
        fact(console, "kept", f"{answers.reused} rows of an earlier run were not continued again")
    fact(console, "answers", answers.path)
    if as_json:
        emit(
            {
                "path": str(answers.path),
                "rows": answers.rows,
                "lines": answers.lines,
                "reused": answers.reused,
                "failed": answers.failed,
            }
        )
    if answers.failed:
        raise DataError(
            f"{answers.path}: {answers.failed} of {answers.rows} rows could not be continued; their lines say why (error). The "
            "other rows are answered."
        )


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
