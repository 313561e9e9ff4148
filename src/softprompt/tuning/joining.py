"""A run that several processes learn together: the first writes and speaks, the others follow in a folder that goes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from softprompt.base.processes import Processes, joined
from softprompt.tuning.plan import Plan


@contextlib.contextmanager
def joining(plan: Plan) -> Iterator[tuple[Plan, Processes]]:
    """The plan as this process follows it, and its place among those that `torchrun` started; alone in most runs.

    All take the same steps. What the others write goes to a temporary folder, which is removed at the end."""
    processes = joined(shares_rows=not plan.lm.is_split)
    if processes.first:
        yield plan, processes
        return
    recipe = plan.recipe
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {
            "out": str(Path(folder) / Path(recipe.out).resolve().name),
            "tune": recipe.tune.model_copy(update={"trackers": []}),
        }
        yield replace(plan, recipe=recipe.model_copy(update=own)), processes
