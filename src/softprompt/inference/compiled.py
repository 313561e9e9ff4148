"""A prompt as key/value state: soft, deep and text prompts become one thing, computed once.

Everything of a prompt's layout that precedes a row's own text is read by the frozen model once and kept. A row
takes over as much of it as its own sequence shares, token for token and vector for vector, and only the rest is
computed: so a compiled prompt gives what reading the whole sequence gives, wherever the tokenizer joins text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, row_state
from softprompt.data.encoded import Encoded
from softprompt.data.ending import NO_ENDING, End, Ending, ending_of
from softprompt.data.example import Example
from softprompt.data.layout import Layout, to_answer
from softprompt.data.template import Field, Messages, Soft, Template, Text
from softprompt.data.tokenizer import SpecialTokens, special_tokens_of, tokens
from softprompt.errors import DataError, PromptError, RecipeError
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.inference.verify import demand_exact
from softprompt.prompt.soft_prompt import DeepPrompt, Prompt, SoftPrompt
from softprompt.store.artifact import load_prompt


@dataclass(frozen=True)
class TextPrompt:
    """A text in front of every input, verbatim: an engineered prompt. A bare str is a folder, so a text has a type."""

    text: str
    name: str = "text"


@dataclass(frozen=True)
class CompiledPrompt:
    """A prompt after the frozen model has read it. Make one with `compile_prompt`; it belongs to that base.

    `state` holds the keys and values, `ending` how answers end under this layout; `name` is None for the base alone.
    `kind` is none, text, soft or deep. With `special_tokens`, special tokens that an input spells are read as such.
    """

    state: State
    name: str | None
    kind: str
    special: SpecialTokens
    template: Template
    vectors_PD: Tensor | None = None
    ending: Ending = NO_ENDING
    special_tokens: bool = False

    @property
    def length(self) -> int:
        """Positions that are computed already: virtual tokens, and the fixed text around them."""
        return self.state.length

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        return self.state.bytes

    @property
    def keys_LPHK(self) -> Tensor:
        """Keys as the model caches them. Raises PromptError where layers differ in their heads."""
        return _stacked(self.state.keys, "keys")

    @property
    def values_LPHK(self) -> Tensor:
        """Values. Raises PromptError where layers differ in their heads."""
        return _stacked(self.state.values, "values")

    def __repr__(self) -> str:
        name = repr(self.name) if self.name is not None else "the base alone"
        return f"CompiledPrompt({name}, {self.kind}, {self.length} positions, {self.bytes:,} bytes, template={str(self.template)!r})"

    def marks(self, lm: FrozenLM, given: str | Example) -> list[int]:
        """The whole sequence of a row, up to where its continuation starts: token ids, and -1 - i for vector i."""
        return self.laid_out(to_answer(self.layout(lm), self.example(given)))

    def example(self, given: str | Example) -> Example:
        """Makes the row of `given`: a text fills the template's only input, and a row's only field may fill {text}."""
        if isinstance(given, str):
            return self.template.example(given)
        if self.template.inputs == ("text",) and "text" not in given.fields and len(given.fields) == 1:
            return replace(given, fields={"text": next(iter(given.fields.values()))})
        return given

    def layout(self, lm: FrozenLM, template: Template | None = None, *, end: End = "never") -> Layout:
        """The layout of rows under this prompt: slots are kept only where vectors fill them."""
        return Layout(
            template or self.template,
            lm.tokenizer,
            self.special,
            end=end,
            special_tokens=self.special_tokens,
            slots=self.kind == "soft",
        )

    def laid_out(self, encoded: Encoded) -> list[int]:
        """The marks of an encoded row (data.encoded.Encoded): a deep prompt's virtual tokens come before it."""
        own = list(range(-1, -1 - self.state.length, -1)) if self.kind == "deep" else []
        return own + [
            token if soft < 0 else -1 - soft for token, soft in zip(encoded.ids, encoded.soft, strict=True)
        ]

    def row(self, marks: Sequence[int], need: int | None = None) -> PrefillRow:
        """The part of a row that is left to compute when the hidden states from position `need` on (the last) are wanted."""
        if not marks:
            raise DataError(
                "The text is empty and there is no prompt: nothing to continue from. Give some text."
            )
        need = len(marks) - 1 if need is None else need
        used = min(self.state.shared(marks), need)
        if self.kind == "deep" and used < self.length:
            raise DataError(
                f"{self.name}: a deep prompt has no output, so at least one token must follow it, "
                "and that token cannot be scored. Give some text before what is wanted."
            )
        return PrefillRow(self.state.first(used), tuple(marks), self.vectors_PD)


Promptable: TypeAlias = Prompt | CompiledPrompt | TextPrompt | Template | str | Path | None
"""What is taken wherever a prompt is: a learned prompt, its folder (a str or Path), a compiled one, a text in front
(TextPrompt), text around the input (Template), or None for the base alone."""


@torch.no_grad()
def compile_prompt(
    lm: FrozenLM,
    prompt: Promptable,
    *,
    template: Template | str | None = None,
    name: str | None = None,
    special_tokens: bool | None = None,
) -> CompiledPrompt:
    """Reads a prompt once.

    A learned prompt is laid out by its own template (`template` replaces it). A TextPrompt comes before every
    input, verbatim; a Template without slots puts text around it. None is the base alone, which sees the input, or the
    input in `template` with its soft slots left out. A compiled prompt is returned. `special_tokens` reads special
    tokens that an input spells as such; without it, a learned prompt reads inputs as it was trained, and else they are
    plain text.

    Raises WrongBase for a prompt that was learned on another base, PromptError for a str that is no prompt's folder,
    PromptError or DataError where the prompt cannot be laid out.
    """
    demand_exact(lm)
    if isinstance(prompt, CompiledPrompt):
        if template is not None:
            raise PromptError(
                f'{prompt.name or "The base"} is compiled for the template "{prompt.template}". '
                "Compile the prompt itself to use another one."
            )
        return prompt if name is None else replace(prompt, name=name)
    if isinstance(prompt, str | Path):
        prompt = _from_folder(prompt)
    special = special_tokens_of(lm.tokenizer)
    if isinstance(prompt, TextPrompt):
        name = name or prompt.name
        prompt = Template((Text(prompt.text), Field("text")) if prompt.text else (Field("text"),))
    if isinstance(prompt, Template):
        template, name = prompt, name or "text"
    if prompt is None or isinstance(prompt, Template):
        layout = Template.parse(template or "{text}") if not isinstance(template, Template) else template
        kind = "none" if name is None else "text"
        compiled = CompiledPrompt(
            EMPTY,
            name,
            kind,
            special,
            layout,
            ending=_ending(lm, layout),
            special_tokens=bool(special_tokens),
        )
        return replace(compiled, state=_read(lm, _head(lm, compiled)))
    if not isinstance(prompt, SoftPrompt | DeepPrompt):
        raise PromptError(
            f"prompt: found {type(prompt).__name__}, wanted a prompt, the folder of one, TextPrompt, Template or None."
        )
    prompt.base.demand(lm.fingerprint, prompt.name)
    layout = _layout(prompt, template)
    ending = _ending(lm, layout)
    special_tokens = prompt.special_tokens if special_tokens is None else special_tokens
    if isinstance(prompt, DeepPrompt):
        keys, values = (
            tuple(tensor.to(lm.device, lm.dtype).transpose(1, 2).contiguous())
            for tensor in (prompt.keys_LPHK, prompt.values_LPHK)
        )
        own = State(keys, values, tuple(range(-1, -1 - prompt.length, -1)))
        return CompiledPrompt(
            own, name or prompt.name, "deep", special, layout, ending=ending, special_tokens=special_tokens
        )
    vectors_PD = prompt.embeddings_PD.to(lm.device, lm.dtype)
    compiled = CompiledPrompt(
        EMPTY, name or prompt.name, "soft", special, layout, vectors_PD, ending, special_tokens
    )
    return replace(compiled, state=_read(lm, _head(lm, compiled), vectors_PD))


def _ending(lm: FrozenLM, layout: Template) -> Ending:
    return ending_of(layout, lm.tokenizer, also=end_ids(lm))


def end_ids(lm: FrozenLM) -> frozenset[int]:
    """End tokens that the base names: in its generation config (where transformers' generate stops) and its config."""
    ids: set[int] = set()
    for config in (getattr(lm.model, "generation_config", None), lm.model.config.get_text_config()):
        named = getattr(config, "eos_token_id", None)
        ids.update([named] if isinstance(named, int) else named or [])
    return frozenset(int(token) for token in ids)


def _from_folder(folder: str | Path) -> Prompt:
    if not os.path.isdir(os.path.expanduser(folder)):  # Path.is_dir raises for a long text
        shown = str(folder) if len(str(folder)) <= 60 else f"{str(folder)[:57]}..."
        raise PromptError(
            f"prompt: found {shown!r}, which is no folder of a prompt. "
            f"For a text in front of the input give TextPrompt({shown!r})."
        )
    return load_prompt(folder)


def _layout(prompt: SoftPrompt | DeepPrompt, template: Template | str | None) -> Template:
    source = prompt.template if template is None else str(template)
    target = template.target if isinstance(template, Template) else prompt.target
    try:
        return Template.parse(source or "{text}", target=target, length=prompt.length)
    except RecipeError as error:
        raise PromptError(f"{prompt.name} has {prompt.length} virtual tokens. {error}") from error


@torch.no_grad()
def text_state(lm: FrozenLM, text: str, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, P, H, K] of a real text: the best start known for a deep prompt (P is `length`).

    Its first `length` tokens are read; a shorter text is repeated until it is long enough."""
    ids = _ids(lm, text, special_tokens_of(lm.tokenizer))
    if not ids:
        raise PromptError("The starting text has no tokens. Give some text.")
    state = _read(lm, [ids[position % len(ids)] for position in range(length)])
    return _stacked(state.keys, "keys").float(), _stacked(state.values, "values").float()


@torch.no_grad()
def vectors_state(lm: FrozenLM, vectors_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Computes keys and values [L, P, H, K] of a shallow prompt's vectors: a deep prompt that starts as good as it is."""
    marks = range(-1, -1 - len(vectors_PD), -1)
    state = _read(lm, list(marks), vectors_PD.to(lm.device, lm.dtype))
    return _stacked(state.keys, "keys").float(), _stacked(state.values, "values").float()


@torch.no_grad()
def as_deep(lm: FrozenLM, prompt: SoftPrompt | DeepPrompt) -> DeepPrompt:
    """The same prompt as keys and values for every layer, exact: what its vectors, and text before them, compile to.

    Its template is the old one with what was compiled left out. Raises PromptError where text of the row comes
    before a slot, or where layers differ in their heads.
    """
    if isinstance(prompt, DeepPrompt):
        return prompt
    compiled = compile_prompt(lm, prompt)
    pieces = compiled.template.pieces
    last = max(at for at, piece in enumerate(pieces) if isinstance(piece, Soft))
    if any(isinstance(piece, Field | Messages) for piece in pieces[:last]):
        raise PromptError(
            f'{prompt.name}: in its template "{compiled.template}" a field comes before a slot, so what the vectors '
            "compile to differs from row to row. Export the vectors themselves (embeddings)."
        )
    length = max(at for at, mark in enumerate(compiled.state.marks) if mark < 0) + 1
    if length > prompt.length and compiled.special.before:
        raise PromptError(
            f'{prompt.name}: in its template "{compiled.template}" text comes before the slot, and this base puts a '
            "start token before it, which readers of keys and values would put in again. Export the vectors themselves."
        )
    state = compiled.state.first(length)
    return DeepPrompt(
        _stacked(state.keys, "keys"),
        _stacked(state.values, "values"),
        prompt.base,
        str(Template((Soft(length), *pieces[last + 1 :]))),
        prompt.target,
        prompt.name,
        prompt.notes,
    )


def _head(lm: FrozenLM, compiled: CompiledPrompt) -> list[int]:
    """Finds the marks that precede every row's own text. Where the tokenizer merges their end with a row's text, that row
    shares fewer of them (`State.shared`)."""
    pieces = compiled.template.pieces
    first = next((i for i, piece in enumerate(pieces) if isinstance(piece, Field | Messages)), len(pieces))
    if first == 0 or (isinstance(pieces[first], Messages) and not isinstance(pieces[first - 1], Soft)):
        return []
    # What two rows share whose own texts share nothing.
    layout = compiled.layout(lm, Template((*pieces[:first], Field("own"))))
    marks, others = (compiled.laid_out(to_answer(layout, Example({"own": own}))) for own in "a0")
    return marks[: State((), (), tuple(others)).shared(marks)]


@torch.no_grad()
def read_ids(lm: FrozenLM, ids: Sequence[int]) -> State:
    """The base's key/value state after reading these tokens."""
    return _read(lm, ids)


def _read(lm: FrozenLM, marks: Sequence[int], vectors_PD: Tensor | None = None) -> State:
    if not marks:
        return EMPTY
    done = prefill(lm, [PrefillRow(EMPTY, tuple(marks), vectors_PD)])
    return row_state(done.cache, 0, *done.span(0), marks)


@torch.no_grad()
def with_common_beginning(lm: FrozenLM, prompt: CompiledPrompt, marks: Sequence[list[int]]) -> CompiledPrompt:
    """The same text prompt, with the beginning that rows of these marks have in common read too, once for all of them."""
    first, last = min(marks), max(marks)  # what these two begin with, all those between begin with
    common = first[: State((), (), tuple(last)).shared(first)]
    return prompt if len(common) <= prompt.length else replace(prompt, state=_read(lm, common))


def _ids(lm: FrozenLM, text: str, special: SpecialTokens) -> list[int]:
    return [*special.before, *tokens(lm.tokenizer, text, special, continues=False)]


def _stacked(layers: Sequence[Tensor], what: str) -> Tensor:
    if len({layer.shape for layer in layers}) != 1:
        raise PromptError(
            f"This base's layers differ in their {what} ({sorted({tuple(layer.shape) for layer in layers})}), so they "
            "are not one tensor [L, P, H, K]."
        )
    return torch.stack([layer.transpose(0, 1) for layer in layers])
