"""Every setting of a distillation, declared once. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from softprompt.settings.base_settings import BaseSettings
from softprompt.settings.section import Section, setting
from softprompt.tuning.recipe import Count, NotNegative, Rows, Share, TuneSettings

Text = Annotated[str, Field(min_length=1)]


class Questions(Section):
    """The questions that the teacher is asked."""

    source: str | None = setting(
        None,
        "Questions without answers: a file, a folder, a data set's id on the hub, or `builtin:NAME`. Without it the base "
        "writes questions about the context itself.",
        flag="--data",
        elsewhere="dataset",
    )
    column: str | None = setting(None, "The column that holds the question.", flag="--column")
    messages: str | None = setting(None, "The column of chat messages; the last user turn is the question.")
    target: str | None = setting(
        None,
        "The column of right answers, if there are any: measured at the end, learned with `gold`, shown with `shots`.",
        flag="--target",
    )
    template: str | None = setting(
        None,
        "The text around a question, without a soft slot, such as `Request: {text}\\nIntent: {intent}`. Without it the "
        "base's chat template where it has one, else `{text}` and a line break.",
        flag="--template",
    )
    limit: Count | None = setting(None, "Take the first N rows alone.", flag="--limit")
    validation: Share | Rows | str | None = setting(
        None,
        "Questions held out to choose the best step and to judge by: a share, a number, a split or a file.",
        flag="--validation",
    )
    test: Share | Rows | str | None = setting(
        None, "Held out to the end, given like `validation`.", flag="--test"
    )
    seed: int = setting(0, "Which rows are held out.", ge=0, le=2**53 - 1)
    written: Count = setting(96, "How many questions the base writes where none are given.", flag="--written")


class Context(Section):
    """The long text that becomes a prompt: one of these."""

    document: Text | None = setting(None, "A text file to answer from, such as a handbook.", flag="--context")
    instruction: Text | None = setting(
        None, "An instruction: a text file, or the text itself.", flag="--instruction"
    )
    shots: Count | None = setting(
        None, "So many labelled training rows as examples (few-shot); needs `target`.", flag="--shots"
    )


class Learning(Section):
    """The settings by which the short prompt learns from the long text."""

    length: Annotated[int, Field(ge=2, le=100_000)] = setting(
        32, "Positions of the short prompt.", flag="--virtual-tokens", elsewhere="num_virtual_tokens"
    )
    init: Literal["auto", "compaction", "first", "vocabulary"] = setting(
        "auto",
        "compaction: the context's own keys that matter, with values solved for (attention matching). first: the "
        "context's first positions. vocabulary: sampled tokens. auto: compaction for a deep prompt, vocabulary for a "
        "soft one.",
        flag="--init",
    )
    kind: Literal["deep", "soft"] = setting(
        "deep",
        "deep: keys and values for every layer. soft: vectors alone, which hold far less of a long text.",
        flag="--kind",
    )
    answers: Count = setting(
        1, "Answers that the teacher gives to each question.", flag="--answers-per-question"
    )
    answer_tokens: Count = setting(64, "Longest answer in tokens.", flag="--answer-tokens")
    temperature: NotNegative = setting(
        0.7, "How freely answers are drawn; 0 is the likeliest answer alone, once.", flag="--temperature"
    )
    teacher_top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        20, "The teacher's likeliest tokens that are kept at each position; 0 keeps the whole vocabulary."
    )
    on_policy: Annotated[int, Field(ge=0, le=1_000_000)] = setting(
        0,
        "How often the answers that are learned from are drawn again, from the short prompt itself, with the teacher's "
        "probabilities; the steps are shared among the rounds.",
        flag="--on-policy",
    )
    gold: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0,
        "The share of the loss that right answers get beside the teacher's; needs `target`.",
        flag="--gold",
    )
    ridge: Annotated[float, Field(gt=0)] = setting(
        1e-3, "Pull of compaction's values towards the context's own."
    )
    exact: bool = setting(
        False,
        "Refuse a base on which a shortened context cannot keep its distances (no rotary positions).",
        flag="--exact",
    )


class DistilSettings(BaseSettings):
    """One distillation, complete."""

    base: str = setting(
        "builtin", "The frozen model: `builtin`, a local folder, or a model's id on the hub.", flag="--base"
    )
    out: str = setting("runs/distilled", "The folder that the prompt is written to.", flag="--out")
    context: Context = Field(default_factory=Context, description="The long text.")
    data: Questions = Field(default_factory=Questions, description="The questions.")
    distil: Learning = Field(default_factory=Learning, description="How it is distilled.")
    tune: TuneSettings = Field(
        default_factory=TuneSettings, description="The optimiser's settings, as in `tune`."
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = [
            name for name in ("document", "instruction", "shots") if getattr(self.context, name) is not None
        ]
        if len(given) != 1:
            given_words = " and ".join(given) or "nothing"
            raise ValueError(
                f"found {given_words}, wanted one long text. Give --context FILE, --instruction TEXT or FILE, or --shots N."
            )
        if self.context.shots is not None and (self.data.target is None or self.data.source is None):
            raise ValueError("shots needs labelled rows. Give --data and --target.")
        if self.context.instruction is not None and self.data.source is None:
            raise ValueError("an instruction needs texts that it is applied to. Give --data.")
        if self.distil.gold and self.data.target is None:
            raise ValueError("gold needs right answers. Give --target.")
        if self.distil.gold and self.distil.on_policy:
            raise ValueError("gold learns from right answers, and on_policy from the prompt's own. Keep one.")
        if self.distil.kind == "soft" and self.distil.init in ("compaction", "first"):
            raise ValueError(
                f"a soft prompt cannot hold the keys and values of --init {self.distil.init}. Leave --init out, or set "
                "--kind deep."
            )
        return self
