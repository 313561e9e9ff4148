"""Few-shot examples: which training rows are shown, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from softprompt.data.example import Example


def drawn_shots(
    train: Sequence[Example], answer: Callable[[Example], str], count: int, seed: int
) -> list[Example]:
    """`count` training rows by `seed`. Where answers repeat, one of each answer in turn; else any rows."""
    rng = random.Random(f"few-shot/{seed}")
    shuffled = list(train)
    rng.shuffle(shuffled)
    by_answer: dict[str, list[Example]] = {}
    for example in shuffled:
        by_answer.setdefault(answer(example), []).append(example)
    chosen: list[Example] = []
    while len(chosen) < min(count, len(shuffled)):
        for examples in by_answer.values():
            if examples and len(chosen) < count:
                chosen.append(examples.pop())
    rng.shuffle(chosen)
    return chosen
