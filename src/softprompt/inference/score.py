"""Log-probabilities of given texts under a prompt, batched, every row as if it were alone."""

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
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.data.layout import to_learn
from softprompt.data.template import Field, Template
from softprompt.errors import NotFinite
from softprompt.inference.compiled import CompiledPrompt, Promptable
from softprompt.inference.generate import compiled_each, listed, one_each
from softprompt.inference.prefill import PrefillRow, like_lengths, prefill
from softprompt.progress.bar import Advance, progress_bar


@dataclass(frozen=True, repr=False)
class Scored:
    """The log-probabilities (natural) of a text's tokens, and whether greedy decoding would give them all.

    `text_bytes` are the UTF-8 bytes of the text that was scored.
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
    progress: bool | Advance | None = None,
) -> list[Scored]:
    """Scores each continuation of its input under its prompt, in the layout that training uses.

    `inputs` may be a single text or row; the result is always a list. Without a continuation the trained text of the
    row is scored: its target, or all of its text. `end` scores an end token after it (data.layout.Layout). The first
    position of a row, which nothing predicts, is not scored. Progress over several rows is shown in terminals and
    notebooks, unless `progress` is False; a function is called instead with the number of rows done and of all.
    """
    inputs = listed(inputs)
    wanted = one_each(continuations, len(inputs), "continuations")
    compiled = compiled_each(lm, prompts, len(inputs))
    rows = [
        _laid_out(lm, prompt, given, continuation, end)
        for given, continuation, prompt in zip(inputs, wanted, compiled, strict=True)
    ]
    results: dict[int, Scored] = {}
    number = {id(scoring.row): i for i, scoring in enumerate(rows)}
    with progress_bar(False if progress is None and len(rows) == 1 else progress, "scoring") as advance:
        for group in like_lengths(lm, [scoring.row for scoring in rows], batch_rows):
            numbers = [number[id(row)] for row in group]
            results.update(zip(numbers, _scored(lm, [rows[i] for i in numbers]), strict=True))
            advance(len(results), len(rows))
    return [results[i] for i in range(len(rows))]


@dataclass(frozen=True)
class RatedToken:
    """A token of a text, its log-probability (None where nothing predicts it), and the likeliest tokens at its position."""

    token_id: int
    log_probability: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def rate_continuation(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    given: str | Example,
    continuation: str,
    top: int = 0,
    end: End = "never",
) -> list[RatedToken]:
    """Rates every token of a continuation, laid out and scored as by `score`, with the `top` likeliest at its position."""
    scoring = _laid_out(lm, prompt, given, continuation, end)
    return _rated_tokens(lm, scoring.row, scoring.positions, top)


@torch.inference_mode()
def rate_text(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example | Sequence[int], top: int = 0
) -> list[RatedToken]:
    """Rates every token of an input itself, as evaluation harnesses ask for them; see `rate_continuation`."""
    marks = prompt.marks(lm, given) if isinstance(given, str | Example) else list(given)
    demand_room(lm, len(marks), "The text")
    positions = [position for position, mark in enumerate(marks) if mark >= 0]
    # A deep prompt has no output, which would predict the first token behind it.
    first = prompt.length + 1 if prompt.kind == "deep" else 1
    scored = [position for position in positions if position >= first]
    unscored = [RatedToken(marks[position], None) for position in positions if position < first]
    if not scored:
        return unscored
    return unscored + _rated_tokens(lm, prompt.row(marks, need=scored[0] - 1), scored, top)


def continuation_ids(lm: FrozenLM, prompt: CompiledPrompt, given: str | Example, text: str) -> list[int]:
    """Tokenises a continuation as training and `score` lay it out behind this input."""
    return list(_laid_out(lm, prompt, given, text, "never").targets)


def _rated_tokens(lm: FrozenLM, row: PrefillRow, scored: Sequence[int], top: int) -> list[RatedToken]:
    done = prefill(lm, [row])
    hidden_ND = done.hidden_BTD[0, [position - 1 - row.state.length for position in scored]]
    size = max(1, BLOCK_LOGITS // lm.vocab_size)
    rated: list[RatedToken] = []
    for start in range(0, len(scored), size):  # all logits at once would be too much memory
        log_probabilities_nV = lm.logits(hidden_ND[start : start + size]).float().log_softmax(-1)
        best = log_probabilities_nV.topk(max(1, min(top, lm.vocab_size)))
        ids = [row.marks[position] for position in scored[start : start + size]]
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


@dataclass(frozen=True)
class _Scoring:
    """A row to score: its sequence, the positions of the tokens that count, its prompt's name, and their text's bytes."""

    row: PrefillRow
    positions: tuple[int, ...]
    prompt: str | None
    text_bytes: int

    @property
    def targets(self) -> tuple[int, ...]:
        """Ids of the tokens that count."""
        return tuple(self.row.marks[position] for position in self.positions)

    @property
    def predicting(self) -> list[int]:
        """The positions in the computed hidden states that predict each of them: one before it."""
        return [position - 1 - self.row.state.length for position in self.positions]


def _laid_out(
    lm: FrozenLM, prompt: CompiledPrompt, given: str | Example, continuation: str | None, end: End
) -> _Scoring:
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
    virtual = len(marks) - len(encoded)  # of a deep prompt, which the encoded row does not hold
    trained = [virtual + at for at, learned in enumerate(encoded.trained) if learned and virtual + at > 0]
    row = prompt.row(marks, need=trained[0] - 1)
    return _Scoring(row, tuple(trained), prompt.name, encoded.text_bytes)


def _scored(lm: FrozenLM, rows: Sequence[_Scoring]) -> list[Scored]:
    done = prefill(lm, [scoring.row for scoring in rows])
    # Only positions that predict a scored token reach the vocabulary: one product for all rows, whatever their lengths.
    hidden_ND = torch.cat([done.hidden_BTD[b, scoring.predicting] for b, scoring in enumerate(rows)])
    targets = [token for scoring in rows for token in scoring.targets]
    values_N, likeliest_N = _rated(lm, hidden_ND, torch.tensor(targets, device=lm.device))
    values, likeliest = values_N.tolist(), likeliest_N.tolist()
    # The flat values go back to their rows in the order in which they were joined.
    results, start = [], 0
    for scoring in rows:
        own = slice(start, start + len(scoring.positions))
        _demand_finite(lm, scoring, values[own])
        results.append(
            Scored(
                scoring.prompt,
                sum(values[own]),
                scoring.targets,
                tuple(values[own]),
                all(likeliest[own]),
                scoring.text_bytes,
            )
        )
        start = own.stop
    return results


def _demand_finite(lm: FrozenLM, scoring: _Scoring, values: Sequence[float]) -> None:
    if any(math.isnan(value) for value in values):
        text = str(lm.tokenizer.decode([mark for mark in scoring.row.marks if mark >= 0]))
        raise NotFinite(
            f'{scoring.prompt or "The base"}: the log-probabilities of the row "{text[:60]}" are not finite: the prompt '
            f"overflows {lm.name}, or a weight of the base is NaN. Load the base with dtype float32, or use another "
            "prompt."
        )


def _rated(lm: FrozenLM, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the log-probability of each target, and whether it is the argmax, a block of logits at a time."""
    size = max(1, BLOCK_LOGITS // lm.vocab_size)
    values, likeliest = [], []
    for start in range(0, len(targets_N), size):
        hidden_nD, targets_n = hidden_ND[start : start + size], targets_N[start : start + size]
        logits_nV = lm.logits(hidden_nD).float()
        values.append(logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(1))
        likeliest.append(logits_nV.argmax(1) == targets_n)
    return torch.cat(values), torch.cat(likeliest)
