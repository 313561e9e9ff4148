"""Starting points of a short prompt: the context's own keys and values, whose first position never moves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softprompt.prompt.reparam import Form
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.compaction import compact, moved
from softprompt.tuning.distil_settings import DistilSettings
from softprompt.tuning.lessons import Lesson
from softprompt.tuning.teacher import Teacher, Teachers

# Questions and answers whose queries say which keys matter: so many, or as many as have so many positions together.
COMPACTION_ROWS, COMPACTION_POSITIONS = 48, 1_600


class FixedFirst(Form):
    """A prompt whose first row never moves: much attention rests on a context's first position, and learning is unsteady
    where that moves (Cartridges, section 3.2)."""

    def __init__(self, start: Plain) -> None:
        super().__init__(start)
        self.rest_PW = nn.Parameter(self.start_PW[1:].clone())

    def rows(self) -> Tensor:
        """The prompt as a matrix [P, W]."""
        return torch.cat([self.start_PW[:1], self.rest_PW])


def context_start(settings: DistilSettings, teacher: Teachers, lessons: Sequence[Lesson]) -> Plain:
    """Keys and values that a deep prompt starts from, out of the context's own."""
    starts, offset = [], 0
    for index, part in enumerate(teacher.parts):
        # Every part gets its share of the positions; its keys are turned to their positions among the others.
        length = settings.distil.length * (index + 1) // len(teacher.parts) - offset
        own = [lesson for lesson in lessons if teacher.of(lesson.question) is part]
        starts.append(moved(teacher.lm, _part_start(settings, part, own, length), offset))
        offset += length
    return tuple(torch.cat(layers, 1) for layers in zip(*starts, strict=True))


def _part_start(settings: DistilSettings, part: Teacher, lessons: Sequence[Lesson], length: int) -> Plain:
    """Keys and values of `length` positions out of one part's own, as if they were at the front."""
    state = part.compiled.state
    if settings.distil.init == "first":
        first = state.first(length)
        return tuple(
            torch.stack([layer.transpose(0, 1) for layer in layers]).float().cpu()
            for layers in (first.keys, first.values)
        )
    order = random.Random(f"compaction/{settings.tune.seed}").sample(range(len(lessons)), len(lessons))
    rows = list[list[int]]()
    for n in order[:COMPACTION_ROWS]:
        if sum(map(len, rows)) >= COMPACTION_POSITIONS:
            break
        marks = part.compiled.marks(part.lm, part.example(lessons[n].question))
        rows.append([*marks[part.context_positions :], *lessons[n].answer.ids])
    return compact(part.lm, state, rows, length, ridge=settings.distil.ridge).plain
