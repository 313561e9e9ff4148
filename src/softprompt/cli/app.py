"""The command `softprompt`: its verbs, each in a file of its own that is imported when the verb is used.

To add a verb: write `command(...)` in cli/VERB.py, and its line in VERBS.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from softprompt.cli.ending import exit_code

VERBS = {
    "demo": "The whole path in under two minutes, offline: load, tune, compare before and after.",
    "tune": "Learn a soft prompt from a recipe, or from flags alone.",
    "together": "Learn a prompt for each of several recipes in the same passes over one base.",
    "sweep": "Learn under many settings and seeds side by side; keep the best prompt.",
    "generate": "Continue texts with the base, with one prompt or with several.",
    "preview": "Show exactly what would be trained: tokens, soft slots, what the loss counts.",
    "evaluate": "Measure the base, a text or a learned prompt on held-out rows.",
    "compare": "Compare a soft prompt with other prompts, LoRA and full fine-tuning, in one report.",
    "report": "Make the report of any runs again: one page, and the same in Markdown, CSV and JSON.",
    "plot": "Draw the losses of one run or several, in the terminal or as a picture.",
    "inspect": "Show what a prompt is: its origin, template, sizes and nearest tokens.",
    "export": "Write a prompt in the forms that PEFT, vLLM and other programs read.",
    "info": "Show versions, device and number format, and why they were chosen.",
    "recipe": "Write a recipe to start from, with every setting explained.",
}


class Verb(TyperCommand):
    """A command known by name and one line of help; its file is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module = import_module(f"softprompt.cli.{self.name}")
        app = typer.Typer(add_completion=False)
        app.command(self.name, help=self.help)(module.command)
        return typer.main.get_command(app).make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    """The verbs in the order of VERBS."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, help in VERBS.items():
            self.add_command(Verb(name, help=help, rich_markup_mode=self.rich_markup_mode))


app = typer.Typer(cls=Verbs, no_args_is_help=True, rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        import softprompt

        print(softprompt.__version__)
        raise typer.Exit


@app.callback()
def softprompt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where a failure arose (also: SOFTPROMPT_TRACEBACK=1).")
    ] = False,
) -> None:
    """Learn, measure and keep soft prompts: a few vectors that fit one frozen language model to a task."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    traceback = "--traceback" in options or os.environ.get("SOFTPROMPT_TRACEBACK") == "1"
    if "--traceback" in options:
        arguments.remove("--traceback")  # it may stand behind the verb too
    _prepare_libraries()
    command = typer.main.get_command(app)
    return exit_code(
        lambda: command.main(arguments, prog_name="softprompt", standalone_mode=False), traceback=traceback
    )


def _prepare_libraries() -> None:
    """Set, before they are imported, what libraries read from the environment; a variable that is set already wins."""
    for name, value in {
        # Threads that spin while they wait make a run 20 times slower as soon as another program wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # But some microseconds: small products come in quick succession, and waking a thread takes longer than they do.
        "GOMP_SPINCOUNT": "3000",
        # Libraries' bars and warnings would bury what the command says.
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
