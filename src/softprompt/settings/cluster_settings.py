"""Where a verb's work is done: in this process, or on a cluster. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from softprompt.settings.section import setting
from softprompt.settings.table import Table


class ClusterSettings(Table):
    """A cluster, and what each of its workers takes of it."""

    cluster: Annotated[str, Field(pattern=r"^ray(://\S+)?$")] | None = setting(
        None,
        "Spread the work over a Ray cluster: ray for the one that this machine is part of (RAY_ADDRESS names another; "
        "without any, this machine alone), ray://HOST:PORT for one that is reached through Ray's client server.",
        flag="--on",
    )
    worker_cpus: Annotated[int, Field(ge=1, le=100_000)] = setting(
        1, "CPUs of the cluster that each worker takes.", flag="--worker-cpus"
    )
    worker_gpus: Annotated[float, Field(ge=0, le=1_000)] = setting(
        0.0, "GPUs of the cluster that each worker takes.", flag="--worker-gpus"
    )
