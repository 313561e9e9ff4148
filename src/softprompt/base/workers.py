"""Workers: where the independent parts of a long work are done, here one after another or on the machines of a cluster.

A part is a function of plain data, so that it can be sent to another machine. What differs between here and a cluster is
an implementation of Workers alone (scale/ray_workers.py is the other one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

Part = TypeVar("Part")
Outcome = TypeVar("Outcome")

Tell: TypeAlias = Callable[[Any], None]
"""Called by a part at work with an event for whoever watches."""


class Workers(Protocol):
    """Does the parts of a work."""

    @property
    def count(self) -> int:
        """Parts that are done at the same time."""
        ...

    @property
    def are_here(self) -> bool:
        """Whether parts are done in this process, and may use what lies in its memory."""
        ...

    def map(
        self,
        do: Callable[[Part, Tell], Outcome],
        parts: Iterable[Part],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Outcome]:
        """`do` of each part, in the order of `parts`, of which not all need to be known at the start.

        `tell` is called with a part's number and each of its events; after a machine was lost, with events of the
        second try too. `folder` is the one that the parts write into: every worker must see it. With `own_process` a
        part gets a fresh process where workers have processes of their own. What a part raises is raised here."""
        ...


class Here:
    """Workers in this process: one part after another."""

    count = 1
    are_here = True

    def map(
        self,
        do: Callable[[Part, Tell], Outcome],
        parts: Iterable[Part],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Outcome]:
        """`do` of each part."""
        for number, part in enumerate(parts):
            yield do(part, _for_part(number, tell))


def _for_part(number: int, tell: Callable[[int, Any], None] | None) -> Tell:
    return lambda event: None if tell is None else tell(number, event)


HERE: Workers = Here()
