"""How many positions a base can read exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.errors import DataError

# These scale their angles by the longest row of a batch, so past this point a row's result would depend on its
# neighbours and its cached keys would be of another scale than its new ones.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def longest_text(lm: FrozenLM) -> int | None:
    """Positions in all, prompt included; None where nothing bounds them (ALiBi)."""
    config = lm.model.config.get_text_config()
    bounds = [lm.context]
    for rope in _ropes(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT:
            bounds.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
            )
    known = [bound for bound in bounds if bound]
    return min(known) if known else None


def demand_room(lm: FrozenLM, positions: int, where: str = "The text") -> None:
    """Raise DataError where a sequence is longer than the base can read."""
    most = longest_text(lm)
    if most is not None and positions > most:
        raise DataError(
            f"{where} has {positions} positions with its prompt, and {lm.name} has {most}. Shorten the text."
        )


def _ropes(found: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(found, Mapping):
        return
    if "rope_type" in found or "type" in found:
        yield found
    for value in found.values():  # one set of them for each kind of layer
        yield from _ropes(value)
