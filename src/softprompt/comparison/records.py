"""Records of a comparison on disk, typed: each arm's result, the summary, and the whole. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field

from softprompt.comparison.settings import CompareSettings
from softprompt.evaluation.interval import Difference
from softprompt.evaluation.metric import Confusion
from softprompt.evaluation.record import SCHEMA, Value, read_json, typed
from softprompt.store.json_values import plain

NAN = math.nan


@dataclass(frozen=True)
class Point:
    """A place on a curve of losses, in nats per trained token."""

    step: Value = NAN
    nll: Value = NAN


@dataclass(frozen=True)
class Clocked:
    """The time that a part of the work took."""

    seconds: Value = NAN
    cpu_seconds: Value = NAN


@dataclass(frozen=True)
class Learning(Clocked):
    """Steps taken, the step that was kept, and the learning rate."""

    steps: Value = NAN
    best_step: Value = NAN
    rate: Value = NAN


@dataclass(frozen=True)
class Memory:
    """Bytes of the process: with the base loaded, and the highest while learning and judging."""

    loaded: Value = NAN
    peak_learning: Value = NAN
    peak_judging: Value = NAN


@dataclass(frozen=True)
class General:
    """Loss on general text in nats per token: of the untouched base, with the task on, and with it off."""

    before: Value = NAN
    on: Value = NAN
    off: Value = NAN
    passages: int = 0


@dataclass(frozen=True)
class Nearest:
    """A vocabulary token near a vector, by cosine similarity."""

    token: str
    cosine: Value


@dataclass(frozen=True)
class Vector:
    """One virtual token: its norm and the tokens it lies near."""

    norm: Value
    nearest: tuple[Nearest, ...] = ()


@dataclass(frozen=True)
class Layer:
    """Mean norms of a deep prompt's keys and values in one layer."""

    keys: Value
    values: Value


@dataclass(frozen=True)
class Anatomy:
    """A learned prompt from outside. A soft prompt has `vectors` and the embedding table's norms, a deep one `layers`."""

    kind: str
    length: int
    table_norm_median: Value = NAN
    table_norm_range: tuple[Value, Value] = (NAN, NAN)
    vectors: tuple[Vector, ...] = ()
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Continued:
    """The start of a text and how an arm continued it."""

    input: str
    text: Annotated[str, Field(validation_alias=AliasChoices("text", "said"))]  # said: in 0.1


@dataclass(frozen=True)
class MetricFigure:
    """One metric of one run."""

    value: Value = NAN
    stderr: Value = NAN
    n: int = 0
    unit: str = ""
    better: str = "higher"


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed: its figures and what it took. What was not measured is nan."""

    arm: str
    seed: int = 0
    digest: str = ""
    judged_on: str = ""
    data_revision: str | None = None
    base_fingerprint: str = ""
    rows: int = 0
    metrics: dict[str, MetricFigure] = field(default_factory=dict)
    confusion: Confusion | None = None
    trained_parameters: Value = NAN
    stored_bytes: Value = NAN
    added_tokens: Value = NAN
    decode_tokens_per_second: Value = NAN
    decode_clock: str = "wall"
    learning: Learning = Learning()
    judging: Clocked = Clocked()
    memory: Memory = Memory()
    general: General = General()
    base_unchanged: bool = False
    base_sha256: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    samples: tuple[Continued, ...] = ()
    curve: tuple[Point, ...] = ()
    validation: tuple[Point, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    anatomy: Anatomy | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    made: str = ""

    def to_record(self) -> dict[str, Any]:
        """Plain data that `from_record` reads back."""
        return {"schema": SCHEMA, **plain(asdict(self))}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "result") -> Self:
        """Reads what `to_record` gave, in this version or in 0.1. Raises DataError."""
        return typed(cls, record, where)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result in a file. Raises DataError."""
        return cls.from_record(read_json(path), str(path))


@dataclass(frozen=True)
class SplitHealth:
    """Properties of the rows of one split; lengths in positions, virtual tokens included."""

    rows: int
    duplicates: int = 0
    lengths: dict[str, Value] | None = None
    trained_tokens: Value = NAN
    truncated: Value = NAN
    dropped: Value = NAN
    too_long: Value = NAN
    unlabelled: Value = NAN
    answers: int | None = None
    labels: dict[str, int] | None = None
    most_frequent_share: Value = NAN
    problem: str | None = None


@dataclass(frozen=True)
class Health:
    """Properties of the rows that weaken a comparison."""

    notes: tuple[str, ...] = ()
    splits: dict[str, SplitHealth] = field(default_factory=dict)
    judged_also_trained: int = 0
    judged_also_validated: int = 0
    validation_also_trained: int = 0
    contradictions: int = 0
    labels_never_trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One metric of one arm: the mean over seeds, and its 95 % interval."""

    value: Value = NAN
    stderr: Value = NAN
    n: int = 0
    by_seed: tuple[Value, ...] = ()
    unit: str = ""
    better: str = "higher"
    low: Value = NAN
    high: Value = NAN


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds: figures, differences on the same rows, and mean costs (memory: the highest)."""

    metrics: dict[str, Figure]
    seeds: int = 1
    trained_parameters: Value = NAN
    stored_bytes: Value = NAN
    added_tokens: Value = NAN
    decode_tokens_per_second: Value = NAN
    decode_clock: str = "wall"
    steps: Value = NAN
    best_step: Value = NAN
    rate: Value = NAN
    learning_seconds: Value = NAN
    learning_cpu_seconds: Value = NAN
    judging_seconds: Value = NAN
    loaded_bytes: Value = NAN
    peak_learning_bytes: Value = NAN
    peak_judging_bytes: Value = NAN
    base_unchanged: bool = False
    general_before: Value = NAN
    general_on: Value = NAN
    general_off: Value = NAN
    dtype: str | None = None
    against_best: Difference | None = None
    against_base: Difference | None = None


@dataclass(frozen=True)
class Summary:
    """Every arm side by side, ranked by one metric."""

    judged_by: str
    better: str
    unit: str
    best: str
    arms: dict[str, ArmSummary]


@dataclass(frozen=True)
class BaseFacts:
    """The base that all arms share."""

    name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    parameters: Value = NAN
    layers: Value = NAN
    width: Value = NAN
    dtype: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """The source of the rows, and their number by kind."""

    source: str | None = None
    revision: str | None = None
    judged_on: str | None = None
    rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Arms judged on the same rows: what `compare` leaves, or evaluations set side by side (`kind` evaluations)."""

    summary: Summary
    runs: dict[str, tuple[ArmResult, ...]]
    metrics: tuple[str, ...]
    base: BaseFacts = BaseFacts()
    data: DataFacts = DataFacts()
    kind: str = "comparison"
    made: str = ""
    command: str = ""
    settings: CompareSettings | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    target: str | None = None
    virtual_tokens: Value = NAN
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    own_process: bool = False
    arm_names: dict[str, str] = field(default_factory=dict)
    health: Health | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Plain data that `from_record` reads back."""
        settings = None if self.settings is None else self.settings.model_dump()
        values = {name: value for name, value in vars(self).items() if name not in ("settings", "runs")}
        tree = {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
            for name, value in values.items()
        }
        runs = {arm: [asdict(result) for result in results] for arm, results in self.runs.items()}
        return {"schema": SCHEMA, **plain({**tree, "settings": settings, "runs": runs})}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "comparison") -> Self:
        """Reads what `to_record` gave, in this version or in 0.1. Raises DataError."""
        tree = dict(record)
        settings = tree.get("settings")
        if isinstance(settings, Mapping):
            settings = dict(settings)
            tree.setdefault("recipe", settings.get("recipe") or {})
            tree["settings"] = CompareSettings.of_record(settings)
        return typed(cls, tree, where)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The comparison in a file. Raises DataError."""
        return cls.from_record(read_json(path), str(path))

    def __repr__(self) -> str:
        judge = self.summary.judged_by
        arms = ", ".join(
            f"{name} {arm.metrics[judge].value:.3f} ± {arm.metrics[judge].stderr:.3f}"
            for name, arm in self.summary.arms.items()
        )
        return f"Comparison({judge}: {arms})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        from html import escape

        judge = self.summary.judged_by
        lines = "".join(
            f"<tr><td>{escape(name)}</td><td>{arm.metrics[judge].value:.3f} ± {arm.metrics[judge].stderr:.3f}</td></tr>"
            for name, arm in self.summary.arms.items()
        )
        return f"<table><tr><th>arm</th><th>{escape(judge)}</th></tr>{lines}</table>"
