"""A server under everything at once: thousands of requests while clients vanish, names are switched, keys are taken out, the
queue is full and the server is killed with kill -9.

    python tests/soak.py --requests 10000 --kills 2 [--out FILE] [--folder FOR_LOGS]
    python tests/soak.py --requests 10000 --kills 4 --engines 2      # two servers behind a gateway, killed in turn

Every answer is compared with the same request generated alone. A request may be refused or cut off with an error; one that
ends without an answer and without an error is lost. Two kinds of clients vanish: before the answer and during a stream.
Behind a gateway a kill excuses nothing: another engine answers, and a stream that has begun goes on there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import psutil
import torch

from forked import Process as ProcessOfPython
from forked import begun
from softprompt.base.frozen_lm import FrozenLM
from softprompt.inference.compiled import as_deep
from softprompt.inference.generate import generate
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import Prompt, SoftPrompt
from softprompt.serving.keys import sha256_of
from softprompt.store.artifact import save_prompt
from softprompt.store.library import Library
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = ["a", "The quick brown fox", "Tweet: my order never came", "I want you to act as a logistician. " * 3]
MODELS = ["base", "deep", "long", "task", "task", "task", "task@1", "task@2", "task@3"]
AT_ONCE = 30  # clients that have a request under way
MAX_ROWS, MAX_WAITING = 8, 12
RETRIES = 2
SWITCH_SECONDS, KEYS_SECONDS, LOOK_SECONDS = 0.3, 4.0, 1.0
KEYS = ("stays", "goes")
SETTLED_SECONDS = 5.0  # after which a key that was taken out, or put back, counts for certain


@dataclass
class Result:
    """What became of the requests. `wrong` and `lost` are the ones that nothing excuses."""

    counted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    memory: dict[int, list[int]] = field(
        default_factory=dict
    )  # resident bytes of each process, once a second

    def growth(self) -> float:
        """How many times the first quarter's memory the longest-lived server takes in its last quarter (medians)."""
        sizes = max(self.memory.values(), key=len)
        quarter = max(1, len(sizes) // 4)
        early, late = sizes[quarter : 2 * quarter] or sizes, sizes[-quarter:]
        return statistics.median(late) / statistics.median(early)


@dataclass(frozen=True)
class Question:
    """A completion that is asked for, as the settings of generating it alone and as the body of a request."""

    model: str
    text: str
    settings: DecodeSettings

    @classmethod
    def drawn(cls, rng: random.Random, number: int, models: Sequence[str]) -> Question:
        """Any of a few texts under any of `models`, greedy or sampled, once or twice."""
        model, text, n, warm = (
            rng.choice(models),
            rng.choice(TEXTS),
            rng.choice([1, 1, 2]),
            rng.random() < 0.5,
        )
        settings = DecodeSettings(
            max_new_tokens=rng.choice([1, 8, 30]),
            temperature=1.0 if warm else 0.0,
            seed=number % 5,
            n=n if warm else 1,
        )
        return cls(model, text, settings)

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        return {
            "model": self.model,
            "prompt": self.text,
            "max_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "seed": self.settings.seed,
            "n": self.settings.n,
        }

    def texts(self, events: Sequence[str]) -> list[str]:
        """The text of each choice, of the events of a stream that ended in order."""
        pieces: dict[int, str] = dict.fromkeys(range(self.settings.n), "")
        for event in events[:-1]:
            for choice in json.loads(event[6:])["choices"]:
                pieces[choice["index"]] += choice["text"]
        return [pieces[index] for index in sorted(pieces)]


@dataclass(frozen=True)
class Asked:
    """A question that was sent: with which key, and when."""

    question: Question
    key: str
    began: float


class Server:
    """A `softprompt serve` on loopback, which can be killed and started again at the same address."""

    def __init__(self, folder: Path, arguments: list[str], name: str) -> None:
        self.arguments, self.name, self.log = arguments, name, folder / f"{name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: ProcessOfPython | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Return when it takes requests."""
        command = ["-m", "softprompt", "serve", *self.arguments, "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = begun(command, stdout=log, stderr=log, env=environment)
        async with httpx.AsyncClient(timeout=5) as client:
            for _ in range(2400):
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/ready")).status_code == 200:
                        return
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.1)
        raise AssertionError(f"{self.name} does not start")

    def kill(self) -> None:
        """SIGKILL, unless it has ended or was never started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def end(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 60)


class Soak:
    """One run over a library that is made in `folder`."""

    def __init__(self, folder: Path, requests: int, kills: int, seed: int = 0, engines: int = 1) -> None:
        self.folder, self.requests, self.kills = folder, requests, kills
        self.rng = random.Random(seed)
        self.result = Result()
        self._make_library()
        keys = ["--keys", str(folder / "keys.yaml")]
        self.servers = [Server(folder, self._engine(), f"engine-{number}") for number in range(engines)]
        self.door = self.servers[0]
        if engines == 1:
            self.door.arguments += keys
        else:
            urls = ",".join(server.url for server in self.servers)
            self.door = Server(folder, ["--engine", urls, *keys], "gateway")
        self.url = self.door.url
        self.up = asyncio.Event()  # new requests wait for a server that was killed to be there again
        self.done = 0
        self.killed_at: list[float] = []
        self.revoked: tuple[bool, float] = (False, 0.0)
        self.answered: list[tuple[str, Question, list[str]]] = []

    def _make_library(self) -> None:
        model, tokenizer = tiny_model("Llama", max_position_embeddings=512), tiny_tokenizer()
        model.save_pretrained(self.folder / "base")
        tokenizer.save_pretrained(self.folder / "base")
        self.lm = FrozenLM.load(str(self.folder / "base"), dtype="float32", device="cpu")
        self.library = Library(self.folder / "library")
        self.prompts: dict[str, Prompt | None] = {"base": None}
        for seed, name in enumerate(["task", "task", "task", "deep", "long"]):
            length = 140 if name == "long" else 4  # a long one is held once, and shared by its rows
            drawn = torch.Generator().manual_seed(seed)
            vectors = torch.randn(length, self.lm.width, generator=drawn)
            template = f"{{soft:{length}}}{{text}}"
            prompt: Prompt = SoftPrompt(vectors, self.lm.fingerprint, template, name=name)
            save_prompt(as_deep(self.lm, prompt) if name == "deep" else prompt, self.folder / name)
            entry = self.library.publish(self.folder / name, name)
            self.prompts[entry.digest] = prompt  # a deep prompt answers as the one that it was compiled from
        self.names = {f"{entry.name}@{entry.version}": entry.digest for entry in self.library.entries()}
        self._write_keys(KEYS)

    def _write_keys(self, names: tuple[str, ...]) -> None:
        entries = [{"name": name, "sha256": sha256_of(name), "rows": 64} for name in names]
        draft = self.folder / "keys.draft"
        draft.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(draft, self.folder / "keys.yaml")

    @property
    def has_gateway(self) -> bool:
        return self.door not in self.servers

    @property
    def everything(self) -> list[Server]:
        """All processes, the engines first."""
        return [*self.servers, self.door] if self.has_gateway else self.servers

    def _engine(self) -> list[str]:
        arguments = ["--base", str(self.folder / "base"), "--library", str(self.folder / "library")]
        arguments += ["--dtype", "float32", "--device", "cpu"]
        return [*arguments, "--max-rows", str(MAX_ROWS), "--max-waiting", str(MAX_WAITING)]

    async def run(self) -> Result:
        """All of it; the servers are ended by SIGTERM and must exit with 0."""
        for server in self.everything:
            await server.start()
        self.up.set()
        limits = httpx.Limits(max_connections=4 * AT_ONCE)
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
                turns = iter(range(self.requests))
                killing = asyncio.create_task(self._kill())
                disturbing = [asyncio.create_task(each) for each in (self._disturb(), self._watch())]
                disturbing.append(killing)
                try:
                    await asyncio.gather(*(self._clients(client, turns) for _ in range(AT_ONCE)))
                    await killing  # the last one that was killed is there again
                finally:
                    for task in disturbing:
                        task.cancel()
                for task in disturbing:
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                for server in self.servers:
                    await self._settle(server)
            for server in reversed(self.everything):
                assert await server.end() == 0, server.name
        finally:
            for server in self.everything:
                server.kill()
        self._judge()
        return self.result

    async def _clients(self, client: httpx.AsyncClient, turns: Any) -> None:
        for number in turns:
            await self.up.wait()
            await self._ask(client, number)
            self.done += 1

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        rng = self.rng
        question = Question.drawn(rng, number, MODELS)
        key = rng.choice(
            ["stays", "stays", "goes", "unknown"] if rng.random() < 0.1 else ["stays", "stays", "goes"]
        )
        headers = {"authorization": f"Bearer {key}"}
        kind = rng.choice(["whole", "stream", "whole", "stream", "leaves", "leaves a stream"])
        began = time.monotonic()
        asked = Asked(question, key, began)
        try:
            match kind:
                case "whole" | "stream":
                    send = self._whole if kind == "whole" else self._stream
                    for attempt in range(RETRIES + 1):  # as openai's client does by itself
                        refused = await send(client, headers, asked)
                        if refused is None:
                            break
                        self.result.counted["times the queue was full"] += 1
                        if attempt == RETRIES:
                            self.result.counted["refused: the queue was full each time"] += 1
                        await asyncio.sleep(refused * 2**attempt)
                case _:
                    more = {"max_tokens": 100, "ignore_eos": True, "stream": kind != "leaves"}
                    long = {**question.body, **more}
                    # By anyio: a task that asyncio cancels while httpx closes old connections leaves some of them open.
                    with anyio.move_on_after(rng.random() * 0.1):
                        await self._read(client, long, headers)
                    self.result.counted["vanished"] += 1
        except (httpx.HTTPError, OSError) as error:
            # The client sees this error. Nothing but a kill may be its cause.
            near = [at for at in self.killed_at if began <= at <= time.monotonic()]
            if not near or self.has_gateway:
                self.result.lost.append(f"{kind}: {error!r}, {len(near)} kills meanwhile")
            self.result.counted["cut off with an error by a kill"] += 1
            await asyncio.sleep(0.2)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            async for _ in stream.aiter_lines():
                pass

    async def _whole(self, client: httpx.AsyncClient, headers: dict[str, str], asked: Asked) -> float | None:
        """None when it is over; or the seconds after which to try again."""
        answer = await client.post("/v1/completions", json=asked.question.body, headers=headers)
        if answer.status_code == 429:
            return self._again_after(answer)
        if self._is_answer(answer, answer.content, asked):
            texts = [choice["text"] for choice in answer.json()["choices"]]
            self._note(answer, texts, asked)
        return None

    async def _stream(self, client: httpx.AsyncClient, headers: dict[str, str], asked: Asked) -> float | None:
        """None when it is over; or the seconds after which to try again."""
        body = {**asked.question.body, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        if answer.status_code == 429:
            return self._again_after(answer)
        if not self._is_answer(answer, "\n".join(lines).encode(), asked):
            return None
        if any("error" in json.loads(line[6:]) for line in lines if line != "data: [DONE]"):
            self.result.lost.append(f"a stream ended with the error {lines[-1]}")
            return None
        if lines[-1:] != ["data: [DONE]"]:
            self.result.lost.append("a stream ended without its end and without an error")
            return None
        self._note(answer, asked.question.texts(lines), asked)
        return None

    def _again_after(self, answer: httpx.Response) -> float:
        if "retry-after" not in answer.headers:
            self.result.wrong.append("429 without Retry-After")
        return float(answer.headers.get("retry-after-ms", 500)) / 1000

    def _is_answer(self, answer: httpx.Response, content: bytes, asked: Asked) -> bool:
        """Whether it is an answer; a refusal is counted, and must be OpenAI's, and one that was to be expected."""
        key = asked.key
        if answer.status_code == 200:
            is_out, since = self.revoked
            if key == "unknown" or (key == "goes" and is_out and asked.began > since + SETTLED_SECONDS):
                self.result.wrong.append(f"the key {key} was answered")
            return True
        error = json.loads(content)["error"]
        if not {"message", "type", "param", "code"} <= set(error):
            self.result.wrong.append(f"an error is not OpenAI's: {error}")
        if answer.status_code == 401 and key != "stays":
            self.result.counted["refused: the key"] += 1
        else:
            self.result.lost.append(f"{asked.question.model}: {answer.status_code} {error}")
        return False

    def _note(self, answer: httpx.Response, texts: list[str], asked: Asked) -> None:
        model = asked.question.model
        digest = answer.headers["x-softprompt-digest"]
        wanted = {"base": "base", **self.names}.get(model)
        if model in ("deep", "long"):
            wanted = self.names[f"{model}@1"]
        if (wanted is not None and digest != wanted) or digest not in self.prompts:
            self.result.wrong.append(f"{model} was answered by {digest}")
        if model == "task":
            self.result.digests.add(digest)
        self.answered.append((digest, asked.question, texts))
        self.result.counted["answered"] += 1

    async def _disturb(self) -> None:
        """Names are switched, and a key comes and goes."""
        turn, changed = 0, time.monotonic()
        while True:
            await asyncio.sleep(SWITCH_SECONDS)
            turn += 1
            await asyncio.to_thread(self.library.switch, f"task@{1 + turn % 3}")
            if time.monotonic() - changed > KEYS_SECONDS * (1 if self.revoked[0] else 2):
                changed = time.monotonic()
                self.revoked = (not self.revoked[0], changed)
                self._write_keys(KEYS[:1] if self.revoked[0] else KEYS)

    async def _watch(self) -> None:
        """Memory of every process, once a second."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for server in self.everything:
                with contextlib.suppress(psutil.Error):
                    size = psutil.Process(server.pid).memory_info().rss
                    self.result.memory.setdefault(server.pid, []).append(size)

    async def _kill(self) -> None:
        """Kill -9 of each engine in turn, when a part of the requests has been sent, and start it again."""
        for kill in range(self.kills):
            # Early, so that the last server lives long enough to show whether its memory grows.
            while self.done < self.requests * (kill + 1) / (2 * self.kills + 2):
                await asyncio.sleep(0.02)
            server = self.servers[kill % len(self.servers)]
            if not self.has_gateway:
                self.up.clear()
            self.killed_at.append(time.monotonic())
            server.kill()
            await server.start()
            self.up.set()
            self.result.counted["kills"] += 1

    async def _settle(self, server: Server) -> None:
        """When all clients have gone, nothing runs, nothing waits, and no memory is held for rows."""
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for _ in range(600):
                health = (await client.get("/health")).json()
                if (health["running"], health["waiting"], health["kv_bytes"]) == (0, 0, 0):
                    return
                await asyncio.sleep(0.05)
        self.result.lost.append(f"rows are left at {server.name}: {health}")

    def _judge(self) -> None:
        """Compare every answer with the same request alone."""
        alone: dict[tuple[str, str, DecodeSettings], list[str]] = {}
        for digest, question, texts in self.answered:
            key = (digest, question.text, question.settings)
            if key not in alone:
                answers = generate(self.lm, [question.text], self.prompts[digest], question.settings)
                alone[key] = [answer.text for answer in answers]
            if texts != alone[key]:
                self.result.wrong.append(f"{key}: {texts} instead of {alone[key]}")


def soak(folder: Path, requests: int, kills: int, seed: int = 0, engines: int = 1) -> Result:
    """Run it in a folder that is empty."""
    return asyncio.run(Soak(folder, requests, kills, seed, engines).run())


def main() -> None:
    parser = argparse.ArgumentParser(description="A server under everything at once.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--engines", type=int, default=1, help="More than one: behind a gateway.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Keep the servers' logs in this folder, which is made.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(folder, options.requests, options.kills, options.seed, options.engines)
    sizes = max(result.memory.values(), key=len)
    record = {
        "requests": options.requests,
        "engines": options.engines,
        "minutes": round((time.monotonic() - began) / 60, 1),
        **dict(sorted(result.counted.items())),
        "versions that answered for the name that was switched": len(result.digests),
        "wrong": len(result.wrong),
        "lost without an error": len(result.lost),
        "memory, last quarter over second": round(result.growth(), 3),
        "memory, most bytes": max(sizes),
        "memory, seconds watched": len(sizes),
    }
    print(json.dumps(record, indent=1))
    for problem in [*result.wrong, *result.lost][:20]:
        print(problem, file=sys.stderr)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(result.wrong or result.lost))


if __name__ == "__main__":
    main()
