"""Changes to the next token of one row beside sampling: penalties, a choice of labels, a grammar."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.tokenizer import tokens
from softprompt.errors import DataError, MissingExtra, RecipeError
from softprompt.inference.compiled import CompiledPrompt, end_ids
from softprompt.inference.request import Steering
from softprompt.inference.score import continuation_ids

FORBIDDEN = float("-inf")


class Joined:
    """Several steerings, one after the other."""

    def __init__(self, parts: Sequence[Steering]) -> None:
        self.parts = parts

    def steered(self, logits_V: Tensor, new_ids: Sequence[int]) -> Tensor:
        for part in self.parts:
            logits_V = part.steered(logits_V, new_ids)
        return logits_V

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        return any(part.is_complete(new_ids) for part in self.parts)


@dataclass(frozen=True)
class Penalties:
    """OpenAI's presence_penalty and frequency_penalty; they count the new tokens alone."""

    presence: float = 0.0
    frequency: float = 0.0

    def steered(self, logits_V: Tensor, new_ids: Sequence[int]) -> Tensor:
        counts = Counter(new_ids)
        if not counts:
            return logits_V
        ids = torch.tensor(list(counts), device=logits_V.device)
        change = [-self.presence - self.frequency * count for count in counts.values()]
        return logits_V.index_add(0, ids, torch.tensor(change, dtype=logits_V.dtype, device=logits_V.device))

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        return False


class Choice:
    """One of several token sequences, and nothing else. A trie says which tokens can follow what has been said.

    Where one sequence begins another, an end token decides for the shorter one."""

    def __init__(self, sequences: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        self.ends = frozenset(ends)
        self.root: dict[int, Any] = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})
            node[-1] = {}  # a sequence is complete here
        if not self.ends and any(self._is_inner_end(node) for node in self._nodes(self.root)):
            raise DataError(
                "choice: one label begins another, and the base has no end token to tell them apart. Use other labels."
            )

    def steered(self, logits_V: Tensor, new_ids: Sequence[int]) -> Tensor:
        node = self._node(new_ids) or {}
        allowed = [token for token in node if token >= 0]
        if -1 in node:
            allowed += self.ends
        masked_V = torch.full_like(logits_V, FORBIDDEN)
        masked_V[allowed] = logits_V[allowed]
        return masked_V

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        node = self._node(new_ids)
        return node is None or set(node) == {-1}

    def _node(self, new_ids: Sequence[int]) -> dict[int, Any] | None:
        node: dict[int, Any] | None = self.root
        for token in new_ids:
            node = None if node is None else node.get(token)
        return node

    def _nodes(self, node: dict[int, Any]) -> list[dict[int, Any]]:
        return [node, *(inner for child in node.values() for inner in self._nodes(child))]

    @staticmethod
    def _is_inner_end(node: dict[int, Any]) -> bool:
        return -1 in node and len(node) > 1


def choice_of(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example | Sequence[int], labels: Sequence[str]
) -> Choice:
    """Labels behind an input, each in the tokens that training and scoring lay it out in."""
    sequences = []
    for label in labels:
        ids: list[int] = []
        if isinstance(given, str | Example) and not prompt.template.chat:
            ids = continuation_ids(lm, prompt, given, label)
        ids = ids or tokens(lm.tokenizer, label, prompt.special, continues=True)
        if not ids:
            raise DataError(f"choice: the label {label!r} has no token. Give some text.")
        sequences.append(ids)
    ends = prompt.ending.ids or end_ids(lm) or {lm.tokenizer.eos_token_id} - {None}
    return Choice(sequences, sorted(ends))


class Grammar:
    """A JSON schema or a regular expression, by llguidance: an automaton over the tokenizer's own tokens."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self._taken = 0

    def steered(self, logits_V: Tensor, new_ids: Sequence[int]) -> Tensor:
        self._follow(new_ids)
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        self._demand_sound()
        places_8 = torch.arange(8, dtype=torch.uint8)
        allowed_V = ((bits[:, None] >> places_8) & 1).bool().flatten()[: len(logits_V)].to(logits_V.device)
        width = len(allowed_V)
        masked_V = torch.full_like(logits_V, FORBIDDEN)
        masked_V[:width] = logits_V[:width].masked_fill(~allowed_V, FORBIDDEN)
        return masked_V

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        self._follow(new_ids)
        return bool(self.matcher.is_stopped())

    def _follow(self, new_ids: Sequence[int]) -> None:
        for token in new_ids[self._taken :]:
            self._taken += 1
            if not self.matcher.is_stopped():
                self.matcher.consume_token(token)
        self._demand_sound()

    def _demand_sound(self) -> None:
        if self.matcher.is_error():
            raise RecipeError(f"The constraint cannot be followed: {_first_line(self.matcher.get_error())}.")


class Grammars:
    """Makes grammars over one tokenizer, which llguidance reads once."""

    def __init__(self) -> None:
        self._tokenizer: Any = None

    def __reduce__(self) -> Any:
        return _grammars_of_this_process, ()  # the tokenizer stays; another process reads its own once

    def schema(self, schema: Mapping[str, Any]) -> str:
        """A JSON schema as a grammar. Raises RecipeError for one that is not supported."""
        _demand_llguidance("response_format")
        from llguidance import LLMatcher

        try:
            # A small model may write blanks for ever where any number of them is allowed.
            compact = {"whitespace_flexible": False}
            return self._valid(
                str(LLMatcher.grammar_from_json_schema(json.dumps(dict(schema)), defaults=compact))
            )
        except ValueError as error:
            raise RecipeError(f"response_format: {_first_line(error)}.") from error

    def regex(self, pattern: str) -> str:
        """A regular expression as a grammar. Raises RecipeError for one that cannot be read."""
        _demand_llguidance("regex")
        from llguidance import LLMatcher

        return self._valid(str(LLMatcher.grammar_from_regex(pattern)))

    def make(self, lm: FrozenLM, grammar: str) -> Steering:
        """A row's own automaton."""
        import llguidance.hf
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = llguidance.hf.from_tokenizer(
                lm.tokenizer, eos_token=sorted(end_ids(lm)) or None
            )
        return Grammar(LLMatcher(self._tokenizer, grammar))

    @staticmethod
    def _valid(grammar: str) -> str:
        from llguidance import LLMatcher

        problem = LLMatcher.validate_grammar(grammar)
        if problem:
            raise RecipeError(f"The constraint cannot be read: {_first_line(problem)}.")
        return grammar


@cache
def _grammars_of_this_process() -> Grammars:
    return Grammars()


@dataclass(frozen=True)
class Steers:
    """What steers the rows of a request, as data: every process that takes the request's steps makes the same of it."""

    given: str | Example | Sequence[int]
    penalties: Penalties
    labels: tuple[str, ...]
    grammar: str | None
    grammars: Grammars
    _choices: list[Choice] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, lm: FrozenLM, prompt: CompiledPrompt) -> Steering:
        """The steering of one row."""
        parts: list[Steering] = []
        if self.penalties != Penalties():
            parts.append(self.penalties)
        if self.labels:
            if not self._choices:  # laid out once for all samples, since it keeps nothing of a row
                self._choices.append(choice_of(lm, prompt, self.given, self.labels))
            parts.append(self._choices[0])
        if self.grammar is not None:
            parts.append(self.grammars.make(lm, self.grammar))
        return Joined(parts)


def _demand_llguidance(what: str) -> None:
    if find_spec("llguidance") is None:
        raise MissingExtra(
            f"{what}: this server has no llguidance, which follows schemas and expressions: "
            "pip install 'softprompt[guided]'. `choice` works without it."
        )


def _first_line(problem: object) -> str:
    return (str(problem).strip().splitlines() or ["unknown"])[0][:300].rstrip(".")
