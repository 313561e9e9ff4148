"""The table of arms: what is compared, how each is named, and whether it learns. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

ArmName: TypeAlias = Literal[
    "base", "wording", "prompt", "few-shot", "context", "soft", "deep", "distil", "lora", "full"
]
"""The names in ARMS, for checkers and for the shell to complete."""


@dataclass(frozen=True)
class Arm:
    """One way to solve the task.

    `words` describe it in a list, `in_words` in a sentence. `seeded` arms differ from seed to seed; `learned` ones train.
    `default_rate` is the learning rate without one of the user's own (nan: the recipe's, or derived), at `rate_width` where it depends on
    the base's width.
    An arm that is the base with other numbers decodes as fast as it by construction: a difference would be noise.
    """

    name: str
    words: str
    in_words: str
    seeded: bool = False
    learned: bool = False
    default_rate: float = math.nan
    decodes_as_base: bool = False
    rate_width: int | None = None

    def rate_at(self, width: int) -> float:
        """The default rate on a base of that width. Adam's for all weights falls as 1/width: Yang et al., 2022 (arXiv:2203.03466)."""
        return self.default_rate if self.rate_width is None else self.default_rate * self.rate_width / width


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "the base as it is", "the base as it is"),
        Arm(
            "wording",
            "the base under the best of several wordings, chosen on training rows",
            "the base under its best wording",
        ),
        Arm("prompt", "your own text in front", "your own text"),
        Arm("few-shot", "examples from the training rows in front", "few-shot examples", seeded=True),
        Arm("context", "the long text in front", "the long text"),
        Arm("soft", "a soft prompt", "the soft prompt", seeded=True, learned=True),
        Arm(
            "deep",
            "a deep prompt: keys and values for every layer",
            "the deep prompt",
            seeded=True,
            learned=True,
        ),
        Arm(
            "distil",
            "a deep prompt that learned to answer as under the long text, without labels",
            "the distilled prompt",
            seeded=True,
            learned=True,
        ),
        Arm("lora", "low-rank updates of the weights (PEFT)", "LoRA", True, True, 2e-3),
        Arm(
            "full", "a full copy of the weights, fine-tuned", "full fine-tuning", True, True, 3e-4, True, 256
        ),
    )
}


def in_words(arm: str) -> str:
    """An arm's name in a sentence."""
    return ARMS[arm].in_words if arm in ARMS else arm
