"""What each process does in test_in_step.py: an engine over a base in parts, or in one, and every kind of request."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import joined
from softprompt.errors import DataError
from softprompt.inference.settings import DecodeSettings
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.serving.engine import Finished, PromptGone, Work
from softprompt.serving.in_step import EngineInStep
from softprompt.serving.local_engine import LocalEngine
from softprompt.serving.steering import Grammars, Penalties, Steers

LONG = "I want you to act as a logistician. Tweet: thank you for the quick help. Complaint? no complaint. "


def prompt_of(lm: FrozenLM, seed: int) -> SoftPrompt:
    drawn = torch.Generator().manual_seed(seed)
    vectors_PD = torch.randn(4, lm.width, generator=drawn)
    return SoftPrompt(vectors_PD, lm.fingerprint, "{soft:4}{text}", name=str(seed))


def works() -> dict[str, Work]:
    greedy = DecodeSettings(max_new_tokens=8, ignore_end=True)
    return {
        "base": Work(None, "The quick brown fox", greedy),
        "first prompt": Work("0", "Tweet: my order never came", greedy),
        "second prompt": Work("1", "Tweet: my order never came", greedy, top=2),
        "long": Work("1", LONG, greedy),
        "drawn": Work("0", "I want", DecodeSettings(max_new_tokens=6, temperature=1.0, seed=5, n=2)),
        "stopped": Work(None, "a", DecodeSettings(max_new_tokens=30, stop=["e", "o"])),
        "penalised": Work("0", "a", greedy.model_copy(update={"repetition_penalty": 1.5})),
        "chosen": Work(
            "1", "b", greedy, steer=Steers("b", Penalties(), (" complaint", " order"), None, Grammars())
        ),
        "counted": Work("1", "c", greedy, steer=Steers("c", Penalties(2.0, 1.0), (), None, Grammars())),
    }


async def answered(engine: LocalEngine, work: Work) -> list[dict[str, Any]]:
    return [asdict(answer) async for answer in engine.submit(work) if isinstance(answer, Finished)]


async def asked_of(engine: LocalEngine) -> dict[str, Any]:
    """All requests at once, and some that end early, fail, or come late."""
    running = {name: asyncio.create_task(answered(engine, work)) for name, work in works().items()}
    cut = Work("0", "cut", DecodeSettings(max_new_tokens=90, ignore_end=True))
    gone = Work("1", "gone", DecodeSettings(max_new_tokens=90, ignore_end=True))
    ending = asyncio.create_task(answered(engine, cut))
    leaving = asyncio.create_task(answered(engine, gone))
    rated = await engine.score("0", "Tweet: my order", " never came", 2)
    leaving.cancel()
    engine.cancel(cut)
    results = {name: await task for name, task in running.items()}
    try:
        await answered(engine, Work(None, LONG * 9, DecodeSettings()))
    except DataError as error:
        results["too long"] = [{"error": str(error)}]
    engine.unload("0")
    try:
        await answered(engine, works()["first prompt"])
    except PromptGone:
        results["unloaded"] = []
    engine.load(prompt_of(engine.lm, 0), "0")
    results["loaded again"] = await answered(engine, works()["first prompt"])
    results["rated"] = [asdict(token) for token in rated]
    assert [answer["reason"] for answer in await ending] == ["cancelled"]
    while not engine.is_idle:
        await asyncio.sleep(0.01)
    return results


LIMITS: dict[str, Any] = {"max_rows": 4, "read_beside": 16}


def answers_of(engine: LocalEngine) -> dict[str, Any]:
    """The answers of an engine to all of this, as JSON gives them back."""
    for seed in (0, 1):
        engine.load(prompt_of(engine.lm, seed), str(seed))
    with engine:
        results = json.loads(json.dumps(asyncio.run(asked_of(engine))))
    assert isinstance(results, dict)
    return results


def main(folder: str, spread: Any) -> None:
    lm = FrozenLM.load(folder, dtype="float32", device="cpu", spread=spread)
    processes = joined()
    engine = EngineInStep(lm, processes, **LIMITS)
    if processes.first:
        print(json.dumps(answers_of(engine)))
        return
    engine.follow()
    assert engine.is_idle
    print(json.dumps("followed"))


if __name__ == "__main__":
    main(*sys.argv[1:])
