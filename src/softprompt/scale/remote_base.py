"""A base that runs elsewhere: its tokenizer and config lay inputs out, and its weights are not here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from softprompt.base.context_length import stated_context
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State
from softprompt.base.outline import Outline
from softprompt.data.ending import ending_of
from softprompt.data.template import Template
from softprompt.data.tokenizer import special_tokens_of
from softprompt.inference.compiled import CompiledPrompt, end_ids
from softprompt.prompt.soft_prompt import Fingerprint, Prompt


def remote_base(outline: Outline, dtype: str) -> FrozenLM:
    """A stand-in for a base that runs elsewhere, as a server uses it: it has no weights, and whatever computes fails."""
    config = outline.config
    base: Any = SimpleNamespace(
        name=outline.name,
        revision=outline.revision,
        tokenizer=outline.tokenizer,
        config=config,
        model=SimpleNamespace(config=config, generation_config=outline.generation_config),
        vocab_size=int(config.vocab_size),
        max_positions=stated_context(config),
        fingerprint=outline.fingerprint,
        dtype=getattr(torch, dtype),
    )
    return cast(FrozenLM, base)


def laid_out_only(
    base: FrozenLM, prompt: Prompt | None, marks: tuple[int, ...], fingerprint: Fingerprint
) -> CompiledPrompt:
    """A compiled prompt without keys and values: which positions it has (`marks`), and how rows are laid out under it.

    Raises WrongBase for a prompt of another base."""
    if prompt is not None:
        prompt.base.demand(fingerprint, prompt.name)
    layout = Template.parse(
        (prompt.template if prompt is not None else None) or "{text}",
        target=None if prompt is None else prompt.target,
        length=None if prompt is None else prompt.length,
    )
    return CompiledPrompt(
        State((), (), marks) if marks else EMPTY,
        None if prompt is None else prompt.name,
        "none" if prompt is None else prompt.kind,
        special_tokens_of(base.tokenizer),
        layout,
        ending=ending_of(layout, base.tokenizer, also=end_ids(base)),
        special_tokens=prompt is not None and prompt.special_tokens,
    )
