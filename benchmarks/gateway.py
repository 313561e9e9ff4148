"""What a gateway before an engine costs: CPU seconds of both processes, with clients at the engine itself and at the gateway.

    python benchmarks/gateway.py --base FOLDER --clients 64

Clients stream greedy answers all at once. Rounds take turns; the clients are in this process, whose own CPU does not count.
Tokens a second mean something where nothing else runs: engine, gateway and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import httpx2 as httpx
import psutil

from machine import describe
from serving_steps import texts_of

HERE = Path(__file__).resolve().parent


def start(arguments: list[str], port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "softprompt", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        assert process.poll() is None, arguments
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return process
        except httpx.HTTPError:
            time.sleep(0.2)


def cpu_of(process: subprocess.Popen[bytes]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


async def ask_all(port: int, clients: int, new: int) -> int:
    """The number of answers that came whole."""
    limits = httpx.Limits(max_connections=2 * clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=900, limits=limits) as client:

        async def ask(text: str) -> bool:
            body = {"model": "base", "prompt": text, "max_tokens": new, "temperature": 0}
            lines: list[str] = []
            more = {"ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json={**body, **more}) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            return lines[-1] == "data: [DONE]"

        return sum(await asyncio.gather(*(ask(text) for text in texts_of(clients))))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a gateway costs.")
    parser.add_argument("--base", required=True, help="A base's folder.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=18230)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    limits = ["--max-rows", str(asked.clients), "--max-waiting", str(2 * asked.clients)]
    engine = start(["--base", asked.base, "--dtype", "bfloat16", "--device", "cpu", *limits], asked.port)
    gateway = start(["--engine", f"http://127.0.0.1:{asked.port}"], asked.port + 1)
    rounds: list[dict[str, Any]] = []
    load = os.getloadavg()
    try:
        asyncio.run(ask_all(asked.port + 1, 2, 2))
        for turn in range(asked.rounds):
            for way in ("engine", "gateway")[:: 1 if turn % 2 else -1]:
                before = cpu_of(engine), cpu_of(gateway)
                port = asked.port + (way == "gateway")
                began = time.perf_counter()
                assert asyncio.run(ask_all(port, asked.clients, asked.new)) == asked.clients
                seconds = time.perf_counter() - began
                spent = cpu_of(engine) - before[0], cpu_of(gateway) - before[1]
                rounds.append(
                    {
                        "way": way,
                        "engine_cpu_seconds": spent[0],
                        "gateway_cpu_seconds": spent[1],
                        "tokens_a_second": asked.clients * asked.new / seconds,
                    }
                )
                print(rounds[-1], flush=True)
    finally:
        for process in (gateway, engine):
            process.terminate()
            process.wait()
    through = [each for each in rounds if each["way"] == "gateway"]
    direct = [each["engine_cpu_seconds"] for each in rounds if each["way"] == "engine"]
    both = [each["engine_cpu_seconds"] + each["gateway_cpu_seconds"] for each in through]
    speed = {
        way: statistics.median(each["tokens_a_second"] for each in rounds if each["way"] == way)
        for way in ("engine", "gateway")
    }
    results = {
        "rounds": rounds,
        "tokens_a_second_against_the_engine_alone": round(speed["gateway"] / speed["engine"], 3),
        "gateway_cpu_milliseconds_a_token": round(
            1000
            * statistics.median(each["gateway_cpu_seconds"] for each in through)
            / (asked.clients * asked.new),
            3,
        ),
        "tokens_a_cpu_second_against_the_engine_alone": round(
            statistics.median(direct) / statistics.median(both), 3
        ),
    }
    print(results)
    settings = {"base": Path(asked.base).name, "clients": asked.clients, "new_tokens": asked.new}
    settings |= {"load_average_at_the_start": [round(value, 1) for value in load]}
    out = asked.out or HERE / "gateway.json"
    out.write_text(json.dumps({**describe(), "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
