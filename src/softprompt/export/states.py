"""A prompt's compiled state as files for other engines."""

from __future__ import annotations

from pathlib import Path

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import PromptError
from softprompt.export.kv_file import file_of, write_kv
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.card import last_part
from softprompt.store.digest import digest_of


def save_kv(lm: FrozenLM, prompt: Prompt, folder: str | Path) -> Path:
    """Write a prompt's keys and values into `folder`, as export.kv_file says. Gives the file.

    Raises PromptError for a prompt whose vectors come behind text of the row, WrongBase, SaveError."""
    compiled = compile_prompt(lm, prompt)
    demand_in_front(compiled, prompt)
    path = file_of(folder, digest_of(prompt))
    header = {
        "digest": digest_of(prompt),
        "name": prompt.name,
        "kind": prompt.kind,
        "marks": list(compiled.state.marks),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "base": last_part(lm.name),
        "base_sha256": lm.fingerprint.sha256,
    }
    write_kv(path, header, compiled.keys_LPHK, compiled.values_LPHK)
    return path


def demand_in_front(compiled: CompiledPrompt, prompt: Prompt) -> None:
    """Raise PromptError unless all vectors come before a row's own text: then they are in the compiled state."""
    held = sum(mark < 0 for mark in compiled.state.marks)
    if held != prompt.length:
        raise PromptError(
            f'{prompt.name}: in its template "{compiled.template}" vectors come behind text of the row, so that their keys and '
            "values differ from row to row. Serve it with `softprompt serve`, or export it to vectors."
        )
