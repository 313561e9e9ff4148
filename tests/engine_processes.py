"""Servers as processes of their own on loopback, to be killed, and a gateway before them in a thread."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2 as httpx
import uvicorn

from forked import begun
from softprompt.scale.gateway import Gateway
from softprompt.scale.gateway_app import build_gateway
from softprompt.scale.peer import Peer
from softprompt.scale.settings import GatewaySettings
from softprompt.serving.keys import Keys


def free_port() -> int:
    """A port of loopback that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A `softprompt` command that listens on loopback."""

    def __init__(self, arguments: Sequence[str], log: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("ab") as output:
            command = ["-m", "softprompt", *arguments, "--port", str(self.port)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = begun(command, stdout=output, stderr=output, env=environment)

    def wait_ready(self) -> None:
        """Return when it takes requests."""
        for _ in range(2400):
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """SIGKILL: nothing is said, nothing is finished."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Front:
    """A gateway on loopback, in a thread."""

    def __init__(self, urls: Sequence[str], keys: Keys | None = None, **settings: object) -> None:
        front = GatewaySettings(engine=tuple(urls), **settings)  # type: ignore[arg-type]
        peers = [Peer(url, lost_after_seconds=front.lost_after_seconds) for url in urls]
        self._listen(Gateway(peers, front), keys)

    @classmethod
    def of(cls, gateway: Gateway) -> Front:
        """A gateway that is put together already."""
        front = cls.__new__(cls)
        front._listen(gateway, None)
        return front

    def _listen(self, gateway: Gateway, keys: Keys | None) -> None:
        self.gateway = gateway
        app = build_gateway(gateway, keys)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def count(self, name: str, **labels: str) -> float:
        """A counter of its metrics."""
        return self.gateway.registry.get_sample_value(f"softprompt_gateway_{name}_total", labels) or 0.0

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
