"""The figures that `evaluate` gives, of rows that a server has answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.evaluation.evaluate import default_metrics
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import as_learned
from softprompt.evaluation.rows import Row
from softprompt.inference.score import RatedToken
from softprompt.serving.wire import AnsweredRow

LAYOUT = Template.parse("{text}{answer}", target="answer")


def row_of(lm: FrozenLM, index: int, answered: AnsweredRow, rated: Sequence[RatedToken]) -> Row:
    """A judged row: the loss of its wanted text from the tokens `rated`, which are empty where it is unknown."""
    losses = [-token.log_probability for token in rated if token.log_probability is not None]
    return Row(
        index,
        index,
        answered.input,
        as_learned(lm)(answered.wanted),
        answered.answer,
        nll=math.fsum(losses) if losses else math.nan,
        tokens=len(losses),
        text_bytes=len(answered.wanted.encode()),
    )


def figures_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Each metric that suits the rows, with its error and what it is measured in; an unknown figure is None."""
    examples = [Example({"text": row.input, "answer": row.wanted}) for row in rows]
    figures: dict[str, dict[str, Any]] = {}
    for metric in metrics_named(default_metrics(LAYOUT, examples)):
        estimate = metric.estimate(rows)
        figures[metric.name] = {
            "value": _known(estimate.value),
            "stderr": _known(estimate.stderr),
            "n": estimate.n,
            "unit": metric.unit,
            "better": metric.better,
        }
    return figures


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
