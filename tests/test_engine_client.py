"""The client of an engine leaves nothing open, whenever the task that asks is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from softprompt.scale import engine_client

IDLE = 4
TURNS = 40  # of the event loop: a request to a server on this machine is sent within them


class Server:
    """Answers every request after a moment, keeps connections open, and counts those that are."""

    def __init__(self) -> None:
        self.open = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.001)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            pass
        finally:
            self.open -= 1
            writer.close()


def test_a_request_that_is_cancelled_at_any_moment_leaves_no_connection_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "KEPT_SECONDS", 0.002)

    async def left_open() -> int:
        counting = Server()
        server = await asyncio.start_server(counting, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for turns in range(TURNS):
            async with engine_client.engine_client(url) as client:
                await asyncio.gather(*(client.get("/") for _ in range(IDLE)))
                await asyncio.sleep(0.005)  # all are past their time; the next request closes them
                asking = asyncio.create_task(client.get("/"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait({asking})
        for _ in range(100):  # until the server has seen them close
            await asyncio.sleep(0.02)
            if not counting.open:
                break
        server.close()
        return counting.open

    assert asyncio.run(left_open()) == 0


def test_a_request_that_is_not_cancelled_is_httpxs_own() -> None:
    async def asked() -> tuple[str, str]:
        server = await asyncio.start_server(Server(), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with engine_client.engine_client(url) as client:
            whole = await client.get("/")
            async with client.stream("GET", "/") as response:
                streamed = (await response.aread()).decode()
        server.close()
        return whole.text, streamed

    assert asyncio.run(asked()) == ("ok", "ok")
