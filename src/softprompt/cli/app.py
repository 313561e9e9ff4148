"""The command `softprompt`: its verbs, each in its own file that is imported when the verb is used.

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
from softprompt.cli.streams import prepare_streams, refuse_broken_arguments

VERBS = {
    "demo": "The whole path, offline, in one to three minutes: load, tune, compare before and after.",
    "tune": "Learn a soft prompt from a recipe, or from flags alone.",
    "distil": "Make a short prompt of a long instruction, few-shot block or document, without labels.",
    "together": "Learn a prompt for each of several recipes in the same passes over one base.",
    "sweep": "Learn under many settings and seeds side by side; keep the best prompt.",
    "generate": "Continue texts with the base, with one prompt or with several.",
    "preview": "Show exactly what would be trained: tokens, soft slots, what the loss counts.",
    "evaluate": "Measure the base, a text or a learned prompt on held-out rows.",
    "compare": "Compare a soft prompt with other prompts, LoRA and full fine-tuning, in one report.",
    "report": "Make the report of any runs again: one page, and the same in Markdown, CSV and JSON.",
    "plot": "Draw the losses of one run or several, in the terminal or as a picture.",
    "inspect": "Show what a prompt is: its origin, template, sizes and nearest tokens.",
    "chat": "Talk to the base under a prompt; switch prompts while talking.",
    "serve": "Serve prompts by name from one base: OpenAI-compatible, with a page to try them.",
    "publish": "Put a prompt into a library under a name and a version, or switch a name back.",
    "list": "Show what a library holds.",
    "export": "Write a prompt in the forms that PEFT, vLLM and other programs read.",
    "info": "Show versions, device and dtype, and why they were chosen.",
    "recipe": "Write a recipe to start from, with every setting explained.",
    "settings": "Show the settings of any verb, as a file to start from.",
}

SEVERAL = {"tune", "evaluate", "generate", "serve"}
"""Verbs that several processes can run together; the others would each do all of the work."""

MEANT = {
    "train": "tune",
    "fit": "tune",
    "learn": "tune",
    "finetune": "tune",
    "fine-tune": "tune",
    "predict": "generate",
    "run": "generate",
    "infer": "generate",
    "complete": "generate",
    "ask": "generate",
    "eval": "evaluate",
    "test": "evaluate",
    "score": "evaluate",
    "judge": "evaluate",
    "benchmark": "compare",
    "show": "inspect",
    "look": "inspect",
    "describe": "inspect",
    "convert": "export",
    "save": "export",
    "search": "sweep",
    "grid": "sweep",
    "tune-many": "together",
    "version": "info",
    "config": "settings",
    "init": "recipe",
    "new": "recipe",
}
"""Words that other programs have for our verbs."""


HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Verb(TyperCommand):
    """A command known by name and one line of help; its file is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if os.environ.get("WORLD_SIZE", "1") != "1" and self.name not in SEVERAL:
            from softprompt.base.processes import demand_alone

            demand_alone(str(self.name))
        module = import_module(f"softprompt.cli.{self.name}")
        app = typer.Typer(add_completion=False)
        example = getattr(module, "EXAMPLE", None)
        app.command(
            self.name,
            help=self.help,
            epilog=f"Example:  {example}".replace("[", "\\[") if example else None,
            context_settings=HELP_NAMES,
        )(module.command)
        command = typer.main.get_command(app)
        command.params += _everywhere()
        return command.make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    """The verbs in the order of VERBS."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, help in VERBS.items():
            self.add_command(Verb(name, help=help, rich_markup_mode=self.rich_markup_mode))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].lower() in MEANT and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {MEANT[args[0].lower()]!r}?")
        return super().resolve_command(ctx, args)


SHOWS = {"traceback": False}
"""What the options of every verb ask for, beyond what lies in the environment."""


def _print_version(wanted: bool) -> None:
    if wanted:
        import softprompt

        print(softprompt.__version__)
        raise typer.Exit


def _be_quiet(wanted: bool) -> None:
    if wanted:
        os.environ |= dict.fromkeys(("SOFTPROMPT_QUIET", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")


def _be_verbose(wanted: bool) -> None:
    if wanted:
        os.environ |= dict.fromkeys(
            ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"), "info"
        )
        warnings.simplefilter("default")


def _show_traceback(wanted: bool) -> None:
    if wanted:
        SHOWS["traceback"] = True


def everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            expose_value=False,
            help="Print the version.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_be_quiet,
            is_eager=True,
            expose_value=False,
            help="Print only errors, generated texts and --json.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            callback=_be_verbose,
            is_eager=True,
            expose_value=False,
            help="Show what the libraries log too.",
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            callback=_show_traceback,
            is_eager=True,
            expose_value=False,
            help="Show where a failure arose.",
        ),
    ] = False,
) -> None:
    """Learn, measure and keep soft prompts: a few vectors that fit one frozen language model to a task."""


def _everywhere() -> list[Any]:
    """The options that may be written before the verb or after it."""
    options = typer.Typer(add_completion=False)
    options.command()(everywhere)
    return list(typer.main.get_command(options).params)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=HELP_NAMES,
    epilog="Example:  softprompt demo",
)
app.callback()(everywhere)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    SHOWS["traceback"] = os.environ.get("SOFTPROMPT_TRACEBACK") == "1"
    os.environ.pop("SOFTPROMPT_QUIET", None)
    _prepare_libraries()
    prepare_streams()
    command = typer.main.get_command(app)

    def run() -> Any:
        refuse_broken_arguments(arguments)
        return command.main(arguments, prog_name="softprompt", standalone_mode=False)

    return exit_code(run, traceback=lambda: SHOWS["traceback"])


def _prepare_libraries() -> None:
    """Sets, before they are imported, what libraries read from the environment; a variable that is set already wins."""
    for name, value in {
        # Threads that spin while they wait make a run 20 times slower as soon as another program wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # But some microseconds: small products come in quick succession, and waking a thread takes longer than they do.
        "GOMP_SPINCOUNT": "3000",
        # Libraries' warnings and bars would bury what the command says; the hub's own, of what is downloaded, stay.
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # With it the hub's library asks its server for a list, even where everything lies on this machine.
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
