"""How many prompts and replicas: what a prompt takes, what a library of N costs to read, and what a replica's cache keeps.

    python benchmarks/capacity.py --out benchmarks/capacity.json     # about two minutes
    python benchmarks/capacity.py --most 1000000                     # with a library of a million names (some GB of memory)

Sizes follow from the shape of a base. Costs of a library are measured: an index of N names is written, read and searched
with softprompt's own Library, in CPU seconds. Hits of a replica's cache of compiled prompts are computed with the approximation of
Che et al. (2002) for a cache that drops the least recently used, under Zipf's law, and simulated for the smaller cases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from machine import describe
from softprompt.prompt.soft_prompt import Fingerprint, SoftPrompt
from softprompt.serving.held_prompts import COMPILED_BYTES
from softprompt.store.library import INDEX, Library

VIRTUAL_TOKENS = 20
ZIPF = 1.0  # the second prompt gets half of the first one's requests, the third a third
SIMULATED_REQUESTS = 200_000
MOST_SIMULATED = 100_000  # prompts


@dataclass(frozen=True)
class Shape:
    """What of a base's shape decides a prompt's size."""

    width: int
    layers: int
    key_value_heads: int
    head_width: int

    @property
    def vectors_bytes(self) -> int:
        """A soft prompt on disk: P x D numbers in float32."""
        return VIRTUAL_TOKENS * self.width * 4

    @property
    def compiled_bytes(self) -> int:
        """A prompt in an engine: P keys and values for every layer and head, in bfloat16."""
        return VIRTUAL_TOKENS * 2 * self.layers * self.key_value_heads * self.head_width * 2


SHAPES = {
    "SmolLM2-135M": Shape(width=576, layers=30, key_value_heads=3, head_width=64),
    "Llama-3-8B": Shape(width=4096, layers=32, key_value_heads=8, head_width=128),
    "Llama-3-70B": Shape(width=8192, layers=80, key_value_heads=8, head_width=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=100_000, help="names of the largest library")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    counts = [count for count in (10, 100, 1_000, 10_000, 100_000, 1_000_000) if count <= given.most]
    results: dict[str, Any] = {
        "prompt": {
            name: {"vectors_bytes": shape.vectors_bytes, "compiled_bytes": shape.compiled_bytes}
            for name, shape in SHAPES.items()
        },
        "library": {count: show(count, library_costs(count)) for count in counts},
        "load_one_prompt_cpu_seconds": load_seconds(),
        "cache": {
            name: {
                count: cache_hits(count, COMPILED_BYTES // shape.compiled_bytes)
                for count in (100, 1_000, 10_000, 100_000, 1_000_000)
            }
            for name, shape in SHAPES.items()
        },
    }
    print(json.dumps(results, indent=1))
    if given.out:
        settings = {"virtual_tokens": VIRTUAL_TOKENS, "zipf": ZIPF, "compiled_bytes_kept": COMPILED_BYTES}
        record = {**describe(), "settings": settings, "results": results}
        given.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def show(count: int, costs: dict[str, float]) -> dict[str, float]:
    """Prints the costs of one library as they come."""
    print(f"{count} names: {costs}", flush=True)
    return costs


def cpu_seconds(work: Callable[[], object]) -> float:
    """The CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def prompt() -> SoftPrompt:
    """A prompt of SmolLM2-135M's width, with random numbers."""
    vectors = torch.randn(VIRTUAL_TOKENS, 576, generator=torch.Generator().manual_seed(0))
    return SoftPrompt(
        vectors, template="{soft}{text}", base=Fingerprint(name="base", sha256="0" * 64, width=576)
    )


def library_costs(count: int) -> dict[str, float]:
    """An index of `count` names around one published prompt: its bytes, and CPU seconds to look one up and to publish one."""
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        library.publish(prompt_folder(folder), "first")
        path = Path(folder, INDEX)
        index = json.loads(path.read_text("utf-8"))
        entry = index["names"]["first"]
        index["names"] |= {f"task-{number:07d}": entry for number in range(count - 1)}
        path.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        return {
            "index_bytes": path.stat().st_size,
            "look_up_cpu_seconds": cpu_seconds(lambda: library.find("first")),
            "switch_cpu_seconds": cpu_seconds(lambda: library.switch("first@1")),
        }


def prompt_folder(folder: str) -> Path:
    """A saved prompt."""
    from softprompt.store.artifact import save_prompt

    path = Path(folder, "saved")
    save_prompt(prompt(), path)
    return path


def load_seconds(times: int = 50) -> float:
    """CPU seconds to load one prompt of a library, its digest checked."""
    with tempfile.TemporaryDirectory() as folder:
        entry = Library(folder).publish(prompt_folder(folder), "first")
        return cpu_seconds(lambda: [entry.load() for _ in range(times)]) / times


def zipf(count: int) -> np.ndarray[Any, Any]:
    """The share of requests of each of `count` prompts."""
    weights = 1.0 / np.arange(1, count + 1) ** ZIPF
    shares: np.ndarray[Any, Any] = weights / weights.sum()
    return shares


def cache_hits(count: int, kept: int) -> dict[str, float]:
    """The share of requests whose prompt is compiled already, in a replica that keeps `kept` of `count` prompts."""
    shares = zipf(count)
    hits = {"kept": float(min(kept, count)), "hit_share": expected_hits(shares, kept)}
    if count <= MOST_SIMULATED:
        hits["hit_share_simulated"] = simulated_hits(shares, kept)
    return hits


def expected_hits(shares: np.ndarray[Any, Any], kept: int) -> float:
    """Che's approximation: a prompt is kept if it was asked for within the time in which `kept` different ones are."""
    if kept >= len(shares):
        return 1.0
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        distinct = float(-np.expm1(-shares * middle).sum())
        low, high = (middle, high) if distinct < kept else (low, middle)
    return float((shares * -np.expm1(-shares * low)).sum())


def simulated_hits(shares: np.ndarray[Any, Any], kept: int) -> float:
    """The same by drawing requests; the first half only fills the cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    drawn = np.random.default_rng(0).choice(len(shares), SIMULATED_REQUESTS, p=shares).tolist()
    hits = 0
    for number, name in enumerate(drawn):
        if name in cache:
            cache.move_to_end(name)
            hits += number >= SIMULATED_REQUESTS // 2
        else:
            cache[name] = None
            if len(cache) > kept:
                cache.popitem(last=False)
            # A prompt that all have room for is missed once, which a long run does not see.
            hits += number >= SIMULATED_REQUESTS // 2 and kept >= len(shares)
    return hits / (SIMULATED_REQUESTS / 2)


if __name__ == "__main__":
    main()
