"""What of a server on a cluster needs no Ray: settings that are refused, and all engines seen as one by a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2 as httpx
import pytest

from softprompt.cli.app import main
from softprompt.errors import RecipeError
from softprompt.scale.ray_replicas import Engines
from softprompt.scale.ray_server import RayServer
from softprompt.scale.settings import ReplicaSettings
from softprompt.serving.settings import ServeSettings

LISTED = {"data": [{"id": "base", "root": "tiny", "softprompt": {"base_sha256": "ab"}}]}


class Handle:
    """Takes the place of Ray Serve's handle, and is never called."""

    def options(self, **options: Any) -> Handle:
        return self


def test_one_probe_that_fails_stops_no_gateway_and_ten_seconds_of_them_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve may have sent a probe to the engine that just died, while the others work."""
    now, works = [1000.0], [True]
    monkeypatch.setattr("softprompt.scale.peer.time.monotonic", lambda: now[0])

    def answer(request: httpx.Request) -> httpx.Response:
        if not works[0]:
            raise httpx.ReadError("the actor died")
        return httpx.Response(200, json=LISTED if request.url.path == "/v1/models" else {"ready": True})

    async def looks(moments: Sequence[tuple[float, bool]]) -> list[bool]:
        engines = Engines(Handle(), lost_after_seconds=10.0)
        await engines._client.aclose()
        engines._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://engines")
        ready = []
        for moment, is_well in moments:
            now[0], works[0] = 1000.0 + moment, is_well
            await engines.look()
            ready.append(engines.is_ready)
        engines.failed("an engine died over a request")
        ready.append(engines.is_ready)
        await engines.close()
        return ready

    assert asyncio.run(looks([(0, False)]))[0] is False  # none was ever there
    found = asyncio.run(looks([(0, True), (1, False), (9, False), (11, False), (12, True)]))
    assert found == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "2"], "Add --on ray"),
        (["--on", "ray", "--replicas", "3", "--max-replicas", "2"], "wanted at least replicas (3)"),
        (["--on", "ray", "--engine", "http://127.0.0.1:1"], "--on and --engine"),
        (["--on", "rays"], "--on"),
        (["--on", "ray", "--replicas", "0"], "--replicas"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--base", "builtin", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_no_replica_could_do_is_refused_in_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.scale.ray_server.demand_ray", lambda: None)
    with pytest.raises(RecipeError, match="an engine on a cluster is one process"):
        RayServer(ServeSettings(spread="tensor"))
    with pytest.raises(RecipeError, match="found 0, wanted a port"):
        RayServer(ServeSettings(port=0))
    with pytest.raises(RecipeError, match="wanted at least replicas"):
        RayServer(ServeSettings(), replicas=2, max_replicas=1)
    assert ReplicaSettings().gateways == 2
