"""How likely the base finds given text under a prompt: log-probabilities, batched, every row as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.base.context_length import demand_room
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import BLOCK_LOGITS
from softprompt.data.batch import End, to_learn
from softprompt.data.example import Example
from softprompt.data.template import Field, Template
from softprompt.errors import NotFinite
from softprompt.inference.compiled import CompiledPrompt, Promptable
from softprompt.inference.generate import compiled_each, listed, one_each
from softprompt.inference.prefill import PrefillRow, like_lengths, prefill


@dataclass(frozen=True, repr=False)
class Scored:
    """The log-probabilities (natural) of a text's tokens, and whether greedy decoding would have said them all.

    `text_bytes` are the UTF-8 bytes that the scored tokens stand for.
    """

    prompt: str | None
    log_probability: float
    token_ids: tuple[int, ...]
    token_log_probabilities: tuple[float, ...]
    greedy: bool
    text_bytes: int

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        greedy = ", greedy" if self.greedy else ""
        return f"Scored({self.log_probability:.4f} nats over {self.tokens} tokens{greedy}, prompt {self.prompt!r})"

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        lists = {"token_ids", "token_log_probabilities"}
        return {key: list(value) if key in lists else value for key, value in asdict(self).items()}


@torch.inference_mode()
def score(
    lm: FrozenLM,
    inputs: str | Example | Iterable[str | Example],
    continuations: str | Sequence[str | None] | None = None,
    prompts: Promptable | Sequence[Promptable] = None,
    *,
    end: End = "never",
    batch_rows: int = 16,
) -> list[Scored]:
    """Score each continuation of its input under its prompt, with the very layout that training uses.

    `inputs` may be a single text or row; the result is always a list. Without a continuation the trained text of the row is scored: its target, or all of its text. `end` scores an end
    token after it (data.batch.encode). The first position of a row, which nothing predicts, is not scored.
    """
    inputs = listed(inputs)
    wanted = one_each(continuations, len(inputs), "continuations")
    rows = [
        _laid_out(lm, prompt, given, continuation, end)
        for given, continuation, prompt in zip(
            inputs, wanted, compiled_each(lm, prompts, len(inputs)), strict=True
        )
    ]
    results: dict[int, Scored] = {}
    number = {id(row): i for i, (row, *_) in enumerate(rows)}
    for group in like_lengths(lm, [row for row, *_ in rows], batch_rows):
        numbers = [number[id(row)] for row in group]
        results.update(zip(numbers, _scored(lm, [rows[i] for i in numbers]), strict=True))
    return [results[i] for i in range(len(rows))]


@dataclass(frozen=True)
class RatedToken:
    """A token of a text, its log-probability, and the likeliest tokens in its place; None where nothing predicts it."""

    token_id: int
    log_probability: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def rate_continuation(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example, continuation: str, top: int = 0
) -> list[RatedToken]:
    """Every token of a continuation, laid out and scored as by `score`, with the `top` likeliest in its place."""
    row, scored, *_ = _laid_out(lm, prompt, given, continuation, "never")
    return _rated_places(lm, row, scored, top)


@torch.inference_mode()
def rate_text(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example | Sequence[int], top: int = 0
) -> list[RatedToken]:
    """Every token of an input itself, as evaluation harnesses ask for them; see `rate_continuation`."""
    marks = prompt.marks(lm, given) if isinstance(given, str | Example) else list(given)
    demand_room(lm, len(marks), "The text")
    places = [place for place, mark in enumerate(marks) if mark >= 0]
    # A deep prompt has no output of its own, which would predict the first token behind it.
    first = prompt.length + 1 if prompt.kind == "deep" else 1
    scored = [place for place in places if place >= first]
    unscored = [RatedToken(marks[place], None) for place in places if place < first]
    if not scored:
        return unscored
    return unscored + _rated_places(lm, prompt.row(marks, need=scored[0] - 1), scored, top)


def continuation_ids(lm: FrozenLM, prompt: CompiledPrompt, given: str | Example, text: str) -> list[int]:
    """The tokens of a continuation as training and `score` lay it out behind this input."""
    row, scored, *_ = _laid_out(lm, prompt, given, text, "never")
    return [row.marks[place] for place in scored]


def _rated_places(lm: FrozenLM, row: PrefillRow, scored: Sequence[int], top: int) -> list[RatedToken]:
    done = prefill(lm, [row])
    hidden_ND = done.hidden_BTD[0, [place - 1 - row.state.length for place in scored]]
    size = max(1, BLOCK_LOGITS // lm.vocab_size)
    rated: list[RatedToken] = []
    for start in range(0, len(scored), size):  # all logits at once would be too much memory
        log_probabilities_nV = lm.logits(hidden_ND[start : start + size]).float().log_softmax(-1)
        best = log_probabilities_nV.topk(max(1, min(top, lm.vocab_size)))
        ids = [row.marks[place] for place in scored[start : start + size]]
        values_n = log_probabilities_nV.gather(1, torch.tensor(ids, device=lm.device)[:, None])[:, 0]
        for token, value, tokens, values in zip(
            ids, values_n.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            if not math.isfinite(value):
                raise NotFinite(
                    f"The log-probabilities of the text are not finite: its prompt overflows {lm.name}, or a weight of "
                    "the base is NaN. Load the base with dtype float32, or use another prompt."
                )
            likeliest = tuple(zip(tokens, values, strict=True))[:top]
            rated.append(RatedToken(token, value, likeliest))
    return rated


def _laid_out(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example, continuation: str | None, end: End
) -> tuple[PrefillRow, list[int], str | None, int]:
    template, example = prompt.template, prompt.example(given)
    if continuation is not None:
        target = template.target
        if target is None:
            target = "continuation"
            template = Template((*template.pieces, Field(target)), target)
        example = replace(example, fields={**example.fields, target: continuation})
    encoded = to_learn(prompt.layout(lm, template, end=end), example)
    marks = prompt.laid_out(encoded)
    demand_room(lm, len(marks), example.where)
    shift = len(marks) - len(encoded)
    scored = [place + shift for place, trained in enumerate(encoded.trained) if trained and place + shift > 0]
    return prompt.row(marks, need=scored[0] - 1), scored, prompt.name, encoded.text_bytes


def _scored(lm: FrozenLM, rows: Sequence[tuple[PrefillRow, list[int], str | None, int]]) -> list[Scored]:
    done = prefill(lm, [row for row, *_ in rows])
    # The state before a token predicts it.
    hidden = [
        done.hidden_BTD[b, [place - 1 - row.state.length for place in scored]]
        for b, (row, scored, *_) in enumerate(rows)
    ]
    targets = [row.marks[place] for row, scored, *_ in rows for place in scored]
    values_N, likeliest_N = _rated(lm, torch.cat(hidden), torch.tensor(targets, device=lm.device))
    values, likeliest = values_N.tolist(), likeliest_N.tolist()
    _demand_finite(lm, rows, values)
    results, start = [], 0
    for _, scored, name, text_bytes in rows:
        stop = start + len(scored)
        results.append(
            Scored(
                name,
                sum(values[start:stop]),
                tuple(targets[start:stop]),
                tuple(values[start:stop]),
                all(likeliest[start:stop]),
                text_bytes,
            )
        )
        start = stop
    return results


def _demand_finite(
    lm: FrozenLM, rows: Sequence[tuple[PrefillRow, list[int], str | None, int]], values: Sequence[float]
) -> None:
    start = 0
    for row, scored, name, _ in rows:
        if any(math.isnan(value) for value in values[start : start + len(scored)]):
            text = str(lm.tokenizer.decode([mark for mark in row.marks if mark >= 0]))
            raise NotFinite(
                f'{name or "The base"}: the log-probabilities of the row "{text[:60]}" are not finite: the prompt '
                f"overflows {lm.name}, or a weight of the base is NaN. Load the base with dtype float32, or use another "
                "prompt."
            )
        start += len(scored)


def _rated(lm: FrozenLM, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether it is the likeliest token, a block of logits at a time."""
    size = max(1, BLOCK_LOGITS // lm.vocab_size)
    values, likeliest = [], []
    for start in range(0, len(targets_N), size):
        hidden_nD, targets_n = hidden_ND[start : start + size], targets_N[start : start + size]
        logits_nV = lm.logits(hidden_nD).float()
        values.append(logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(1))
        likeliest.append(logits_nV.argmax(1) == targets_n)
    return torch.cat(values), torch.cat(likeliest)
