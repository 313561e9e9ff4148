"""One server process: engine, catalogue, keys and application put together, and ended in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.hardware import free_memory_bytes
from softprompt.base.packed_weights import pack_weights
from softprompt.base.processes import demand_alone, joined
from softprompt.serving.app import build_app
from softprompt.serving.catalogue import Catalogue
from softprompt.serving.in_step import EngineInStep
from softprompt.serving.keys import Keys
from softprompt.serving.listener import Listener
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.settings import ServeSettings
from softprompt.store.library import Library


class Server:
    """A server that is ready to run. `run` returns when it was asked to end and its answers have come to theirs."""

    def __init__(
        self, engine: LocalEngine, catalogue: Catalogue, settings: ServeSettings, keys: Keys
    ) -> None:
        self.engine, self.catalogue, self.settings = engine, catalogue, settings
        self.app = build_app(engine, catalogue, keys, strict=settings.strict)
        self.listener = Listener(self.app, settings.host, settings.port, self.drain)

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM; running answers are finished first. Raises SaveError where the port is taken."""
        self.engine.start()
        try:
            self.listener.listen()
        finally:
            self.app.state.service.is_ready = False
            self.engine.stop(0)

    def drain(self) -> None:
        """Takes nothing new, finishes what runs within the grace period, then cuts it with an error."""
        self.app.state.service.is_ready = False
        self.engine.stop(self.settings.grace_seconds)


def make_server(lm: FrozenLM, settings: ServeSettings, prompts: Sequence[Path] = ()) -> Server:
    """Loads everything that is served. Raises the errors of softprompt.errors before anything listens.

    Where several processes hold the base in parts, the first one makes the server and the others the engine alone, which
    follows."""
    keys = Keys.load(settings.keys)
    engine = make_engine(lm, settings)
    catalogue = Catalogue(engine, None if settings.library is None else Library(settings.library))
    for folder in prompts:
        catalogue.add(folder)
    return Server(engine, catalogue, settings, keys)


def make_engine(lm: FrozenLM, settings: ServeSettings) -> LocalEngine:
    """The engine of this process; an EngineInStep where several processes hold the base in parts."""
    pack_weights(lm)  # before the free memory is looked at
    memory = (
        free_memory_bytes(lm.device) // 2
        if settings.memory_gigabytes is None
        else round(settings.memory_gigabytes * 10**9)
    )
    if not lm.is_split:
        demand_alone("serve")
        return LocalEngine(
            lm, max_rows=settings.max_rows, max_waiting=settings.max_waiting, memory_bytes=memory
        )
    processes = joined()
    # What a process has free must not decide what fits: all take the same turns.
    memory = processes.same(memory)
    return EngineInStep(
        lm,
        processes,
        max_rows=settings.max_rows,
        max_waiting=settings.max_waiting,
        memory_bytes=memory,
    )
