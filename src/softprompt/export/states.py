"""A prompt's compiled state as files for other engines."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import PromptError, SaveError
from softprompt.export.kv_file import (
    SLOT,
    file_of,
    placeholder_ids,
    slot_header_of,
    slot_of,
    write_kv,
    write_slot_header,
)
from softprompt.export.llama_slot import flat, is_paired, read_pattern
from softprompt.inference.compiled import CompiledPrompt, compile_prompt, read_ids
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.card import last_part
from softprompt.store.digest import digest_of


def save_kv(lm: FrozenLM, prompt: Prompt, folder: str | Path) -> Path:
    """Writes a prompt's keys and values into `folder`, as export.kv_file says. Gives the file.

    Raises PromptError for a prompt whose vectors come behind text of the row, WrongBase, SaveError."""
    compiled = compile_prompt(lm, prompt)
    demand_in_front(compiled, prompt)
    path = file_of(folder, digest_of(prompt))
    write_kv(path, _header(lm, prompt, compiled), compiled.keys_LPHK, compiled.values_LPHK)
    return path


def save_slot(lm: FrozenLM, prompt: Prompt, folder: str | Path, server: str) -> Path:
    """Writes a prompt as a slot file of the llama-server at `server`, whose --slot-save-path `folder` is. Gives the file.

    One of the server's slots is used for a moment. Raises PromptError as `save_kv` does and for a server that does not save
    slots, WrongBase for one with another base, SaveError."""
    compiled = compile_prompt(lm, prompt)
    demand_in_front(compiled, prompt)
    digest = digest_of(prompt)
    ids = placeholder_ids(digest, compiled.length, lm.vocab_size)
    path = slot_of(folder, digest)
    draft = path.with_name(f"{digest}.pattern{SLOT}")
    body = {"prompt": ids, "n_predict": 1, "id_slot": 0, "cache_prompt": False, "stream": True}
    _post(
        f"{server}/completion", body
    )  # a stream, since a whole answer is refused where its token is half a character
    saved = json.loads(_post(f"{server}/slots/0?action=save", {"filename": draft.name}))
    if saved.get("n_saved") != len(ids):
        raise PromptError(
            f"{server}: saved {saved.get('n_saved')} of {len(ids)} positions. Its slots must not be used meanwhile, and be long enough."
        )
    try:
        content = draft.read_bytes()
        draft.unlink()
    except OSError as error:
        raise SaveError(
            f"{draft}: the server saved it elsewhere ({error.strerror}). Give the folder of its --slot-save-path as --out."
        ) from error
    pattern = read_pattern(content, len(ids))
    own = read_ids(lm, ids)
    paired = is_paired(pattern, own.keys[0], own.values[0], lm.name)
    state = compiled.state
    filled = pattern.filled(
        [flat(layer, paired=paired) for layer in state.keys],
        [flat(layer, paired=False) for layer in state.values],
    )
    write_slot_header(slot_header_of(folder, digest), path, filled, _header(lm, prompt, compiled))
    return path


def _header(lm: FrozenLM, prompt: Prompt, compiled: CompiledPrompt) -> dict[str, Any]:
    return {
        "digest": digest_of(prompt),
        "name": prompt.name,
        "kind": prompt.kind,
        "marks": list(compiled.state.marks),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "base": last_part(lm.name),
        "base_sha256": lm.fingerprint.sha256,
    }


def _post(url: str, body: dict[str, Any]) -> bytes:
    """Ask llama-server. Raises PromptError in its words where it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        raise PromptError(
            f"{url}: answers {error.code} ({error.read().decode(errors='replace')[:200]}). Start llama-server with --slot-save-path."
        ) from error
    except OSError as error:
        raise PromptError(f"{url}: does not answer as llama-server does ({error}).") from error


def demand_in_front(compiled: CompiledPrompt, prompt: Prompt) -> None:
    """Raises PromptError unless all vectors come before a row's own text: then they are in the compiled state."""
    held = sum(mark < 0 for mark in compiled.state.marks)
    if held != prompt.length:
        raise PromptError(
            f'{prompt.name}: in its template "{compiled.template}" vectors come behind text of the row, so that their keys and '
            "values differ from row to row. Serve it with `softprompt serve`, or export it to vectors."
        )
