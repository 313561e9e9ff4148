"""What a client has had of a stream, and which engine a name leads to: the gateway's decisions without any server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2 as httpx
import pytest

from softprompt.scale import engine_client
from softprompt.scale import peer as peer_module
from softprompt.scale.followed import (
    Differs,
    Failed,
    FollowedChoices,
    FollowedColumns,
    FollowedResponse,
)
from softprompt.scale.gateway import Asked, Gateway
from softprompt.scale.peer import Broken, Model, Peer, Whole
from softprompt.scale.settings import GatewaySettings

STREAM = {"content-type": "text/event-stream", "x-softprompt-digest": "d1"}


def event(text: str = "", ids: list[int] | None = None, finish: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "text": text, "token_ids": ids or [], "finish_reason": finish}
    return json.dumps({"id": "engine's", "created": 1, "model": "x", "choices": [choice]})


def sent(followed: Any, *events: str) -> str:
    """The text that the client gets of an engine's events."""
    records = [
        json.loads(part[6:])
        for each in events
        for part in b"".join(followed.take(each)).decode().split("\n\n")
        if part
    ]
    return "".join(choice["text"] for record in records for choice in record["choices"])


def choices(**changes: Any) -> FollowedChoices:
    return FollowedChoices("support", 1, **{"tells_ids": False, "rated": False, **changes})


def test_another_engine_goes_on_where_the_first_one_stopped() -> None:
    followed = choices()
    followed.begin()
    assert sent(followed, event("Hel", [1, 2]), event("lo", [3])) == "Hello"
    assert followed.body({"seed": 1})["softprompt"] == {"begun": [[1, 2]]}  # the last token is chosen again
    followed.begin()
    # It cuts its pieces otherwise.
    assert sent(followed, event("H", [1]), event("ello th", [2, 3, 4]), event("ere", [5])) == " there"
    assert sent(followed, event("", [6], "stop")) == ""
    assert followed.choices[0].ids == [1, 2, 3, 4, 5, 6]


def test_an_event_is_one_line_also_to_clients_that_break_lines_wherever_unicode_does() -> None:
    text = "a\u2028b\u2029c\x85d"
    followed = choices()
    followed.begin()
    (made,) = followed.take(event(text, [1]))
    line, *rest = made.decode().splitlines()  # breaks at every line separator of Unicode
    assert rest == [""]
    assert json.loads(line[6:])["choices"][0]["text"] == text


def test_a_choice_that_has_ended_is_not_ended_twice() -> None:
    followed = FollowedChoices("m", 2, tells_ids=False, rated=False)
    followed.begin()
    first = [event("a", [1]), event("", [2], "stop"), event("b", [3], index=1)]
    assert sent(followed, *first) == "ab"
    followed.begin()
    again = list(followed.take(event("a", [1]))) + list(followed.take(event("", [2], "stop")))
    assert again == []
    assert sent(followed, event("bc", [3, 4], index=1)) == "c"


@pytest.mark.parametrize(
    "events",
    [
        [event("Hex", [1, 9])],
        [event("Hel", [1, 7])],
        [event("H", [1]), event("", [], "stop")],  # shorter than what the client has had
    ],
)
def test_another_answer_is_never_gone_on_with(events: list[str]) -> None:
    followed = choices()
    followed.begin()
    sent(followed, event("Hel", [1, 2]))
    followed.begin()
    with pytest.raises(Differs):
        sent(followed, *events)


def test_log_probabilities_need_the_whole_answer_again() -> None:
    followed = choices(rated=True)
    followed.begin()
    sent(followed, event("Hel", [1, 2]))
    assert "softprompt" not in followed.body({})
    with pytest.raises(Failed, match="broken"):
        sent(followed, json.dumps({"error": {"message": "broken", "type": "server_error"}}))


def test_columns_and_responses_are_followed_too() -> None:
    columns = FollowedColumns(2)
    columns.begin()
    first = b"".join(columns.take('{"column": 1, "text": "ab"}'))
    columns.begin()
    assert b"".join(columns.take('{"column": 1, "text": "abc"}')) == first.replace(b"ab", b"c")
    response = FollowedResponse("m")
    response.begin()
    one = {"type": "response.output_text.delta", "item_id": "first", "delta": "ab", "sequence_number": 4}
    (event_,) = response.take(json.dumps(one))
    assert b'"sequence_number": 0' in event_
    response.begin()
    (event_,) = response.take(json.dumps({**one, "item_id": "second", "delta": "abc"}))
    assert b'"item_id": "first"' in event_
    assert b'"delta": "c"' in event_
    with pytest.raises(Differs):
        list(response.take(json.dumps({"type": "response.output_text.done", "text": "abX"})))


class Scripted(Peer):
    """An engine that serves given names and plays given events; a Broken among them is raised."""

    def __init__(self, names: dict[str, str], script: list[Any], base: str = "b") -> None:
        super().__init__("http://nowhere")
        records = {"base": "base", **names}
        about = {"engine": "softprompt", "dtype": "float32"}
        self.models = {
            name: Model(name, digest, {"id": name, "softprompt": about}) for name, digest in records.items()
        }
        self.base, self.is_ready, self.script = base, True, script
        self.asked: list[dict[str, Any]] = []

    async def look(self) -> None:
        """Nothing changes."""

    async def stream(self, path: str, body: Any) -> AsyncGenerator[Whole | str, None]:
        self.asked.append(body)
        for each in self.script:
            if isinstance(each, Exception):
                raise each
            yield each


def gateway(*peers: Peer, **settings: Any) -> Gateway:
    return Gateway(peers, GatewaySettings(**{"patience_seconds": 0.0, **settings}))


def streamed(gateway: Gateway, **body: Any) -> list[Any]:
    async def run() -> list[Any]:
        asked = Asked("/v1/completions", {"model": "support", **body}, {"support": "d1"})
        return [each async for each in gateway.streamed(asked, choices())]

    return asyncio.run(run())


def test_a_request_keeps_the_version_that_its_name_meant_when_it_came() -> None:
    """The second engine has switched the name already; it is asked for the version by the name that always means it."""
    first = Scripted({"support": "d1", "support@1": "d1"}, [Broken("dead", was_reached=False)])
    second = Scripted(
        {"support": "d2", "support@1": "d1", "support@2": "d2"},
        [Whole(200, STREAM, b""), event("ok", [1]), event("", [2], "stop"), "[DONE]"],
    )
    front = gateway(first, second)
    head, *events = streamed(front)
    assert isinstance(head, Whole)
    assert (first.asked[0]["model"], second.asked[0]["model"]) == ("support@1", "support@1")
    assert b'"model": "support"' in events[0]
    assert events[-1] == b"data: [DONE]\n\n"


def test_a_name_means_what_most_engines_mean_by_it() -> None:
    new, old = {"support": "d2"}, {"support": "d1"}
    front = gateway(Scripted(old, []), Scripted(new, []), Scripted(new, []))
    model = front.find("support")
    assert model is not None
    assert model.digest == "d2"
    assert front.find("other") is None


def test_engines_of_another_base_get_nothing() -> None:
    front = gateway(Scripted({"a": "d1"}, []), Scripted({"b": "d2"}, [], base="other"))
    asyncio.run(front.look())
    assert [model.name for model in front.models()] == ["base", "a"]
    assert front.peers[1].problem == "serves another base than the engines before it"


def test_a_stream_that_may_not_go_on_ends_with_an_error_in_openais_shape() -> None:
    script = [Whole(200, STREAM, b""), event("ok", [1]), Broken("dead")]
    for settings in ({"resume_streams": False}, {}):
        front = gateway(Scripted({"support": "d1"}, script), **settings)
        *_, last = streamed(front)
        record = json.loads(last.decode().removeprefix("data: "))
        assert (record["error"]["type"], record["error"]["code"]) == ("server_error", "engine_failed")


def test_another_digest_is_not_the_same_answer() -> None:
    dead = Scripted({"support": "d1"}, [Whole(200, STREAM, b""), event("ok", [1]), Broken("dead")])
    other = Scripted(
        {"support": "d1"}, [Whole(200, {**STREAM, "x-softprompt-digest": "d2"}, b""), event("no", [9])]
    )
    *_, last = streamed(gateway(dead, other))
    assert b"engine_failed" in last
    assert b"no" not in last.replace(b"another", b"")


def test_a_request_that_kills_engines_is_given_up() -> None:
    peers = [Scripted({"support": "d1"}, [Broken("killed")]) for _ in range(5)]
    (answer,) = streamed(gateway(*peers))
    assert (answer.status, answer.record["error"]["code"]) == (503, "engines_killed")
    assert sum(len(peer.asked) for peer in peers) == 3


def test_an_engine_that_is_slow_to_answer_a_look_delays_no_other() -> None:
    """The second engine failed a moment ago and is well again, which the next look finds."""

    async def run() -> None:
        slow, well = Scripted({}, []), Scripted({}, [])
        well.is_ready = False
        looks = asyncio.Event()

        async def never() -> None:
            looks.set()
            await asyncio.Event().wait()

        async def finds() -> None:
            await looks.wait()
            well.is_ready = True

        slow.look, well.look = never, finds  # type: ignore[method-assign]
        front = gateway(slow, well)
        looking = asyncio.create_task(front.keep_looking())
        async with asyncio.timeout(60):
            while not well.is_ready:
                await asyncio.sleep(0.01)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    asyncio.run(run())


def test_a_connection_that_was_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be closing it, which looks as if it had died with the request."""
    monkeypatch.setattr(engine_client, "KEPT_SECONDS", 0.1)
    connections: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())  # type: ignore[arg-type]
        while (await reader.readline()).strip():  # a request begins
            while (await reader.readline()).strip():
                pass
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()
        await writer.wait_closed()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        engine = Peer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for _ in range(2):
            assert (await engine.ask("GET", "/")).status == 200
            await asyncio.sleep(0.3)
        await engine.close()
        await asyncio.gather(*connections)
        server.close()
        await server.wait_closed()

    asyncio.run(run())
    assert len(connections) == 2


def test_what_waits_for_an_engine_that_answers_no_probe_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its connection and sends nothing more, as a process does that was stopped."""
    monkeypatch.setattr(peer_module, "PROBE_SECONDS", 0.05)

    class Hangs(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            yield b'data: {"a": 1}\n\n'
            await asyncio.Event().wait()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            await asyncio.Event().wait()
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Hangs())

    async def run() -> None:
        engine = Peer("http://x", transport=httpx.MockTransport(answer), lost_after_seconds=0.1)
        events = engine.stream("/", {})
        assert isinstance(await anext(events), Whole)
        assert await anext(events) == '{"a": 1}'
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.15)
        for _ in range(2):  # the second look finds nothing more to end
            await engine.look()
        with pytest.raises(Broken, match="answers no probe"):
            await waiting
        with pytest.raises(Broken, match="answers no probe"):
            await engine.ask("GET", "/")
        assert engine.running == 0
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("has_begun", [True, False])
def test_patience_begins_when_the_engine_dies_however_long_it_had_the_request(has_begun: bool) -> None:
    """The other engine is there a moment after that, and long after the request came."""
    rest = [Whole(200, STREAM, b""), event("ok", [1]), event("", [2], "stop"), "[DONE]"]
    other = Scripted({"support": "d1"}, rest)
    other.is_ready = False

    class Dies(Scripted):
        async def stream(self, path: str, body: Any) -> AsyncGenerator[Whole | str, None]:
            if has_begun:
                yield rest[0]
                yield rest[1]
            await asyncio.sleep(1.0)
            asyncio.get_running_loop().call_later(0.1, setattr, other, "is_ready", True)
            self.is_ready = False
            raise Broken("dead")

    front = gateway(Dies({"support": "d1"}, []), other, patience_seconds=0.8)
    _, *events = streamed(front)
    assert events[-1] == b"data: [DONE]\n\n"
    assert b"error" not in b"".join(events)
