"""A server on a Ray cluster: gateways and engines are replicas of Ray Serve, which starts them again when they die."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from softprompt.errors import ClusterError, RecipeError, SaveError, first_line
from softprompt.scale.ray_cluster import connected, demand_ray
from softprompt.scale.ray_site import Site
from softprompt.scale.ray_workers import RayWorkers
from softprompt.scale.settings import GatewaySettings, ReplicaSettings
from softprompt.serving.settings import ServeSettings
from softprompt.settings.cluster_settings import ClusterSettings

APPLICATION = "softprompt"
HEALTH_EVERY_SECONDS = 2.0
# Requests beside rows and waiting requests that an engine takes: probes must not wait behind work.
PROBES = 64
AT_ONCE = 10_000  # requests that a gateway has under way: it only passes them on
STARTS = 3  # of a replica, before the server is given up
START_SECONDS = 300  # until Serve listens
# Serve gives a proxy three times five seconds to start, and kills it then.
PATIENTLY = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
SCALING: dict[str, Any] = {
    "metrics_interval_s": 2.0,
    "look_back_period_s": 6.0,
    "upscale_delay_s": 4.0,  # a queue that lasts so long gets another engine
    "downscale_delay_s": 300.0,
}


class RayServer:
    """A server on the cluster at `address` (`ray`, or ray://HOST:PORT), as a context: it takes requests inside of it.

    Its engines, `replicas` to `max_replicas` of them with `cpus` and `gpus` of a machine each, hold the base and every prompt;
    `gateways` stand before them. Leaving the context ends it: running answers are finished first. Raises MissingExtra
    without Ray, RecipeError for settings that do not agree, ClusterError where the server does not start."""

    def __init__(
        self,
        settings: ServeSettings,
        prompts: Sequence[str | Path] = (),
        *,
        address: str = "ray",
        replicas: int = 1,
        max_replicas: int | None = None,
        gateways: int = 2,
        cpus: int = 1,
        gpus: float = 0.0,
        front: GatewaySettings | None = None,
    ) -> None:
        demand_ray()
        self.settings, self.prompts = settings, tuple(prompts)
        self.replicas = ReplicaSettings(replicas=replicas, max_replicas=max_replicas, gateways=gateways)
        self.cluster = ClusterSettings(cluster=address, worker_cpus=cpus, worker_gpus=gpus)
        self.front = front or GatewaySettings()
        if settings.spread in ("tensor", "layers"):
            raise RecipeError(
                f"spread: found {settings.spread}, wanted none or devices: an engine on a cluster is one process. A base that "
                "several processes hold is served by torchrun (docs/several-processes.md)."
            )
        if settings.port == 0:
            raise RecipeError(
                "port: found 0, wanted a port from 1 on, the same one on all machines of the cluster."
            )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(connected(str(self.cluster.cluster)))
            self._demand_room()
            stack.callback(_end, self._start())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __repr__(self) -> str:
        return f"RayServer({self.url!r}, address={self.cluster.cluster!r})"

    @property
    def url(self) -> str:
        """The address of a machine with a gateway, as that machine sees it."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def wait(self) -> None:
        """Returns at SIGINT or SIGTERM."""
        ended = threading.Event()
        signals = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, lambda *_: ended.set()) for number in signals}
        try:
            while not ended.wait(1.0):
                pass
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _demand_room(self) -> None:
        """Raises ClusterError where the machines have no room for the engines that are wanted from the start: Serve would
        wait for more machines without an end."""
        cpus, gpus = self.cluster.worker_cpus, self.cluster.worker_gpus
        count = RayWorkers(str(self.cluster.cluster), cpus=cpus, gpus=gpus).count
        if count < self.replicas.replicas:
            raise ClusterError(
                f"--on {self.cluster.cluster}: found room for {count} engines of {cpus} CPUs and {gpus:g} GPUs, wanted "
                f"{self.replicas.replicas}. Add machines, or lower --replicas or --worker-cpus."
            )

    def _start(self) -> bool:
        """Starts everything and returns when requests are taken. Says whether Serve itself was started for it."""
        from ray import serve
        from ray.serve.exceptions import RayServeException

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        built = application(self.settings, self.prompts, self.front, self.replicas, self.cluster)
        is_ours = self._start_serve()
        try:
            serve.run(built, name=APPLICATION)
        except (RuntimeError, ValueError, RayServeException) as error:
            why = _cause(error)
            _end(is_ours)
            raise ClusterError(f"The server did not start on the cluster: {why}") from None
        except BaseException:
            _end(is_ours)
            raise
        return is_ours

    def _demand_free_port(self) -> None:
        """Raises SaveError where another program of this machine listens already: Serve would try again and again."""
        if str(self.cluster.cluster).startswith("ray://"):  # the port is of other machines
            return
        try:
            socket.create_server((self.settings.host, self.settings.port)).close()
        except OSError as error:
            raise SaveError(
                f"{self.settings.host}:{self.settings.port}: cannot be listened on ({error.strerror}). Choose another --port."
            ) from None

    def _start_serve(self) -> bool:
        """Starts Serve, which has one address for all its applications. Says whether it did not run before."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.context import _check_cached_client_alive, _get_global_client
        from ray.serve.schema import ApplicationStatus

        wanted = {"host": self.settings.host, "port": self.settings.port}
        # Another process may have ended the Serve that this one knew.
        before: Any = _check_cached_client_alive()[0] or _get_global_client(
            raise_if_no_controller_running=False
        )
        if before is None:
            self._demand_free_port()
            with suppress(TimeoutError, RayError):  # a busy machine exceeds Serve's own minute
                serve.start(http_options=wanted, controller_options={"runtime_env": {"env_vars": PATIENTLY}})
            _wait_for_proxy()
            return True
        found = {"host": before.http_config.host, "port": before.http_config.port}
        former = serve.status().applications.get(APPLICATION)
        if former is not None and former.status != ApplicationStatus.DELETING:
            raise ClusterError(
                "This cluster serves prompts already. End the former server where it was started, or with `serve shutdown`."
            )
        if found != wanted:
            raise ClusterError(
                f"Ray Serve listens on {found['host']}:{found['port']} in this cluster already, for all its applications. Give "
                f"--host {found['host']} --port {found['port']}, or end it with `serve shutdown`."
            )
        return False


def application(
    settings: ServeSettings,
    prompts: Sequence[str | Path] = (),
    front: GatewaySettings | None = None,
    replicas: ReplicaSettings | None = None,
    cluster: ClusterSettings | None = None,
) -> Any:
    """The application for `ray.serve.run`: gateways before engines. Raises what is wrong with keys, prompts and the name of the
    base here, and not in a replica a minute later."""
    from ray import serve

    from softprompt.base.outline import Outline
    from softprompt.scale.ray_replicas import EngineReplica, GatewayReplica, Given
    from softprompt.serving.keys import Keys
    from softprompt.store.artifact import load_prompt
    from softprompt.store.digest import digest_of

    front, replicas, cluster = (
        front or GatewaySettings(),
        replicas or ReplicaSettings(),
        cluster or ClusterSettings(),
    )
    Keys.load(settings.keys)
    Outline.load(
        settings.base or "builtin",
        revision=settings.base_revision,
        trust_remote_code=settings.trust_remote_code,
    )
    given = [Given(str(prompt), digest_of(load_prompt(prompt))) for prompt in prompts]
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_EVERY_SECONDS,
        "health_check_timeout_s": front.lost_after_seconds,
        "graceful_shutdown_timeout_s": settings.grace_seconds,
        "max_constructor_retry_count": STARTS,
        "logging_config": {"log_level": "ERROR", "enable_access_log": False},
    }
    most = replicas.max_replicas or replicas.replicas
    count: dict[str, Any] = {"num_replicas": replicas.replicas}
    if most > replicas.replicas:
        # More requests than rows that run side by side means that some of them wait.
        target = {"target_ongoing_requests": settings.max_rows}
        bounds = {"min_replicas": replicas.replicas, "max_replicas": most}
        count = {"autoscaling_config": {**bounds, **target, **SCALING}}
    engines: Any = serve.deployment(
        name="engines",
        max_ongoing_requests=settings.max_rows + settings.max_waiting + PROBES,
        ray_actor_options={"num_cpus": cluster.worker_cpus, "num_gpus": cluster.worker_gpus},
        **count,
        **common,
    )(EngineReplica)
    gateways: Any = serve.deployment(
        name="gateways",
        num_replicas=replicas.gateways,
        max_ongoing_requests=AT_ONCE,
        ray_actor_options={"num_cpus": 0},
        **common,
    )(serve.ingress()(GatewayReplica))
    site = Site.here(None)
    bound = engines.bind(settings, given, site, most)
    return gateways.bind(bound, front, settings.keys, site)


def _wait_for_proxy() -> None:
    """Returns when a proxy takes requests. Raises ClusterError where none comes."""
    from ray import serve
    from ray.serve.schema import ProxyStatus

    until = time.monotonic() + START_SECONDS
    while ProxyStatus.HEALTHY not in serve.status().proxies.values():
        if time.monotonic() > until:
            serve.shutdown()
            raise ClusterError(
                f"Ray Serve did not start to listen within {START_SECONDS} seconds. Its log (session_latest/logs/serve) says why."
            )
        time.sleep(0.5)


def _end(with_serve: bool) -> None:
    """Ends the server, and Serve too where nothing else needs it."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    with suppress(RayError, RayServeException):  # others may have ended Serve, and the cluster may be gone
        serve.delete(APPLICATION)
        if with_serve and not serve.status().applications:
            serve.shutdown()


def _cause(error: Exception) -> str:
    """Why a replica did not start, as far as Serve knows: the error of ours in its traceback, else its first line."""
    from ray import serve

    status = serve.status().applications.get(APPLICATION)
    texts = [str(error), *([] if status is None else [each.message for each in status.deployments.values()])]
    for text in texts:
        if ours := re.findall(r"^softprompt\.errors\.\w+: (.+)$", text, re.MULTILINE):
            return str(ours[-1])
    return f"{first_line(error)} Ray's log says more."
