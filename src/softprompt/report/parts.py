"""The parts of a page: plain records that each format of the report writes in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from softprompt.report.read import Sample


@dataclass(frozen=True)
class Table:
    """`words` are the columns of running text, `best` the row that stands out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: Sequence[int] = ()
    best: int = -1


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Block:
    text: str
    title: str = ""


@dataclass(frozen=True)
class Card:
    """An arm that a reader may want to take, and why, at a glance."""

    title: str
    arm: str
    name: str
    figure: str
    cost: str


@dataclass
class Section:
    id: str
    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False

    @property
    def long(self) -> bool:
        """Whether it may run over several printed pages."""
        return bool(self.samples or self.blocks)

    @property
    def some_same(self) -> bool:
        return any(not sample.differ for sample in self.samples)

    @property
    def some_differ(self) -> bool:
        return any(sample.differ for sample in self.samples)


@dataclass
class Page:
    id: str
    title: str
    facts: str
    verdict: str
    sections: list[Section]
    cards: list[Card] = field(default_factory=list)
