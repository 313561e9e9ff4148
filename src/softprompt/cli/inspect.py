"""`softprompt inspect`: what a prompt is, and roughly what its vectors lie near to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, heading, line, screen, size, table
from softprompt.errors import BaseError
from softprompt.progress.console import Screen
from softprompt.settings.base_settings import BaseSettings

if TYPE_CHECKING:
    from softprompt.prompt.soft_prompt import Prompt


EXAMPLE = "softprompt inspect runs/mine"


@takes(BaseSettings)
def command(
    base: BaseSettings,
    *,
    folder: Annotated[Path, typer.Argument(metavar="PROMPT", help="The prompt's folder.")],
    nearest: Annotated[int, typer.Option(min=1, help="Vocabulary tokens to name for each vector.")] = 5,
    as_json: asked.AsJson = False,
) -> None:
    """Show what a prompt is: its origin, template, sizes and nearest tokens."""
    asked.demand_folders([folder])
    from softprompt.store.artifact import load_prompt, prompt_bytes

    prompt = load_prompt(folder)
    record = describe(prompt, folder, prompt_bytes(folder))
    unavailable = None
    try:
        lm = asked.load_base(base, prompt)
        prompt.base.demand(lm.fingerprint, str(folder))
        if prompt.kind == "soft":
            from softprompt.comparison.anatomy import anatomy

            seen = asdict(anatomy(lm, prompt, nearest))
            record["vectors"] = {
                "table_norm_median": seen["table_norm_median"],
                "table_norm_range": seen["table_norm_range"],
                "rows": seen["vectors"],
            }
    except BaseError as error:
        if base.base is not None:
            raise
        unavailable = str(error)  # the prompt can be read without its base, its neighbours cannot
    if as_json:
        emit(record | {"base_unavailable": unavailable})
        return
    show(record, unavailable)


def describe(prompt: Prompt, folder: Path, bytes: int) -> dict[str, Any]:
    """The facts that can be read from the prompt's files, without the base."""
    return {
        "path": str(folder),
        "name": prompt.name,
        "kind": prompt.kind,
        "length": prompt.length,
        "shape": [list(tensor.shape) for tensor in prompt.tensors.values()],
        "bytes": bytes,
        "template": prompt.template,
        "target": prompt.target,
        "base": {
            "name": prompt.base.name,
            "revision": prompt.base.revision,
            "sha256": prompt.base.sha256,
            "sampled_only": prompt.base.sampled_only,
            "width": prompt.base.width,
            "layers": prompt.base.layers,
            "vocabulary": prompt.base.vocabulary,
        },
        "notes": dict(prompt.notes),
    }


def show(record: dict[str, Any], unavailable: str | None) -> None:
    """Prints the nearest tokens first, the origin next, the whole recipe last."""
    console = screen()
    base = record["base"]
    heading(console, f"prompt {record['name']}")
    fact(console, "where", f"{record['path']} ({size(record['bytes'])} of vectors)")
    fact(console, "kind", f"{record['kind']}, {record['length']} virtual tokens")
    fact(
        console,
        "template",
        repr(record["template"]) if record["template"] else "none: it is placed before the text",
    )
    fact(console, "learns", f"the field {record['target']}" if record["target"] else "all text")
    if unavailable:
        heading(console, "vectors")
        line(console, f"not compared with the base: {unavailable}")
    elif "vectors" in record:
        show_vectors(console, record["vectors"])
    heading(console, "base")
    sizes = f"width {base['width']}, {base['layers']} layers" if base["width"] else "sizes not recorded"
    fact(console, "base", f"{base['name'] or 'not recorded'} ({sizes})")
    fact(console, "revision", base["revision"] or "none")
    weaker = " (of a sample of the weights, as version 0.1 recorded it: small changes of the base would pass)"
    fact(
        console,
        "fingerprint",
        (base["sha256"] + (weaker if base["sampled_only"] else ""))
        or "not recorded: any base of these sizes is accepted",
    )
    for name, value in record["notes"].items():
        if isinstance(value, dict):
            heading(console, name)
            for inner, item in _flat(value):
                fact(console, inner, item)
        else:
            fact(console, name, value)


def show_vectors(console: Screen, vectors: dict[str, Any]) -> None:
    """The tokens that each vector lies nearest to, and its norm beside those of the embedding table."""
    heading(console, "nearest tokens, by cosine")
    line(console, "A hint only: a vector may mean what no token means.", "dim")
    norms = [f"{row['norm']:.3f}" for row in vectors["rows"]]
    width = console.width - len("row  ") - max(map(len, norms), default=0) - 4
    rows = [
        (
            number,
            norms[number],
            Text(side_by_side([f"{near['token']!r} {near['cosine']:.2f}" for near in row["nearest"]], width)),
        )
        for number, row in enumerate(vectors["rows"])
    ]
    console.print(table(("row", "norm", "nearest"), rows, width=console.width, wraps=(2,)))
    low, high = vectors["table_norm_range"]
    median = vectors["table_norm_median"]
    fact(console, "table norms", f"median {median:.3f}, 98 % between {low:.3f} and {high:.3f}")


def side_by_side(parts: Sequence[str], width: int) -> str:
    """Parts two blanks apart, as many a line as `width` holds; none is broken, whatever blanks it has."""
    lines: list[str] = []
    for part in parts:
        if lines and Text(lines[-1]).cell_len + 2 + Text(part).cell_len <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested notes as lines: recipe.tune.epochs."""
    lines: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{name}.")
        elif item not in (None, [], {}):
            lines.append((f"{prefix}{name}", item))
    return lines
