"""Workers as the settings name them: this process, or a Ray cluster, which an extra is needed for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from softprompt.base.workers import HERE, Workers
from softprompt.settings.cluster_settings import ClusterSettings


@contextmanager
def workers_of(settings: ClusterSettings, *, as_stream: bool = False) -> Iterator[Workers]:
    """The workers for a work; on a cluster those of Ray Data for a stream of many equal parts.

    Raises MissingExtra without Ray, ClusterError where its cluster does not answer."""
    if settings.cluster is None:
        yield HERE
        return
    from softprompt.scale.ray_workers import RayWorkers

    kind = RayWorkers
    if as_stream and not settings.cluster.startswith("ray://"):  # Ray's client has no Ray Data
        from softprompt.scale.ray_data import RayDataWorkers

        kind = RayDataWorkers
    with kind(settings.cluster, cpus=settings.worker_cpus, gpus=settings.worker_gpus) as workers:
        yield workers
