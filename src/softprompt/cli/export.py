"""`softprompt export`: a prompt in the forms that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, heading, screen
from softprompt.errors import PromptError, RecipeError
from softprompt.settings.base_settings import BaseSettings

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.prompt.soft_prompt import Prompt

FORMS = {
    "peft": "PEFT's PROMPT_TUNING (or PREFIX_TUNING for a deep prompt)",
    "peft-prefix": "PEFT's PREFIX_TUNING: the keys and values that the prompt compiles to",
    "vectors": "one .safetensors file of the vectors, for vLLM's prompt embeddings and others",
    "merged": "a copy of the base with the vectors as added tokens",
}


EXAMPLE = "softprompt export runs/mine --to vectors --out mine.safetensors"


@takes(BaseSettings)
def command(
    base: BaseSettings,
    *,
    folder: Annotated[Path, typer.Argument(metavar="PROMPT", help="The prompt's folder.")],
    to: Annotated[str, typer.Option("--to", help=", ".join(FORMS) + ".")],
    out: Annotated[str, typer.Option("--out", help="Where to write: a folder, or a file for vectors.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export; nothing else is ever replaced.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Write a prompt in a form that other programs read."""
    if to not in FORMS:
        raise RecipeError(f"--to: found {to}, wanted one of {', '.join(FORMS)}.")
    asked.demand_folders([folder])
    from softprompt.store.artifact import load_prompt
    from softprompt.store.ownership import folder_named

    path = folder_named(out)
    prompt = load_prompt(folder)

    def loaded() -> FrozenLM:
        return asked.load_base(base, prompt)

    write = {"peft": to_peft, "peft-prefix": to_prefix, "vectors": to_vectors, "merged": to_merged}[to]
    advice = write(prompt, path, loaded, overwrite)
    if as_json:
        emit({"prompt": str(folder), "to": to, "path": str(path)})
        return
    console = screen()
    heading(console, f"prompt {prompt.name} exported")
    fact(console, "form", FORMS[to])
    fact(console, "where", path)
    fact(console, "use", advice)


def to_peft(prompt: Prompt, out: Path, loaded: Callable[[], FrozenLM], overwrite: bool) -> str:
    return _save_for_peft(prompt, out, overwrite) + "; pad on the right, PEFT is wrong on the left"


def to_prefix(prompt: Prompt, out: Path, loaded: Callable[[], FrozenLM], overwrite: bool) -> str:
    from softprompt.inference.compiled import as_deep

    return _save_for_peft(as_deep(loaded(), prompt), out, overwrite) + "; pad on either side"


def _save_for_peft(prompt: Prompt, out: Path, overwrite: bool) -> str:
    from softprompt.store.artifact import save_prompt
    from softprompt.store.card import shareable
    from softprompt.store.peft_format import text_for_peft, why_not_peft

    reason = why_not_peft(prompt)
    if reason is not None:
        raise PromptError(
            f'{prompt.name}: its template is "{prompt.template}", which PEFT would not read rightly: {reason}. '
            "Export it to vectors or merged."
        )
    save_prompt(shareable(prompt), out, overwrite=overwrite)
    return f"peft.PeftModel.from_pretrained(model, FOLDER) with the text {text_for_peft(prompt)!r}"


def to_vectors(prompt: Prompt, out: Path, loaded: Callable[[], FrozenLM], overwrite: bool) -> str:
    from softprompt.export.forms import save_vectors

    save_vectors(prompt, out, overwrite=overwrite)
    return f"examples/vllm_prompt_embeds.py --prompt {out} TEXT"


def to_merged(prompt: Prompt, out: Path, loaded: Callable[[], FrozenLM], overwrite: bool) -> str:
    from softprompt.export.merged import RECORD, merge_prompt
    from softprompt.prompt.soft_prompt import SoftPrompt

    if not isinstance(prompt, SoftPrompt):
        raise PromptError(f"{prompt.name}: a deep prompt is not made of tokens. Export it to peft instead.")
    names = merge_prompt(loaded(), prompt, out, overwrite=overwrite)
    record = json.loads((out / RECORD).read_text("utf-8"))
    tokens = f"the prompt is the tokens {names[0]} to {names[-1]}"
    if record["in_chat_template"]:
        advice = f"load it like any chat model; {tokens}, which its chat template writes"
        if record["message"] not in ("{messages}", "{text}"):
            advice += f"; the user's message is {record['message']!r}"
    elif record["before_every_text"]:
        advice = (
            f"load it like any model; {tokens}, which its tokenizer puts before every text, not into chats"
        )
    else:
        advice = f"load it like any model; {tokens}, which you write into the text: {record['text']}"
    if record["stop"]:
        advice += f"; an answer ends at {', '.join(map(repr, record['stop']))} (stop_strings in generate)"
    return advice
