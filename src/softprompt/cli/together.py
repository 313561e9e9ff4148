"""`softprompt together`: a prompt for each of several recipes, side by side over one base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.screen import emit, fact, figure, heading, line, screen
from softprompt.cli.tune import describe_losses
from softprompt.progress.console import drawing
from softprompt.progress.events import Event, Note, Saved, Validated
from softprompt.progress.runs import ShowTable
from softprompt.tuning.recipe import Recipe

EXAMPLE = "softprompt together first.yaml second.yaml --set tune.epochs=3"


def command(
    recipe_files: Annotated[list[Path], typer.Argument(metavar="RECIPE.yaml...", show_default=False)],
    *,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for all recipes."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue runs that were killed, from their last checkpoints.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Learn a prompt for each recipe in the same passes over one base. Those of `form: multitask` share a part."""
    trusting = ["trust_remote_code=true"] if trust_remote_code else []
    recipes = [Recipe.load(path, [*(overrides or []), *trusting]) for path in recipe_files]
    for recipe in recipes:
        asked.demand_paths(recipe)
    from softprompt.tuning.together import tune_tasks, tune_together

    names = [recipe.out for recipe in recipes]
    sharing = any(recipe.prompt.form == "multitask" for recipe in recipes)  # then all, or it is refused
    console = screen(as_json=as_json)
    table = ShowTable(console, "prompt", names)
    saved: list[str] = []

    def tell(number: int, event: Event) -> None:
        table.event(number, event)
        text = ""
        match event:
            case Note():
                text = event.text
            case Validated() if not console.is_terminal:
                kept = ", best so far, kept" if event.best else ""
                text = f"step {event.step}, loss {figure(event.nll)}{kept}"
            case Saved():
                saved.append(event.path)
        if text:
            line(console, f"{names[number]}: {text}")

    try:
        with drawing(table.live):
            tuned = (tune_tasks if sharing else tune_together)(
                recipes, on_event=tell, progress=False, resume=resume
            )
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            line(console, asked.RESUME)
        for path in saved:
            line(console, f"The best prompt so far is kept in {path}.")
        raise
    heading(console, "learned with one shared part" if sharing else "learned side by side")
    for result in tuned:
        fact(console, result.path, f"{result.loss_name} {describe_losses(result)}")
    if as_json:
        emit({"prompts": [result.to_record() for result in tuned]})
