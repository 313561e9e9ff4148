"""The tree of all errors. Each leaf is a standard error too, and carries the exit code of the command line.

    SoftPromptError                     1   any failure that has no code of its own
    ├── RecipeError    (ValueError)     2   a setting that is unknown, of the wrong kind, or contradicts another
    ├── MissingExtra   (ImportError)    2   an optional package is needed; says what to install
    ├── DataError      (ValueError)     3   a file, column or row that cannot be trained on
    ├── OutOfMemory    (MemoryError)    4   even one row at a time does not fit
    ├── BaseError      (ValueError)     5   a base model that cannot be loaded or is not supported
    ├── PromptError    (ValueError)     5   a prompt that cannot be used
    │   ├── WrongBase                   5   it was learned on another base
    │   └── DamagedPrompt               5   its files are incomplete, of the wrong shape or not finite
    ├── NotFinite      (ArithmeticError) 1  the loss or its gradient became NaN or infinite
    ├── SaveError      (OSError)        1   nothing was written; the former version, if any, is unchanged
    ├── ClusterError   (ConnectionError) 1  a cluster does not answer, or lost a part of the work too often
    └── GateFailed                    100   a measured figure is under the demanded one

A message says what was found, what was wanted and what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

MAX_WORD = 300  # characters; only a path or what a hostile file spells is longer
MAX_MESSAGE = 8000  # a recipe may have a hundred mistakes, a line each


class SoftPromptError(Exception):
    """Shown in full up to `MAX_MESSAGE` characters: what a message quotes from a file may be of any length."""

    exit_code = 1

    def __str__(self) -> str:
        message = super().__str__()
        if len(message) <= MAX_WORD:
            return message
        message = re.sub(rf"\S{{{MAX_WORD + 1},}}", lambda word: word[0][: MAX_WORD - 3] + "...", message)
        return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."


class RecipeError(SoftPromptError, ValueError):
    exit_code = 2


class MissingExtra(SoftPromptError, ImportError):
    exit_code = 2


class DataError(SoftPromptError, ValueError):
    exit_code = 3


class OutOfMemory(SoftPromptError, MemoryError):
    exit_code = 4


class BaseError(SoftPromptError, ValueError):
    exit_code = 5


class PromptError(SoftPromptError, ValueError):
    exit_code = 5


class WrongBase(PromptError):
    pass


class DamagedPrompt(PromptError):
    pass


class NotFinite(SoftPromptError, ArithmeticError):
    pass


class SaveError(SoftPromptError, OSError):
    pass


class ClusterError(SoftPromptError, ConnectionError):
    pass


class GateFailed(SoftPromptError):
    exit_code = 100


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `names` most like `name`, in any case of letters; None where none reaches `likeness`, from 0 to 1."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    near = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=likeness)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that offers the nearest known name, ` Did you mean 'label'?`; "" when none is near."""
    near = nearest(name, names)
    return "" if near is None else f" Did you mean '{near}'?"
