"""Absolute paths are cut to the last name before anything is shown: a report is passed on, the folders are one's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ABSOLUTE = re.compile(
    r"(?<![\w.:/\\-])(?:/|~/|[A-Za-z]:[/\\])(?:[^\s/\\'\"<>|:*?]+[/\\])+(?=[^\s/\\'\"<>|:*?]|$|[\s'\"])"
)


def without_folders(value: Any) -> Any:
    """The same text, list or mapping, with "…/" in place of the folders of every absolute path in it."""
    if isinstance(value, str):
        return _ABSOLUTE.sub("\u2026/", value)
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return value
