"""A server on a Ray cluster of several nodes: engines, gateways and nodes are killed under load, and no answer is lost or
another one. Needs Ray, as test_ray.py does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest

pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'softprompt[ray]'")

from engine_processes import Process, free_port
from ray_nodes import Nodes
from softprompt.errors import ClusterError, SaveError, SoftPromptError
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.scale.ray_server import APPLICATION, RayServer
from softprompt.serving.settings import ServeSettings
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from test_gateway import TEXTS, base_of, prompts_of, streamed
from test_gateway import house as house
from test_learn import lm_of
from test_serving import prompt_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own
NEW_TOKENS = 40
PATH = "/v1/completions"
Wanted = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def server(house: Path, ray_cluster: Nodes) -> Iterator[Process]:
    """The command: one engine, two while requests wait, and two gateways."""
    arguments = [
        "serve",
        "--base",
        str(house / "base"),
        "--dtype",
        "float32",
        "--library",
        str(house / "library"),
    ]
    more = ["--max-rows", "8", "--patience-seconds", "120", "--on", "ray", "--max-replicas", "2"]
    started = Process([*arguments, *more], house / "on-ray.log")
    started.wait_ready()
    yield started
    if started.process.poll() is None:
        started.end()


@pytest.fixture
def url(server: Process) -> str:
    return server.url


@pytest.fixture(scope="module")
def wanted(house: Path) -> Wanted:
    """What generation alone gives for every model and text."""
    lm = base_of(house)
    prompts = {"base": None, **prompts_of(lm)}
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, ignore_end=True)
    return {
        (name, text): generate(lm, text, prompt, settings, progress=False)[0].text
        for name, prompt in prompts.items()
        for text in TEXTS
    }


def replicas(name: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas, on the nodes that this process started."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if line.startswith("ray::ServeReplica") and f":{name}" in line:
                processes.append(process)
    return processes


def until_two(name: str) -> None:
    """Returns when two replicas serve."""
    from ray import serve

    until = time.monotonic() + 180
    while time.monotonic() < until:
        states = serve.status().applications[APPLICATION].deployments[name].replica_states
        if states.get("RUNNING", 0) == 2 == len(replicas(name)):
            return
        time.sleep(0.2)
    raise AssertionError(f"{name}: {states}, {replicas(name)}")


async def under_load(
    url: str, wanted: Wanted, kill: Callable[[], None], *, again: bool = False, rounds: int = 4
) -> int:
    """Puts every request, whole and streamed, several times; `kill` runs when ten are answered. Every answer must be the
    wanted one. With `again` a request is put again where its connection breaks or a bare 5xx comes, as OpenAI's client
    does before a stream has begun; how often that was."""
    repeated = answered = 0

    async def ask(client: httpx.AsyncClient, model: str, text: str, stream: bool) -> None:
        nonlocal repeated, answered
        body = {"model": model, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0}
        for _ in range(100):
            try:
                if stream:
                    answer = (await streamed(client, PATH, {**body, "ignore_eos": True}))[0]
                else:
                    response = await client.post(PATH, json={**body, "ignore_eos": True})
                    assert response.status_code == 200, (response.status_code, response.text)
                    answer = response.json()["choices"][0]["text"]
            except (httpx.HTTPError, AssertionError):
                if not again:
                    raise
                repeated += 1
                await asyncio.sleep(0.5)
                continue
            assert answer == wanted[model, text], (model, text)
            answered += 1
            return
        raise AssertionError("lost")

    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as client:
        tasks = [
            asyncio.create_task(ask(client, model, text, stream))
            for _ in range(rounds)
            for model, text in wanted
            for stream in (False, True)
        ]
        while answered < 10:
            await asyncio.sleep(0.01)
            assert not any(task.done() and task.exception() for task in tasks)
        await asyncio.to_thread(kill)
        assert not all(task.done() for task in tasks)
        await asyncio.gather(*tasks)
    assert answered == len(tasks)
    return repeated


def killing(name: str) -> Callable[[], None]:
    return lambda: os.kill(replicas(name)[0].pid, signal.SIGKILL)


def test_an_engine_is_added_while_requests_wait(url: str, wanted: Wanted) -> None:
    """More requests than the eight rows of the first engine, until the second one serves."""
    assert len(replicas("engines")) == 1

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            waiting = asyncio.create_task(asyncio.to_thread(until_two, "engines"))
            while not waiting.done():
                body = {"model": "soft", "prompt": TEXTS[1], "max_tokens": NEW_TOKENS, "temperature": 0}
                asked = [client.post(PATH, json={**body, "ignore_eos": True}) for _ in range(24)]
                for answer in await asyncio.gather(*asked):
                    assert answer.json()["choices"][0]["text"] == wanted["soft", TEXTS[1]]
            await waiting

    asyncio.run(crowd())


def test_a_killed_engine_loses_no_request_and_no_stream(url: str, wanted: Wanted) -> None:
    """No client asks again here: the gateways do."""
    until_two("engines")
    asyncio.run(under_load(url, wanted, killing("engines")))


def test_a_killed_gateway_loses_nothing_for_clients_that_ask_again(url: str, wanted: Wanted) -> None:
    """Its connections break, which no server can mend."""
    assert len(replicas("gateways")) == 2
    assert asyncio.run(under_load(url, wanted, killing("gateways"), again=True)) > 0


def test_a_killed_node_loses_nothing_for_clients_that_ask_again(
    url: str, wanted: Wanted, ray_cluster: Nodes
) -> None:
    """A node with an engine on it, and perhaps with a gateway and with the proxy that holds the connections."""
    until_two("engines")
    until_two("gateways")
    raylets = {process.ppid() for process in replicas("engines")}
    node = next(each for each in ray_cluster.workers if raylet_of(each) in raylets)
    asyncio.run(under_load(url, wanted, lambda: ray_cluster.kill(node), again=True))
    until_two("engines")
    ray_cluster.add()


def raylet_of(node: Any) -> int:
    """The process that starts the workers of a node."""
    return int(node.all_processes["raylet"][0].process.pid)


def test_an_answer_is_of_the_version_that_its_name_meant(url: str, house: Path) -> None:
    """While a name is switched, an answer is whole of one version, and says which. A fixed version stays."""
    lm = base_of(house)
    save_prompt(prompt_of(lm, 77, "soft"), house / "runs" / "new" / "soft")
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, ignore_end=True)
    texts: dict[str, set[str]] = {}

    async def ask(client: httpx.AsyncClient, model: str) -> str:
        body = {"model": model, "prompt": TEXTS[1], "max_tokens": NEW_TOKENS, "temperature": 0}
        response = await client.post(PATH, json={**body, "ignore_eos": True})
        assert response.status_code == 200, response.text
        digest = response.headers["x-softprompt-digest"]
        texts.setdefault(digest, set()).add(response.json()["choices"][0]["text"])
        return digest

    async def switch() -> tuple[str, str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            former = await ask(client, "soft")
            Library(house / "library").publish(house / "runs" / "new" / "soft", "soft")
            until = time.monotonic() + 60
            while time.monotonic() < until:
                digests = set(await asyncio.gather(*(ask(client, "soft") for _ in range(8))))
                if former not in digests:
                    break
            assert await ask(client, "soft@1") == former
            (new,) = digests
            return former, new

    former, new = asyncio.run(switch())
    alone = generate(lm, TEXTS[1], house / "runs" / "new" / "soft", settings, progress=False)[0].text
    before = generate(lm, TEXTS[1], prompts_of(lm)["soft"], settings, progress=False)[0].text
    assert texts == {former: {before}, new: {alone}}
    Library(house / "library").switch("soft@1")


def test_a_client_that_hangs_up_leaves_no_work_behind(url: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("engines", APPLICATION).options(method_name="answer", stream=True)

    def running() -> int:
        """Rows at the engine that has most: of several probes at once, each engine gets some."""
        probes = [handle.remote("GET", "/health", [], b"") for _ in range(8)]
        return max(int(json.loads(b"".join([*probe][2:]))["running"]) for probe in probes)

    body = {"model": "base", "prompt": "a", "max_tokens": 490, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=120) as client:
        with client.stream("POST", PATH, json=body) as answer:
            lines = answer.iter_lines()  # kept: without it the client hangs up already
            next(lines)
            assert running()
        hung_up = time.monotonic()
        while running():
            assert time.monotonic() < hung_up + 60


def test_refusals_are_those_of_any_server(url: str, house: Path) -> None:
    refused = httpx.post(url + PATH, json={"model": "sofd", "prompt": "a"}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    listed = [each["id"] for each in httpx.get(url + "/v1/models", timeout=60).json()["data"]]
    assert {"base", "soft", "soft@1", "deep"} <= set(listed)
    with pytest.raises(ClusterError, match="This cluster serves prompts already"):
        RayServer(settings_of(house)).__enter__()
    with pytest.raises(ClusterError, match="found room for 3 engines of 1 CPUs and 0 GPUs, wanted 4"):
        RayServer(settings_of(house), replicas=4).__enter__()


def settings_of(house: Path) -> ServeSettings:
    return ServeSettings(base=str(house / "base"), dtype="float32", port=free_port())


def test_a_signal_ends_the_server_when_running_answers_have_ended(server: Process, house: Path) -> None:
    """Seen by OpenAI's client."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    longest = DecodeSettings(max_new_tokens=200, ignore_end=True)
    lm = base_of(house)
    wanted = generate(lm, TEXTS[1], prompts_of(lm)["deep"], longest, progress=False)[0].text
    begun = 0

    async def ask() -> str:
        nonlocal begun
        given: dict[str, Any] = {"model": "deep", "prompt": TEXTS[1], "max_tokens": 200, "temperature": 0}
        stream = await client.completions.create(**given, extra_body={"ignore_eos": True}, stream=True)
        text = (await anext(stream)).choices[0].text
        begun += 1
        return text + "".join([chunk.choices[0].text async for chunk in stream])

    async def ended() -> list[str]:
        asked = [asyncio.create_task(ask()) for _ in range(8)]
        while begun < 8:
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in asked)
        server.process.send_signal(signal.SIGTERM)
        texts = await asyncio.gather(*asked)
        await client.close()
        return texts

    assert asyncio.run(ended()) == [wanted] * 8
    assert server.process.wait(60) == 0
    assert not replicas("engines")


def test_what_an_engine_cannot_load_is_said_in_one_line(
    house: Path, tmp_path: Path, ray_cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error, not Serve's; what can be known without a cluster is said before anything starts."""
    with pytest.raises(SoftPromptError, match="nowhere"):
        RayServer(ServeSettings(base=str(tmp_path / "nowhere"), port=free_port())).__enter__()
    held = socket.create_server(("127.0.0.1", 0))
    with held, pytest.raises(SaveError, match="cannot be listened on"):
        RayServer(settings_of(house).model_copy(update={"port": held.getsockname()[1]})).__enter__()
    save_prompt(prompt_of(lm_of("Qwen2"), 3, "other"), tmp_path / "other")
    monkeypatch.setattr("softprompt.scale.ray_server.STARTS", 1)
    with pytest.raises(
        ClusterError, match=r"^The server did not start on the cluster: .*learned on .*but the loaded base"
    ):
        RayServer(settings_of(house), [tmp_path / "other"], gateways=1).__enter__()
