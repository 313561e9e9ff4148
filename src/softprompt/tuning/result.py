"""The result of a run: the prompt that it keeps, and its figures by name."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field, fields
from typing import Any

from softprompt.progress.events import loss_name
from softprompt.prompt.soft_prompt import Prompt
from softprompt.tuning.records import SCHEMA


@dataclass(frozen=True)
class TuneResult:
    """The best prompt of a run, and what was measured. A figure that is not known is nan, never 0.

    Losses are in nats per trained token, on validation rows or, if there are none, on the training rows
    (`judged_on`): of the base alone, of the start, and of the prompt that is kept. `seconds` are those of the whole
    run, `tokens` all text tokens that were read in learning, `prompt_bytes` what the vectors take on disk. `stopped`
    is finished, patience, dropped, interrupted or failed."""

    prompt: Prompt = field(repr=False)
    path: str
    base: str
    judged_on: str
    nll_base: float
    nll_before: float
    nll_after: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    selected_by: str
    score_before: float
    score_after: float
    learning_rate: float
    batch_size: int
    accumulation: int
    truncated_rows: int
    dropped_rows: int
    stopped: str
    prompt_bytes: int

    def to_record(self) -> dict[str, Any]:
        """Every figure as plain data for JSON, by the names of the fields; the prompt itself lies at `path`."""
        figures = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "prompt"}
        return {"schema": SCHEMA, **figures}

    @property
    def loss_name(self) -> str:
        """The name of the rows that the losses are measured on, for a heading."""
        return loss_name(self.judged_on == "validation")

    @property
    def worse_than_base(self) -> bool:
        """Whether the prompt that is kept has a higher loss than no prompt at all."""
        return self.nll_after > self.nll_base

    @property
    def warning(self) -> str:
        """A sentence for a prompt that is worse than the base; empty for any other."""
        if not self.worse_than_base:
            return ""
        return (
            f"The prompt is worse than the base: {self.loss_name} {_figure(self.nll_after)}, without a prompt "
            f"{_figure(self.nll_base)}. Learn for more steps, or start from a text (prompt.init: text)."
        )

    def __repr__(self) -> str:
        return (
            f"TuneResult({self.path}: {self.loss_name} {self.nll_before:.4f} -> {self.nll_after:.4f} at step "
            f"{self.best_step} of {self.steps}, base alone {self.nll_base:.4f}{'; worse than the base' if self.worse_than_base else ''})"
        )

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        rows = {
            f"{self.loss_name}, nats per token": f"{_figure(self.nll_after)} at step {self.best_step} of {self.steps}",
            "at the start": _figure(self.nll_before),
            "base alone": _figure(self.nll_base),
            "learning rate": f"{self.learning_rate:.3g}",
            "text tokens learned from": f"{self.tokens:,} in {self.seconds:.0f} s",
            "prompt": f"{self.path}, {self.prompt_bytes:,} bytes",
        }
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        warning = f"<p><strong>{html.escape(self.warning)}</strong></p>" if self.warning else ""
        return f"<table>{cells}</table>{warning}"


def _figure(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.4f}"
