"""Every setting of a run, declared once: its name, default, limits, help and command-line flag.

The YAML file, `--set a.b=value`, the flags of `softprompt tune` and docs/recipe.md all derive from the fields below,
by way of settings.py. No torch here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from softprompt.settings.base_settings import BaseSettings
from softprompt.settings.section import Section, setting

Auto: TypeAlias = Literal["auto"]
Count: TypeAlias = Annotated[int, Field(ge=1, le=10**12)]
Width: TypeAlias = Annotated[int, Field(ge=1, le=100_000)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**53 - 1)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Rows: TypeAlias = Annotated[int, Field(ge=0, le=10**12)]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


class Data(Section):
    """The data to learn from."""

    source: str = setting(
        ...,
        "A file (csv, tsv, json, jsonl, parquet), a folder, a data set's id on the hub, or `builtin:NAME`.",
        flag="--data",
        elsewhere="dataset",
    )
    revision: str | None = setting(None, "The hub data set's commit, branch or tag.")
    config: str | None = setting(None, "The hub data set's configuration.")
    split: str = setting("train", "The split to learn from.")
    column: str | None = setting(
        None, "The text column: the loss counts all of its tokens. `{text}` in the template.", flag="--column"
    )
    fields: dict[str, str] = setting({}, "Names in the template, and the column that each takes.")
    messages: str | None = setting(
        None, "The column of chat messages: the base's chat template, and the loss on the assistant's turns."
    )
    target: str | None = setting(
        None,
        "The template's field that is to be learned; without it the loss counts the whole text.",
        flag="--target",
    )
    references: str | None = setting(
        None,
        "The column of further right answers, a list of texts in each row: BLEU and chrF judge against them and the "
        "target.",
    )
    template: str | None = setting(
        None,
        "How a row becomes text, such as `{soft:20} {text}` or `Tweet: {text} Complaint? {label}`. `chat`: the base's "
        "chat template, other columns as its user and the target as its assistant; so by default with a target on a base "
        "that has one. Else a line for each column. Without a target, the soft prompt comes right before the text.",
        flag="--template",
    )
    limit: Count | None = setting(None, "Learn from the first N rows alone.", flag="--limit")
    validation: Share | Rows | str | None = setting(
        None,
        "Held out to choose the best step: a share (0.1), a number of rows (50; 0 for none), a split's name or a "
        "file. Without it, the source's own validation split (`own`: that or none), else a tenth of the rows, 10 to "
        "1,000, if there are at least 40; of them a short run measures 64 or more, so that it takes less time than "
        "learning. What is named here is measured whole.",
        flag="--validation",
    )
    test: Share | Rows | str | None = setting(
        None,
        "Held out to the end: given like `validation`. Without it, the source's own test split if it has one.",
        flag="--test",
    )
    seed: Seed = setting(
        0, "Which rows are held out; apart from `tune.seed`, so that runs are judged on the same rows."
    )
    max_length: Count | None = setting(
        None,
        "Longest text in tokens, soft prompt included; without it, the base's context.",
        flag="--max-positions",
    )
    on_overflow: Literal["error", "truncate", "drop"] = setting(
        "error", "What becomes of a text that is longer: refuse the data, cut the text, or leave the row out."
    )
    end: Literal["auto", "always", "never"] = setting(
        "auto",
        "Whether the end-of-text token is appended and learned: auto means after a target or an assistant's turn.",
    )
    special_tokens: bool = setting(
        False,
        "Read what rows spell like a special token, such as `</s>`, as that token. Without it, data is plain text; "
        "special tokens in the template are always read as such.",
    )
    encoding: str | None = setting(
        None, "The file's text encoding; without it, it is detected, and a guess is said."
    )
    quoting: Literal["auto", "double", "none"] = setting(
        "auto",
        "Quotes in csv and tsv files: double encloses cells, none is plain text; auto takes them as plain text in "
        "files of tabs whose cells open quotes and do not close them.",
    )
    streaming: bool = setting(
        False, "Read only the first `limit` rows of a hub data set, rather than downloading all of it."
    )


class PromptSettings(Section):
    """The prompt to learn."""

    kind: Literal["soft", "deep"] = setting(
        "soft",
        "soft: vectors in front of the first layer. deep: keys and values for every layer.",
        flag="--kind",
    )
    length: Width | None = setting(
        None,
        "How many virtual tokens; without it as many as `init_text` or `init_from` has, else 20.",
        flag="--virtual-tokens",
        aliases=["--length"],
        elsewhere="num_virtual_tokens",
    )
    place: Literal["front", "answer"] = setting(
        "front",
        "Where a template that has no `{soft}` of its own gets it: in front, which is what PEFT reads, or right before the "
        "answer (`data.target`), where a soft prompt reads the row before it says how to answer.",
        flag="--place",
    )
    init: Literal[
        "auto",
        "random",
        "vocabulary",
        "scaled",
        "text",
        "labels",
        "zero",
        "sink",
        "prompt",
        "mean",
        "concatenation",
    ] = setting(
        "auto",
        "Where it starts: random at the embedding table's scale, rows of the most frequent vocabulary, the same scaled up "
        "to half the size of what the first layer gives out, the "
        "embeddings of `init_text`, or those of the class labels; or the first prompt of `init_from`, the mean or "
        "the concatenation of them all. A deep prompt starts from what the base holds after reading those, from "
        "zero, or from vocabulary near the first position, where most bases have their attention sink. auto means text where "
        "`init_text` is given, prompt where `init_from` is, else scaled for a soft prompt (vocabulary where a rate or a form is given) "
        "and vocabulary for a deep one, or sink where the base has one.",
        flag="--init",
    )
    init_text: str | None = setting(
        None,
        "The text whose embeddings `init: text` starts from; for a deep prompt that is shorter than the text, the keys "
        "of it that matter to the training rows.",
    )
    init_from: list[str] = setting([], "Folders of prompts of the same base to start from.")
    form: Literal["direct", "residual", "mlp", "lstm", "low_rank", "superposition", "multitask"] = setting(
        "direct",
        "The form that is trained, and folded into a plain prompt on saving: direct is the vectors themselves; "
        "residual, mlp and lstm put a small network behind them; low_rank, superposition and multitask train fewer "
        "numbers.",
    )
    form_width: Width | None = setting(
        None,
        "Size of the form: hidden width of a network, rank, or how many embeddings are superposed; without it, the "
        "form's own.",
    )
    upper_layers: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "The share of the layers, counted from the top, that a deep prompt learns in; below them it keeps its start. "
        "Hidden states that enter them are read once a row, within `tune.context_cache_gigabytes`: at 0.5 a step costs "
        "about 0.6 of a whole one over five epochs.",
        flag="--upper-layers",
    )

    def first_layer(self, layers: int) -> int:
        """The lowest of the base's `layers` layers that learns."""
        return min(layers - 1, round((1.0 - self.upper_layers) * layers))


class TuneSettings(Section):
    """The way of learning."""

    learning_rate: Positive | Literal["auto", "find"] = setting(
        "auto",
        "The highest step size. auto measures it on the base and the rows of each step; "
        "find tries five rates around that in short runs first.",
        flag="--learning-rate",
        elsewhere="lr",
    )
    epochs: Count = setting(5, "How often every row is seen.", flag="--epochs", elsewhere="num_train_epochs")
    max_steps: Count | None = setting(
        None,
        "Stop after this many steps, whatever `epochs` says. Rows that they do not come to are not read; which ones they take "
        "is drawn by `seed`.",
        flag="--steps",
    )
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = setting(
        "auto",
        "Rows a step; auto is 8. Where memory runs out, it is halved and two are added up for a step.",
        flag="--batch-size",
    )
    optimizer: Literal["muon", "adamw", "adafactor"] = setting(
        "muon", "The rule that moves the prompt; arms of `compare` that train weights take adamw for muon."
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "How the learning rate goes down after the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] | Auto = setting(
        "auto", "The share of all steps over which it rises; auto is none with muon, else 0.06."
    )
    weight_decay: NotNegative = setting(0.0, "Pull towards zero; a prompt rarely gains by it.")
    context_cache_gigabytes: Annotated[float, Field(ge=0, le=1e9)] = setting(
        1.0,
        "Memory for text before the first soft token: it is read once and its keys and values are used "
        "again in every epoch. 0 for none.",
    )
    int8_products: bool = setting(
        False,
        "Take the learning steps with the base's weights in int8, which CPUs with VNNI multiply several times faster. "
        "Held-out losses stay those of the base as it is. A small approximation; other machines take no notice.",
        was="int8",
    )
    keep: NotNegative = setting(
        0.0,
        "Pull towards what the base predicts of general text without the prompt: the weight of that KL divergence "
        "beside the task's loss. 0 for none; 1 keeps nearly all of it for two more passages a step.",
        flag="--keep",
    )
    keep_text: str | None = setting(
        None, "A file of running text for `keep`; without it, the base writes some itself."
    )
    clip: Positive | None = setting(1.0, "Largest norm of the gradient; null for no limit.")
    gradient_checkpointing: bool = setting(
        False,
        "Compute each layer a second time rather than keep what it computed: long texts on little memory.",
    )
    seed: Seed = setting(0, "Seed of the start and of the rows' order.", flag="--seed")
    valid_every_steps: Count | None = setting(
        None,
        "Steps between two measurements of the held-out loss; without it, two to ten of them a run, as fit into half of the time that "
        "learning takes, and one at its end.",
    )
    select: Literal["nll", "token_accuracy", "exact_match"] = setting(
        "nll",
        "What the best step is chosen by, on the held-out rows: loss; the share of trained tokens that are the most "
        "likely ones; or of rows of which all are, which greedy decoding would say exactly.",
    )
    patience: Count | None = setting(
        None, "Stop after this many measurements without a better one; without it, run to the end."
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = setting(
        [], "Where the figures go besides metrics.jsonl: tensorboard, trackio, wandb, if installed."
    )
    checkpoint_steps: Count | None = setting(
        None, "Write a checkpoint every so many steps, for `--resume`; without it, by time alone."
    )
    checkpoint_seconds: Positive = setting(60.0, "Write a checkpoint after so many seconds without one.")

    @property
    def warmup_share(self) -> float:
        """`warmup`, with auto settled."""
        if self.warmup == "auto":
            return 0.0 if self.optimizer == "muon" else 0.06
        return self.warmup


class Recipe(BaseSettings):
    """One run of prompt tuning, complete."""

    base: str = setting(
        "builtin",
        "The frozen model: `builtin`, a local folder, or a model's id on the hub.",
        flag="--base",
        elsewhere="model",
    )
    out: str = setting(
        "runs/prompt", "The folder that the prompt is written to.", flag="--out", elsewhere="output_dir"
    )
    data: Data = Field(description="What is learned from.")
    prompt: PromptSettings = Field(default_factory=PromptSettings, description="What is learned.")
    tune: TuneSettings = Field(default_factory=TuneSettings, description="How it is learned.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prompt.init == "text" and not self.prompt.init_text:
            raise ValueError(
                "prompt.init is text, but prompt.init_text is empty. Give the text to start from."
            )
        if self.prompt.init in ("zero", "sink") and self.prompt.kind != "deep":
            raise ValueError(
                f"prompt.init is {self.prompt.init}, which only keys and values can start from. Set prompt.kind to deep, or "
                "prompt.init to random or vocabulary."
            )
        if self.prompt.init == "scaled" and self.prompt.kind == "deep":
            raise ValueError(
                "prompt.init is scaled, which only vectors in front of the first layer can be. Set prompt.kind to soft, or prompt.init to "
                "vocabulary or sink."
            )
        if self.prompt.place == "answer" and self.prompt.kind == "deep":
            raise ValueError(
                "prompt.place is answer, but a deep prompt comes before all text. Set prompt.kind to soft, or leave "
                "prompt.place out."
            )
        if self.prompt.upper_layers < 1 and self.prompt.kind != "deep":
            raise ValueError(
                f"prompt.upper_layers is {self.prompt.upper_layers:g}, but a soft prompt stands before the first layer. Set "
                "prompt.kind to deep, or leave it away."
            )
        if self.prompt.init in ("prompt", "mean", "concatenation") and not self.prompt.init_from:
            raise ValueError(
                f"prompt.init is {self.prompt.init}, but prompt.init_from is empty. Name folders of learned prompts."
            )
        if self.prompt.init == "labels" and self.data.target is None:
            raise ValueError(
                "prompt.init is labels, but data.target is not set. Name the field of the label."
            )
        if self.data.column is not None and self.data.messages is not None:
            raise ValueError("data.column and data.messages are both set. Keep the one that holds the text.")
        return self
