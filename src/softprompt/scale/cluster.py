"""Workers as the settings name them: this process, or a Ray cluster, which an extra is needed for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from softprompt.base.workers import HERE, Workers
from softprompt.settings.cluster_settings import ClusterSettings


@contextmanager
def workers_of(settings: ClusterSettings) -> Iterator[Workers]:
    """The workers for a work. Raises MissingExtra without Ray, BaseError where its cluster does not answer."""
    if settings.cluster is None:
        yield HERE
        return
    from softprompt.scale.ray_workers import RayWorkers

    with RayWorkers(settings.cluster, cpus=settings.worker_cpus, gpus=settings.worker_gpus) as workers:
        yield workers
