"""`softprompt serve`: prompts by name from one base, for any OpenAI client, and a page to try them on."""

from __future__ import annotations

import ipaddress
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import fact, heading, is_follower, screen
from softprompt.errors import MissingExtra, RecipeError
from softprompt.scale.settings import GatewaySettings, ReplicaSettings
from softprompt.serving.settings import ServeSettings
from softprompt.settings.cluster_settings import ClusterSettings

if TYPE_CHECKING:
    from softprompt.serving.local_engine import LocalEngine

EXAMPLE = "softprompt serve --base builtin runs/support"


@takes(ServeSettings, GatewaySettings, ReplicaSettings, ClusterSettings)
def command(
    settings: ServeSettings,
    front: GatewaySettings,
    replicas: ReplicaSettings,
    cluster: ClusterSettings,
    *,
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PROMPT...]",
            help="Prompts to serve by their names: folders, or hf://OWNER/NAME@REVISION.",
        ),
    ] = None,
) -> None:
    """Serve the base and any number of prompts, each a model by name, until it is interrupted.

    With --engine no base is loaded here: requests go to the engines behind it, and outlive one that dies. With --on, engines and
    gateways run on a Ray cluster."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None or find_spec("prometheus_client") is None:
        raise MissingExtra(
            "serve needs a web server, which is not installed: pip install 'softprompt[serve]'."
        )
    asked.demand_folders(prompts or [])
    local = settings.library is not None and "://" not in settings.library
    if local and not Path(settings.library or "").expanduser().is_dir():
        raise RecipeError(
            f"{settings.library}: there is no such folder. `softprompt publish` makes a library. Check --library."
        )
    if not _is_loopback(settings.host) and settings.keys is None:
        raise RecipeError(
            f"--host {settings.host} can be reached by others, and anybody could use it. Give --keys FILE, or serve on 127.0.0.1."
        )
    if cluster.cluster is not None:
        _serve_on_cluster(settings, front, replicas, cluster, prompts or [])
        return
    if replicas != ReplicaSettings():
        raise RecipeError(
            "--replicas, --max-replicas and --gateways are for a server on a cluster. Add --on ray, or leave them out."
        )
    if front.engine:
        _serve_gateway(settings, front, prompts)
        return
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.base.processes import demand_alone
    from softprompt.serving.server import make_engine, make_server

    if settings.spread not in ("tensor", "layers"):
        demand_alone("serve")
    console = screen()
    lm = FrozenLM.load(
        settings.base or "builtin",
        revision=settings.base_revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        spread=settings.spread,
    )
    if is_follower():
        _follow(make_engine(lm, settings))
        return
    server = make_server(lm, settings, prompts or [])
    heading(console, f"serving {lm.name}")
    for served in server.catalogue.models():
        what = (
            "the base alone"
            if served.digest is None
            else f"{served.kind}, {served.virtual_tokens} virtual tokens"
        )
        fact(console, served.name, what)
    for name, problem in server.catalogue.problems.items():
        console.print(f"{name} is not served: {problem}", markup=False, soft_wrap=True)
    fact(console, "page", f"http://{settings.host}:{settings.port}/")
    fact(console, "API", f"http://{settings.host}:{settings.port}/v1")
    server.run()


def _follow(engine: LocalEngine) -> None:
    """Holds a part of the base for the first process, which has the clients, until that ends."""
    from softprompt.serving.in_step import EngineInStep

    assert isinstance(engine, EngineInStep), "a base in parts has an engine in step"
    # A signal to all processes is for the first one, which finishes what runs and then ends the others.
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, signal.SIG_IGN)
    engine.follow()


def _serve_gateway(settings: ServeSettings, front: GatewaySettings, prompts: list[Path] | None) -> None:
    """A front for engines that run elsewhere."""
    if find_spec("httpx2") is None:
        raise MissingExtra("--engine needs httpx2, which is not installed: pip install 'softprompt[serve]'.")
    from softprompt.scale.server import OURS, addresses, make_gateway

    if all(kind == OURS for kind, _ in addresses(front.engine)) and (
        prompts or settings.library is not None or settings.base is not None
    ):
        raise RecipeError(
            "--engine: the engines hold base and prompts. Give --base, --library and prompts to them, not to the gateway."
        )
    server = make_gateway(settings, front, prompts or [])
    console = screen()
    heading(console, "serving what the engines serve")
    for peer in server.gateway.peers:
        fact(console, "engine", peer.url)
    fact(console, "API", f"http://{settings.host}:{settings.port}/v1")
    server.run()


def _serve_on_cluster(
    settings: ServeSettings,
    front: GatewaySettings,
    replicas: ReplicaSettings,
    cluster: ClusterSettings,
    prompts: list[Path],
) -> None:
    """Gateways and engines on a cluster."""
    if front.engine:
        raise RecipeError("--on and --engine: found both, wanted one. --on starts its own engines.")
    if find_spec("httpx2") is None:
        raise MissingExtra("--on needs httpx2, which is not installed: pip install 'softprompt[ray]'.")
    from softprompt.scale.ray_server import RayServer

    server = RayServer(
        settings,
        prompts,
        address=str(cluster.cluster),
        **replicas.model_dump(),
        cpus=cluster.worker_cpus,
        gpus=cluster.worker_gpus,
        front=front,
    )
    console = screen()
    with server:
        heading(console, "serving on the cluster")
        most = replicas.max_replicas or replicas.replicas
        upwards = f" to {most}" if most > replicas.replicas else ""
        fact(console, "engines", f"{replicas.replicas}{upwards}, behind {replicas.gateways} gateways")
        fact(console, "page", f"{server.url}/")
        fact(console, "API", f"{server.url}/v1")
        server.wait()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
