"""Answers that another process gives: what a predictor needs as plain data, and the predictor that is made of it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from softprompt.base.from_settings import kept_base
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.ending import End
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import Answer, Predict
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import predictor
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import Fingerprint, Prompt
from softprompt.settings.base_settings import BaseSettings

_held: dict[str, Predict] = {}
"""The predictor that this process made last, by its key."""


@dataclass(frozen=True)
class AnswersElsewhere:
    """A predictor that can be sent to another process, which loads the base and compiles the prompt once.

    `front` is the layout with an engineered text; without it and without a `prompt` the base alone answers."""

    base: BaseSettings
    fingerprint: Fingerprint
    prompt: Prompt | None
    front: Template | None
    layout: Template
    metrics: tuple[str, ...]
    settings: JudgeSettings
    end: End
    special_tokens: bool
    key: str = field(default_factory=lambda: token_hex(8))

    def __call__(self, examples: Sequence[Example]) -> Sequence[Answer]:
        """Answers examples. Raises BaseError where this machine has another base under that name."""
        if self.key not in _held:
            _held.clear()
            _held[self.key] = self._predictor()
        return _held[self.key](examples)

    def _predictor(self) -> Predict:
        lm = kept_base(self.base, self.fingerprint)
        prompt = compiled_in(lm, self.prompt, self.front, self.layout, special_tokens=self.special_tokens)
        return predictor(lm, prompt, self.layout, metrics_named(self.metrics), self.settings, end=self.end)


def compiled_in(
    lm: FrozenLM, prompt: Prompt | None, front: Template | None, layout: Template, *, special_tokens: bool
) -> CompiledPrompt:
    """A learned prompt in `layout`, the base alone in it, or in `front` an engineered text, as it is judged."""
    if front is not None:
        return compile_prompt(lm, front, name="text", special_tokens=special_tokens)
    return compile_prompt(lm, prompt, template=layout, special_tokens=special_tokens)
