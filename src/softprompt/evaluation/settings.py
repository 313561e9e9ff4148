"""Settings of judging a prompt: each one is declared once, for Python, YAML and the command line. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from softprompt.settings.section import setting
from softprompt.settings.table import Table
from softprompt.tuning.recipe import Data

LARGEST = 2**31 - 1
Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
MetricName: TypeAlias = Literal[
    "accuracy",
    "macro_f1",
    "exact_match",
    "numeric_match",
    "token_f1",
    "rouge_l",
    "bleu",
    "chrf",
    "nll",
    "perplexity",
    "bits_per_byte",
    "byte_perplexity",
]


class JudgeSettings(Table):
    """Settings of judging: the rows, the metrics, and how answers are obtained.

    With `answers` rank the likeliest label is the answer, else text is generated over the whole vocabulary.
    """

    split: str | None = setting(
        None, "The split to judge on; without it test, else validation, else train.", flag="--split"
    )
    judge_rows: Count | None = setting(
        None, "Judge only on the first N rows of the split.", flag="--judge-rows", elsewhere="limit"
    )
    metrics: list[MetricName] = setting(
        [],
        "The first one ranks; without any, metrics that suit the data.",
        flag="--metric",
        elsewhere="metric",
    )
    answers: Literal["generate", "rank"] = setting(
        "generate",
        "generate: over the whole vocabulary. rank: the likeliest of the labels.",
        flag="--answers",
    )
    labels: list[str] = setting([], "The labels to rank; without any, those in the data.", flag="--label")
    calibrate: bool = setting(
        False,
        "Divide each label's probability by its mean probability after inputs without content (Zhao et al. 2021).",
        flag="--calibrate",
    )
    max_new_tokens: Count | None = setting(
        None,
        "The longest answer; without it, the longest wanted answer and a quarter more.",
        flag="--max-new-tokens",
    )
    stop: list[str] | None = setting(
        None,
        "Texts that end an answer; without it the end of a line, unless a wanted answer has several lines.",
        flag="--stop",
    )
    temperature: NotNegative = setting(0.0, "0 generates greedily; above it, answers are sampled.")
    seed: int = setting(0, "Seed of sampled answers.", ge=0, le=2**63 - 1)
    batch_rows: Count = setting(16, "Rows side by side.", flag="--batch-rows", elsewhere="batch_size")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.calibrate and self.answers != "rank":
            raise ValueError(
                "calibrate divides the probabilities of ranked labels. Set answers to rank (--answers rank)."
            )
        if self.labels and self.answers != "rank":
            raise ValueError(
                "labels are given, but answers are generated. Set answers to rank (--answers rank)."
            )
        return self


class JudgedData(Data):
    """The data to judge on, and how a row becomes text. What is not set is taken from the prompt."""

    source: str | None = setting(  # type: ignore[assignment]
        None,
        "What to judge on, as in `tune`; without it, the held-out rows of the prompt's own data.",
        flag="--data",
        elsewhere="dataset",
    )
    target: str | None = setting(
        None, "The field that is wanted; without it, the prompt's own.", flag="--target"
    )
    template: str | None = setting(
        None, "How a row becomes text; without it, the prompt's own.", flag="--template"
    )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were set, without those left at their defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class JudgedRows(Table):
    """The rows to judge on. A recipe can be given for it: its other parts are ignored."""

    data: JudgedData = Field(default_factory=JudgedData, description="What is judged on.")
    prompt: dict[str, Any] = setting({}, "Not used here: how a prompt is learned.")
    tune: dict[str, Any] = setting({}, "Not used here: how a prompt is learned.")
    out: str | None = setting(None, "Not used here: where a prompt is learned.")
