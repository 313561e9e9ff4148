"""A connection to a Ray cluster: an existing one, or one on this machine alone, without dashboard and reports of use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softprompt.errors import ClusterError, MissingExtra

OBJECT_STORE_BYTES = 500_000_000  # of a cluster on this machine alone: parts and outcomes are small
QUIETLY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def demand_ray() -> None:
    """Raises MissingExtra where Ray is not installed."""
    if find_spec("ray") is None:
        raise MissingExtra("--on ray needs Ray, which is not installed: pip install 'softprompt[ray]'.")


@contextmanager
def connected(address: str = "ray") -> Iterator[None]:
    """A connection to the cluster at `address` (as `--on` takes it), or the one that this process has already.

    Raises ClusterError where none answers."""
    for name, value in QUIETLY.items():
        os.environ.setdefault(name, value)
    if address != "ray" and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's client sends its token only if told to
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        _connect(address)
    except Exception as error:  # Ray raises many kinds, bare ones among them
        raise ClusterError(
            f"--on {address}: no Ray cluster answers ({_why(error)}). Start one with `ray start --head`, or check "
            "the address and, where the cluster wants one, the token (~/.ray/auth_token)."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _why(error: Exception) -> str:
    """What an error of Ray's says: its first line, and the last one, where its client puts the cause behind a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__


def _has_token() -> bool:
    """Whether this machine has a token for clusters, as Ray keeps it."""
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def _connect(address: str) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "ray":
        ray.init(address=address, **common)
        return
    try:
        ray.init(address="auto", **common)
    except (ConnectionError, RuntimeError, TimeoutError):  # none, or the trace of one that has ended
        if os.environ.get("RAY_ADDRESS"):
            raise
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **common,
        )
