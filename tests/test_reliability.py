"""docs/reliability.md says what the tests try."""

from __future__ import annotations

import json
import re

from reliability import CLASSES, COUNTS, PAGE, TESTS, page


def test_the_page_is_made_of_the_counts() -> None:
    assert PAGE.read_text("utf-8") == page(json.loads(COUNTS.read_text("utf-8")))


def test_what_was_counted_are_classes_of_which_every_case_held() -> None:
    counts = json.loads(COUNTS.read_text("utf-8"))
    assert set(counts) <= {each.name for each in CLASSES}
    assert all(0 < count["tests"] <= count["cases"] for count in counts.values())


def test_every_class_names_tests_that_exist() -> None:
    for each in CLASSES:
        for file, beginnings in each.tests.items():
            defined = re.findall(r"^def (test_\w+)", (TESTS / file).read_text("utf-8"), re.M)
            for beginning in beginnings:
                assert any(name.startswith(beginning) for name in defined), (file, beginning)


def test_every_test_that_the_page_counts_is_named_by_one_class() -> None:
    named = [
        (file, beginning) for each in CLASSES for file, names in each.tests.items() for beginning in names
    ]
    assert len(named) == len(set(named))
    for file, beginning in named:
        others = [name for other, name in named if other == file and name != beginning]
        assert not any(name.startswith(beginning) or beginning.startswith(name) for name in others), (
            file,
            beginning,
        )
