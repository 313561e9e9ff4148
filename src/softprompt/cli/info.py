"""`softprompt info`: what this machine is, what is installed, and what that makes of `auto`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, screen, size
from softprompt.settings.base_settings import BaseSettings

REQUIRED = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")
OPTIONAL = {
    "peft": "lora",
    "sacrebleu": "eval",
    "matplotlib": "plot",
    "tensorboard": "trackers",
    "lm_eval": "lmeval",
    "bitsandbytes": "quantised",
    "gguf": "gguf",
}


EXAMPLE = "softprompt info --dtype bfloat16"


@takes(BaseSettings)
def command(
    base: BaseSettings,
    *,
    as_json: asked.AsJson = False,
) -> None:
    """Show versions, device and dtype, and why they were chosen."""
    record = machine(base.device, base.dtype)
    if as_json:
        return emit(record)
    console = screen()
    fact(console, "softprompt", f"{record['softprompt']} (Python {record['python']}, {record['platform']})")
    for name, installed in record["packages"].items():
        missing = f"not installed (pip install 'softprompt[{OPTIONAL.get(name, '')}]')"
        fact(console, name, installed or missing)
    fact(
        console,
        "processor",
        f"{record['processor']}, {record['cores']} cores, {record['threads']} threads in use",
    )
    fact(console, "memory", size(record["memory_bytes"]) if record["memory_bytes"] else "unknown")
    fact(console, "device", record["device"])
    fact(console, "dtype", f"{record['dtype']}: {record['dtype_reason']}")
    fact(console, "hub", "offline (HF_HUB_OFFLINE)" if record["offline"] else "used for what is not here yet")
    return None


def machine(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Everything that `info` shows, as plain data."""
    import torch

    from softprompt.base.frozen_lm import choose_device, choose_dtype
    from softprompt.base.hardware import processor_name, total_memory_bytes

    chosen = choose_device(device)
    number_format, reason = choose_dtype(dtype, chosen)
    return {
        "softprompt": _version("softprompt"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "processor": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory_bytes(),
        "device": str(chosen),
        "dtype": str(number_format).removeprefix("torch."),
        "dtype_reason": reason,
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
