"""What every benchmark shares: the machine in general words, rounds of processes, medians and spread."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Machine, versions and commit, without any name of this very machine."""
    import torch

    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    known = {"AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "VNNI": "avx512_vnni", "AMX": "amx_tile"}
    features = [name for name, flag in known.items() if flag in flags.split()]
    return {
        "machine": f"{torch.get_num_threads()}-core {platform.machine()} CPU"
        + (f" with {', '.join(features)}" if features else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "softprompt")},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def demand_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends with one line where torch sees no such device."""
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: torch {torch.__version__} sees no GPU with CUDA here")


def matrix_rates(device: str, rows: int = 1024, width: int = 1024, columns: int = 4096) -> dict[str, float]:
    """Plain matrix products in GFLOP/s (int8: GOP/s), the best of a few."""
    import torch

    rates: dict[str, float] = {}
    size = 1 if device == "cpu" else 4
    rows, width, columns = rows * size, width * size, columns * size
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            left, right = (
                torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (columns, width))
            )
            rates[name] = _rate(lambda a=left, b=right: a @ b.T, 2 * rows * width * columns, device)  # type: ignore[misc]
        if device == "cpu":
            left, right = (
                torch.randint(-127, 127, shape, dtype=torch.int8)
                for shape in ((rows, width), (width, columns))
            )
            rates["int8"] = _rate(lambda: torch._int_mm(left, right), 2 * rows * width * columns, device)
    return rates


def _rate(product: Callable[[], Any], operations: int, device: str) -> float:
    best = seconds(product, 5, device)[0]
    return round(operations / best / 1e9, 1)


def seconds(call: Callable[[], Any], times: int, device: str = "cpu") -> list[float]:
    """Times of `times` calls after one that is not counted, fastest first.

    Of one CPU thread they are seconds of the CPU, so that other work on the machine does not count; else of the clock."""
    import torch

    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    found = []
    for _ in range(times):
        if device != "cpu":
            torch.cuda.synchronize()
        began = clock()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(clock() - began)
    return sorted(found)


def peak_bytes(device: str) -> int:
    """The most memory that this process has held: on the GPU where it ran on one."""
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rounds(
    script: str, arguments: Sequence[str], arms: Sequence[str], count: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every arm `count` times, each in a process of its own, in turns; the last line of each is its result."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(count):
        for arm in arms if turn % 2 == 0 else list(reversed(arms)):
            done = subprocess.run(
                [sys.executable, script, *arguments, "--arm", arm],
                capture_output=True,
                text=True,
                check=False,
            )
            result = next((line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if result is None:
                print(f"{arm}: failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
                raise SystemExit(1)
            found[arm].append(json.loads(result))
            shown = {
                key: round(value, 3) for key, value in found[arm][-1].items() if isinstance(value, float)
            }
            print(f"round {turn + 1} {arm}: {shown}", flush=True)
    return found


def write_result(
    path: Path,
    settings: dict[str, Any],
    found: dict[str, list[dict[str, Any]]],
    *,
    against: str,
    measure: str,
) -> None:
    """Medians, spread and ratios to `path` as JSON; the ratios of a round are taken within that round."""
    arms: dict[str, Any] = {}
    for arm, runs in found.items():
        figures = {
            key: [run[key] for run in runs]
            for key, value in runs[0].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        arms[arm] = {
            key: {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "n": len(values),
            }
            for key, values in figures.items()
        }
        arms[arm] |= {key: runs[0][key] for key in ("losses", "gflops") if key in runs[0]}
    ratios = {
        f"{arm} against {other}": [
            round(theirs[measure] / ours[measure], 3)
            for ours, theirs in zip(found[arm], found[other], strict=True)
        ]
        for other in found
        for arm in found
        if arm != other and (other == against or other.startswith(("peft", "recomputed")))
    }
    kept = {
        key: value
        for key, value in settings.items()
        if key not in ("arm", "work", "name") and not str(value).startswith("/")
    }
    cpu = {
        f"{arm} against {against}": [
            round(theirs["epoch_cpu_seconds"] / ours["epoch_cpu_seconds"], 3)
            for ours, theirs in zip(found[arm], found[against], strict=True)
        ]
        for arm in found
        if arm != against and against in found and "epoch_cpu_seconds" in found[arm][0]
    }
    result = {
        **describe(),
        "settings": kept,
        "measure": measure,
        "times_faster": {
            name: {"median": statistics.median(values), "rounds": values} for name, values in ratios.items()
        },
        "times_less_cpu_time": {
            name: {"median": statistics.median(values), "rounds": values} for name, values in cpu.items()
        },
        "arms": arms,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} times ({', '.join(f'{v:.2f}' for v in values)})")
    for name, values in cpu.items():
        print(f"{name}: {statistics.median(values):.2f} times less CPU time")
    print(f"written: {path.name}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
