"""Limits that a base's config states: how many positions it reads exactly, and whether vectors can replace tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from softprompt.errors import BaseError, DataError

# These scale their angles by the longest row of a batch, so past this point a row's result would depend on its
# neighbours and its cached keys would be of another scale than its new ones.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Configured(Protocol):
    """A base with its weights (FrozenLM) or without (Outline)."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any: ...


def stated_context(config: Any) -> int | None:
    """Positions that the base has; None for BLOOM and other ALiBi models: no table of positions, so no hard end."""
    sizes = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
    return next((int(size) for key in sizes if (size := getattr(config, key, None))), None)


def longest_text(lm: Configured) -> int | None:
    """Positions in all, prompt included; None where nothing bounds them (ALiBi)."""
    config = lm.config
    bounds = [stated_context(config)]
    for rope in _ropes(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT:
            bounds.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
            )
    return min((bound for bound in bounds if bound), default=None)


def demand_room(lm: Configured, positions: int, where: str = "The text") -> None:
    """Raises DataError where a sequence is longer than the base can read."""
    most = longest_text(lm)
    if most is not None and positions > most:
        raise DataError(
            f"{where} has {positions} positions with its prompt, and {lm.name} has {most}. Shorten the text."
        )


def demand_one_vector(config: Any, kind: str, name: str) -> None:
    """Raises BaseError where the base reads more of a token than its embedding (Gemma 3n)."""
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise BaseError(
            f"{name}: {kind} looks up a vector for each token in every layer, and a soft prompt's "
            "vectors are no tokens. Choose another base."
        )


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(parameters, Mapping):
        return
    if "rope_type" in parameters or "type" in parameters:
        yield parameters
    for value in parameters.values():  # a set for each kind of layer
        yield from _ropes(value)
