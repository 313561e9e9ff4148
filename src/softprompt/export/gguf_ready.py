"""Many prompts as added tokens in one copy of the base, ready for llama.cpp's converter and for any engine.

Each prompt is a run of special tokens, and each task a text that begins with them: an engine that knows nothing of soft prompts
serves all of them from one loaded base. Nothing of the tokenizer changes but the tokens that are added: the converter knows a
tokenizer by what it makes of a text. The chat template is the base's own, and writes a prompt's tokens where a chat is rendered with
the variable `softprompt` set to the prompt's name (`chat_template_kwargs` of llama-server and vLLM).

Engines that read GGUF files do not know that tokens are suppressed. So in the output layer the added tokens have the row of the
token that the base finds least likely: each of them is then no likelier than that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import PromptError
from softprompt.export.chat_copy import chat_copy, written
from softprompt.export.merged import free_folder, token_names, with_rows, with_tokens, write_copy
from softprompt.inference.compiled import compile_prompt, end_ids
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.store.card import last_part

PROBES = ("The", "Hello, how are you?\n", "1 + 1 =", "def f(x):\n    return", "\n")


def gguf_ready(
    lm: FrozenLM, prompts: Sequence[Prompt], folder: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Saves one copy of the base with all prompts in `folder`; gives what softprompt_merged.json says of each.

    The folder is new or empty, or with `overwrite` an earlier copy. Raises SaveError for any other, WrongBase for another
    base's prompt, PromptError for a deep prompt and for two of one name."""
    folder = free_folder(folder, overwrite)
    soft: list[SoftPrompt] = []
    names: list[list[str]] = []
    vocabulary = set(lm.tokenizer.get_vocab())
    for prompt in prompts:
        if not isinstance(prompt, SoftPrompt):
            raise PromptError(
                f"{prompt.name}: a deep prompt is not made of tokens. Export it to llama-slot or vllm-kv instead."
            )
        own = token_names(prompt)
        taken = next((name for name in own if name in vocabulary), None)
        if taken is not None:
            raise PromptError(
                f"{prompt.name}: there is a token {taken} already, of the base or of another prompt. Give the prompt another name."
            )
        vocabulary.update(own)
        soft.append(prompt)
        names.append(own)
    tokenizer, ids = with_tokens(
        lm.tokenizer, [name for own in names for name in own], before_every_text=False
    )
    about: dict[str, Any] = {}
    chats: list[tuple[str, str]] = []
    for prompt, own in zip(soft, names, strict=True):
        compiled = compile_prompt(lm, prompt)
        in_chat = chat_copy(compiled.template, own, lm.tokenizer)
        if in_chat is not None:
            chats.append((prompt.name, _default(in_chat.chat_template)))
        about[prompt.name] = {
            "template": str(compiled.template),
            "tokens": own,
            "text": None if compiled.template.chat else written(compiled.template, own),
            "in_chat_template": in_chat is not None,
            "message": None if in_chat is None else in_chat.message,
            "stop": list(compiled.ending.stop),
            "stop_token_ids": sorted(compiled.ending.ids),
        }
    if chats:
        tokenizer.chat_template = by_name(chats, _default(lm.tokenizer.chat_template))
    vectors_PD = torch.cat([prompt.embeddings_PD for prompt in soft])
    record = {"base": last_part(lm.name), "prompts": about}
    write_copy(folder, with_rows(lm, vectors_PD, ids, end_ids(lm), like=least_likely(lm)), tokenizer, record)
    return about


def by_name(chats: Sequence[tuple[str, str]], original: str) -> str:
    """One chat template: that of the prompt that the variable `softprompt` names, else the base's own.

    The empty expressions keep jinja from taking line breaks and blanks off the templates beside its tags."""
    edge = "{{ '' }}"
    known = "softprompt is defined and softprompt == "
    parts = [
        f"{{% {'elif' if number else 'if'} {known}{json.dumps(name)} %}}{edge}{source}{edge}"
        for number, (name, source) in enumerate(chats)
    ]
    return f"{''.join(parts)}{{% else %}}{edge}{original}{edge}{{% endif %}}"


@torch.no_grad()
def least_likely(lm: FrozenLM) -> int:
    """The token whose best logit over a few texts is the lowest."""
    best_V = torch.full((len(lm.head.weight_VD),), float("-inf"), device=lm.device)
    for text in PROBES:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]], device=lm.device)
        logits_TV = lm.model(input_ids=ids).logits[0].float()
        best_V[: logits_TV.shape[1]] = torch.maximum(best_V[: logits_TV.shape[1]], logits_TV.amax(0))
    return int(best_V[: len(lm.tokenizer)].argmin())


def _default(chat_template: Any) -> str:
    return str(chat_template["default"] if isinstance(chat_template, dict) else chat_template)
