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
    "vllm-kv": "a file of keys and values in a folder, for vLLM with our connector; several prompts at once",
    "gguf-ready": "one copy of the base with several prompts as added tokens, for llama.cpp's converter and any engine",
    "llama-slot": "a slot file in the folder of a running llama-server (--server); several prompts at once",
}
SEVERAL = {"vllm-kv", "llama-slot", "gguf-ready"}  # forms that take several prompts


EXAMPLE = "softprompt export runs/mine --to vectors --out mine.safetensors"


@takes(BaseSettings)
def command(
    base: BaseSettings,
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="PROMPT...", help="The prompt's folder.")],
    to: Annotated[str, typer.Option("--to", help=", ".join(FORMS) + ".")],
    out: Annotated[str, typer.Option("--out", help="Where to write: a folder, or a file for vectors.")],
    server: Annotated[
        str | None, typer.Option("--server", help="For llama-slot: the server's address, http://HOST:PORT.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export; nothing else is ever replaced.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Write a prompt in a form that other programs read."""
    if to not in FORMS:
        raise RecipeError(f"--to: found {to}, wanted one of {', '.join(FORMS)}.")
    if len(folders) > 1 and to not in SEVERAL:
        raise RecipeError(
            f"--to {to}: found {len(folders)} prompts, wanted one. Only {', '.join(sorted(SEVERAL))} takes several."
        )
    asked.demand_folders(folders)
    from softprompt.store.artifact import load_prompt
    from softprompt.store.ownership import folder_named

    path = folder_named(out)
    prompts = [load_prompt(folder) for folder in folders]
    prompt = prompts[0]

    def loaded() -> FrozenLM:
        return asked.load_base(base, prompt)

    if to == "llama-slot":
        if server is None:
            raise RecipeError(
                "--to llama-slot: give --server http://HOST:PORT, a llama-server that runs with --slot-save-path."
            )
        advice = to_llama_slot(prompts, path, loaded, server)
    elif to == "gguf-ready":
        advice = to_gguf_ready(prompts, path, loaded, overwrite)
    elif to == "vllm-kv":
        advice = to_vllm_kv(prompts, path, loaded)
    else:
        write = {"peft": to_peft, "peft-prefix": to_prefix, "vectors": to_vectors, "merged": to_merged}[to]
        advice = write(prompt, path, loaded, overwrite)
    if as_json:
        for folder in folders:
            emit({"prompt": str(folder), "to": to, "path": str(path)})
        return
    console = screen()
    names = ", ".join(prompt.name for prompt in prompts)
    heading(console, f"prompt {names} exported" if len(prompts) == 1 else f"prompts {names} exported")
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


def to_gguf_ready(prompts: list[Prompt], out: Path, loaded: Callable[[], FrozenLM], overwrite: bool) -> str:
    from softprompt.export.gguf_ready import gguf_ready
    from softprompt.export.merged import RECORD

    gguf_ready(loaded(), prompts, out, overwrite=overwrite)
    return f"convert_hf_to_gguf.py {out}; each prompt's text is in {out / RECORD}"


def to_llama_slot(prompts: list[Prompt], out: Path, loaded: Callable[[], FrozenLM], server: str) -> str:
    from softprompt.export.states import save_slot

    lm = loaded()
    for prompt in prompts:
        save_slot(lm, prompt, out, server.rstrip("/"))
    return f"softprompt serve --engine llama={server} --states {out}"


def to_vllm_kv(prompts: list[Prompt], out: Path, loaded: Callable[[], FrozenLM]) -> str:
    from softprompt.export.states import save_kv

    lm = loaded()
    for prompt in prompts:
        save_kv(lm, prompt, out)
    return f"docs/scale.md: vLLM's connector and the gateway read {out}"
