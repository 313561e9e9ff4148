"""What is tried against softprompt, counted by the tests that try it: `make reliability` writes docs/reliability.md.

`python tests/reliability.py "Data files"` counts one class again; docs/reliability.json keeps the counts of the others.

A case is one run of a test with one set of parameters; one input that hypothesis drew; or what a test records itself
(record_property("cases", 30)). The page is written only when every case held.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"
COUNTS = PAGE.with_suffix(".json")


@dataclass(frozen=True)
class Class:
    """A class of what is tried: what holds, and the beginnings of the names of its tests, by file."""

    name: str
    holds: str
    tests: dict[str, tuple[str, ...]]

    def has(self, item: pytest.Item) -> bool:
        """Whether a test belongs to it."""
        return item.name.startswith(self.tests.get(item.path.name, ()))


CLASSES = (
    Class(
        "Isolation of rows",
        "A row answers the same alone, in a batch, joining late, and in a place that another row left",
        {"test_isolation.py": ("",), "test_serving.py": ("test_rows_of_many", "test_a_seeded_sample")},
    ),
    Class(
        "Bases that are not what they say",
        "Missing, foreign, mismatched and non-finite tensors, and tokenizers that do not fit, are refused by name",
        {"test_base_refusals.py": ("",)},
    ),
    Class(
        "Identity",
        "A prompt, a resumed run and a cache notice another config, tokenizer or weight",
        {"test_identity.py": ("",)},
    ),
    Class(
        "Kills and resumed runs",
        "A run killed with kill -9 at random moments and resumed ends with the same bits",
        {
            "test_checkpoint.py": ("test_a_run_killed_many_times", "test_a_resumed_run_ends"),
            "test_artifact.py": ("test_a_kill", "test_a_failure", "test_a_full_disk"),
            "test_together.py": ("test_tasks_killed_many_times",),
            "test_sweep.py": ("test_a_killed_sweep",),
        },
    ),
    Class(
        "Ownership and writers",
        "Nothing that softprompt did not write is replaced; one process at a time writes; a full disk cuts nothing",
        {"test_ownership.py": ("",)},
    ),
    Class(
        "Files of prompts",
        "Whatever is in a prompt's files, it loads or one line says why not",
        {"test_hostile_prompts.py": ("",)},
    ),
    Class(
        "Promises to PEFT",
        "PEFT computes the same from a folder that says so, and finds no prompt where it would read it wrongly",
        {"test_peft_promise.py": ("",)},
    ),
    Class(
        "Recipes and settings",
        "Any text is a recipe or refused with its line, within bounds of depth, length and memory",
        {"test_recipe.py": ("test_any_text", "test_a_hostile_recipe", "test_what_is_no_file")},
    ),
    Class(
        "Data files",
        "Dialects, encodings, missing values, pipes, devices and bombs are read rightly or refused with their place",
        {"test_dialects.py": ("",), "test_source.py": ("test_a_bad_file", "test_cells_that_cannot")},
    ),
    Class(
        "What is trained",
        "Special tokens in data are text; what a tokenizer drops or alters is refused or said",
        {"test_trained_text.py": ("",), "test_ending.py": ("",)},
    ),
    Class(
        "Records of runs",
        "Records of other kinds, versions and values are refused in one line; texts with line separators are kept",
        {"test_records.py": ("",)},
    ),
    Class(
        "The command line",
        "Each failure is one message and an exit code by kind; names and texts cannot act on a screen",
        {
            "test_cli_frame.py": ("test_each_kind", "test_numbers_out", "test_an_argument", "test_code_of"),
            "test_cli_screen.py": ("test_escapes", "test_what_is_printed", "test_a_prompt_alone", "test_input_that"),
        },
    ),
    Class(
        "Hostile files and flags",
        "Pipes, devices, files without end, bombs and numbers out of range are refused at once by every reader",
        {"test_hostile_files.py": ("",)},
    ),
    Class(
        "Many rows",
        "A million rows are judged in bounded memory, with the figures and rows that few rows would give",
        {"test_many_rows.py": ("",)},
    ),
    Class(
        "Fuzzed readers",
        "Any bytes are read or refused in a short message, by each reader of files and requests",
        {"test_fuzz.py": ("",)},
    ),
)  # fmt: skip


class Counting:
    """A pytest plugin: the cases of one class."""

    def __init__(self, wanted: Class) -> None:
        self.wanted = wanted
        self.tests = self.cases = self.failed = self.skipped = 0
        self._drawn: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.wanted.has(item)]
        for item in items:
            drawn = getattr(getattr(item, "obj", None), "hypothesis", None)
            if drawn is not None:
                drawn.inner_test = self._counted(drawn.inner_test, item.nodeid)

    def _counted(self, test: Any, node: str) -> Any:
        @functools.wraps(test)
        def counted(*arguments: Any, **named: Any) -> Any:
            result = test(*arguments, **named)
            self._drawn[node] += 1
            return result

        return counted

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            recorded = sum(int(value) for key, value in report.user_properties if key == "cases")
            self.tests += 1
            self.cases += recorded or self._drawn[report.nodeid] or 1


def _cells(count: dict[str, int] | None) -> str:
    return "not counted | yet | –" if count is None else f"{count['tests']:,} | {count['cases']:,} | all"


def page(counts: dict[str, dict[str, int]]) -> str:
    """The page's text."""
    rows = [f"| {each.name} | {each.holds}. | {_cells(counts.get(each.name))} |" for each in CLASSES]
    tests, cases = (sum(count[what] for count in counts.values()) for what in ("tests", "cases"))
    return "\n".join(
        [
            "# What is tried",
            "",
            "Written by the tests that try it (`make reliability`); `make check` runs them all. A case is one run of a test",
            "with one set of parameters, or one input that was drawn at random.",
            "",
            "| class | what holds | tests | cases | held |",
            "|---|---|---:|---:|---|",
            *rows,
            f"| **all** | | {tests:,} | {cases:,} | all |",
            "",
            "`make fuzz` tries 2,000 inputs with each reader, and follows uncovered code where atheris is installed. How the",
            "ways to a token's logits agree is in [exactness.md](exactness.md).",
            "",
        ]
    )


def count(wanted: Class) -> dict[str, int] | None:
    """Run the tests of a class; None where one failed."""
    counting = Counting(wanted)
    code = pytest.main([str(TESTS / name) for name in wanted.tests], plugins=[counting])
    if code or counting.failed:
        return None
    if counting.skipped:
        print(f"{wanted.name}: {counting.skipped} tests were skipped", file=sys.stderr)
    return {"tests": counting.tests, "cases": counting.cases}


def main(names: Sequence[str]) -> int:
    """Count the classes that are named, or all, each in a process of its own, and write the page."""
    os.chdir(TESTS.parent)
    if len(names) != 1:
        wanted = names or [each.name for each in CLASSES]
        return max(
            subprocess.run([sys.executable, __file__, name], check=False).returncode for name in wanted
        )
    counted = count(next(each for each in CLASSES if each.name == names[0]))
    if counted is None:
        print(f"{names[0]}: not counted, since tests failed", file=sys.stderr)
        return 1
    counts = json.loads(COUNTS.read_text("utf-8")) if COUNTS.exists() else {}
    counts = {each.name: {**counts, names[0]: counted}.get(each.name) for each in CLASSES}
    counts = {name: count for name, count in counts.items() if count}
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(counts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
