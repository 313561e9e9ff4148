"""Workers of Ray Data: parts stream through actors that keep what they have loaded, and come back in order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from softprompt.base.workers import Outcome, Part, Tell
from softprompt.errors import ClusterError, SoftPromptError, first_line
from softprompt.scale.ray_site import Site
from softprompt.scale.ray_workers import RayWorkers, environment


class RayDataWorkers(RayWorkers):
    """Workers for a stream of many equal parts, as RayWorkers are for few large ones.

    Ray Data moves the parts, holds back actors that are far ahead of whoever takes the outcomes, and replaces lost ones."""

    def map(
        self,
        do: Callable[[Part, Tell], Outcome],
        parts: Iterable[Part],
        tell: Callable[[int, Any], None] | None = None,
        *,
        folder: Path | None = None,
        own_process: bool = False,
    ) -> Iterator[Outcome]:
        """`do` of each part, in their order. Parts send no events here, and all of them are handed to Ray at the start,
        whose object store spills to disk what it has no room for.

        Raises what a part raises, and ClusterError where a part's worker was lost too often."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        rows = [{"part": pickle.dumps(part)} for part in parts]
        if not rows:
            return
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        with ray.data.DataContext.current(context):
            outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _Doing,
                fn_constructor_args=(do, Site.here(folder)),
                compute=ray.data.ActorPoolStrategy(size=min(self.count, len(rows))),
                num_cpus=self.cpus,
                num_gpus=self.gpus or None,
                max_restarts=self.retries,
                max_task_retries=self.retries,
                runtime_env=environment(),
            )
        try:
            for row in outcomes.iter_rows():
                outcome, error = pickle.loads(row["outcome"])
                if error is not None:
                    raise error
                yield outcome
        except RayTaskError:
            raise
        except RayError as error:
            raise ClusterError(
                f"A part of the work was lost with its worker too often ({first_line(error)}). If memory runs out there, let "
                "each worker take more of a machine (--worker-cpus)."
            ) from error


class _Doing:
    """An actor that does parts."""

    def __init__(self, do: Callable[[Any, Tell], Any], site: Site) -> None:
        self.do, self.site = do, site

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Does a part. Its outcome, or the error that a user can help."""
        try:
            self.site.enter()
            return {"outcome": pickle.dumps((self.do(pickle.loads(row["part"]), _tell_nobody), None))}
        except SoftPromptError as error:
            return {"outcome": pickle.dumps((None, error))}


def _tell_nobody(event: Any) -> None:
    """Nobody watches."""
