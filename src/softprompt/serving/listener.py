"""Listening on an address until a signal ends it in order: probes are answered while what runs comes to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from softprompt.errors import SaveError


class Listener(uvicorn.Server):
    """Serves an application. It goes on listening while it ends, so that probes and new requests are answered with 503,
    not with silence: the first signal runs `drain` in a thread and then ends, the second one ends at once."""

    def __init__(self, app: ASGIApp, host: str, port: int, drain: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=5,  # the answers have ended by then, and only have to be sent
        )
        super().__init__(config)
        self._drain = drain
        self._is_draining = False

    def listen(self) -> None:
        """Serves until SIGINT or SIGTERM. Raises SaveError where the port is taken."""
        try:
            self.run()
        except SystemExit as error:  # uvicorn's way to say that it cannot listen
            raise SaveError(
                f"{self.config.host}:{self.config.port}: cannot be listened on; another program may hold it. "
                "Choose another --port."
            ) from error

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: end in order. Second one: at once."""
        if self._is_draining:
            self.force_exit = self.should_exit = True
            return
        self._is_draining = True
        threading.Thread(target=self._end, name="softprompt-drain", daemon=True).start()

    def _end(self) -> None:
        try:
            self._drain()
        finally:
            self.should_exit = True
