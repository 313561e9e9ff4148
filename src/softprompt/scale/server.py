"""One gateway process: engines, keys and application put together, and ended in order."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from softprompt.base.outline import Outline
from softprompt.errors import RecipeError
from softprompt.scale.app_transport import AppTransport
from softprompt.scale.gateway import Gateway
from softprompt.scale.gateway_app import build_gateway
from softprompt.scale.llama_engine import LlamaEngine
from softprompt.scale.peer import Peer
from softprompt.scale.remote_engine import RemoteEngine
from softprompt.scale.settings import GatewaySettings
from softprompt.scale.vllm_engine import VllmEngine
from softprompt.serving.app import build_app
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.keys import Keys
from softprompt.serving.listener import Listener
from softprompt.serving.settings import ServeSettings
from softprompt.store.library import Library

KEY_VARIABLE = "SOFTPROMPT_ENGINE_KEY"
"""Environment variable of the key that engines want of the gateway; a flag would be seen in the list of processes."""


OURS = "softprompt"
ENGINES: dict[str, type[RemoteEngine]] = {"vllm": VllmEngine, "llama": LlamaEngine}


class GatewayServer:
    """A gateway that is ready to run. `run` returns when it was asked to end and its answers have come to theirs."""

    def __init__(self, gateway: Gateway, keys: Keys, settings: ServeSettings) -> None:
        self.gateway, self.settings = gateway, settings
        self.app = build_gateway(gateway, keys)
        self.listener = Listener(self.app, settings.host, settings.port, self.drain)

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM; running answers are finished first. Raises SaveError where the port is taken."""
        self.listener.listen()

    def drain(self) -> None:
        """Takes nothing new, and gives what runs the grace to end."""
        self.app.state.ready["ready"] = False
        deadline = time.monotonic() + self.settings.grace_seconds
        # Not the engines' counts: a request whose engine has died is with none until another one takes it.
        while not self.app.state.rows.is_empty and time.monotonic() < deadline:
            time.sleep(0.05)


def make_gateway(
    settings: ServeSettings, front: GatewaySettings, prompts: Sequence[Path] = ()
) -> GatewayServer:
    """Puts a gateway together. Raises RecipeError for an engine's address that is none, and what loading raises."""
    places = addresses(front.engine)
    key = os.environ.get(KEY_VARIABLE)
    peers: list[Peer] = []
    outline: Outline | None = None
    for number, (kind, url) in enumerate(places):
        if kind == OURS:
            peers.append(Peer(url, key=key, lost_after_seconds=front.lost_after_seconds))
            continue
        if front.states is None or not Path(front.states).expanduser().is_dir():
            raise RecipeError(
                f"--states: found {front.states}, wanted the folder of prompts that were exported for {kind}."
            )
        outline = outline or Outline.load(
            settings.base or "builtin",
            revision=settings.base_revision,
            trust_remote_code=settings.trust_remote_code,
        )
        engine = ENGINES[kind](url, outline, _dtype(settings, outline), Path(front.states).expanduser())
        peers.append(_adapted(engine, settings, prompts, f"http://{kind}-{number}", front.lost_after_seconds))
    return GatewayServer(Gateway(peers, front), Keys.load(settings.keys), settings)


def _adapted(
    engine: RemoteEngine,
    settings: ServeSettings,
    prompts: Sequence[Path],
    name: str,
    lost_after_seconds: float,
) -> Peer:
    """An engine of others as a peer: our own server over it, in this process."""
    catalogue = Catalogue(engine, None if settings.library is None else Library(settings.library))
    for folder in prompts:
        catalogue.add(folder)
    app = build_app(engine, catalogue, strict=settings.strict)
    stamp: list[int] = [0]

    async def look() -> None:
        await engine.look()
        files = engine.states.stat().st_mtime_ns
        again, stamp[0] = files != stamp[0], files
        await asyncio.to_thread(
            catalogue.refresh, again=again
        )  # a prompt whose file has come is served from now on

    return Peer(
        name, transport=AppTransport(app, look), lost_after_seconds=lost_after_seconds, closing=engine.close
    )


def _dtype(settings: ServeSettings, outline: Outline) -> str:
    """The dtype that an engine of others is said to have: as --dtype says, or as its base is stored."""
    if settings.dtype != "auto":
        return str(settings.dtype)
    stored = getattr(outline.config, "dtype", None)
    return str(stored).removeprefix("torch.") if stored is not None else "float32"


def addresses(engines: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and address of each engine, several of which may be given as one text with commas. Raises RecipeError."""
    places: list[tuple[str, str]] = []
    for engine in (each.strip() for several in engines for each in several.split(",") if each.strip()):
        kind, equals, url = engine.partition("=")
        kind, url = (kind, url) if equals and kind in ENGINES else (OURS, engine)
        url = url.rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
            raise RecipeError(
                f"--engine {engine}: wanted http://HOST:PORT of another `softprompt serve`, {', '.join(f'{kind}=http://HOST:PORT' for kind in ENGINES)}; "
                "several with commas between them."
            )
        if url in (address for _, address in places):
            raise RecipeError(f"--engine {engine}: is given twice. Give each engine once.")
        places.append((kind, url))
    return places
