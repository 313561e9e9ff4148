"""Recipe text to plain values, each with the place where it was written.

A YAML of the plain kind: `5e-3`, `1e-4` and `.5` are numbers, only `true` and `false` are booleans (so `no` and
`on` are words), there are no dates, and a key may be given once. Every value knows its file and line, or its flag.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from softprompt.errors import RecipeError, first_line

Scalar = str | int | float | bool | None

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE_FALSE = re.compile(r"true|True|TRUE|false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)

# Far beyond any recipe; they keep a hostile file from taking all memory or time.
MAX_CHARACTERS = 1_000_000
MAX_VALUES = 10_000  # aliases opened: nine nested ones of nine items each would be 10**9
MAX_DEPTH = 20
MAX_DIGITS = 300  # Python itself refuses to read whole numbers of more than 4,300


@dataclass(frozen=True)
class Written:
    """A value as someone wrote it: a scalar, a list of Written, or a mapping of names to Written."""

    value: Scalar | list[Written] | dict[str, Written]
    text: str
    """A scalar exactly as written, for settings that want text; "" for lists and mappings."""
    where: str
    """`recipe.yaml:12`, or the flag."""


def scalar(text: str) -> Scalar:
    """The value of an unquoted piece of text."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE_FALSE.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text.replace("_", ""))
    if _NUMBER.fullmatch(text):
        return float(re.sub(r"\.(?=[inIN])", "", text.replace("_", "")))
    return text


def read_mapping(source: str, name: str) -> dict[str, Written]:
    """Parses a whole recipe; an empty one is an empty mapping. Errors name `name` and the line."""
    node = _tree(source, name)
    if node is None:
        return {}
    written = _written(node, name, _Budget(name))
    if not isinstance(written.value, dict):
        raise RecipeError(
            f"{written.where}: found {describe(written)}, wanted settings such as 'base: builtin', one a line."
        )
    return written.value


def read_list(source: str, name: str, most_values: int) -> list[Any]:
    """Parses a YAML list, within bounds of its size, depth and aliases, to plain values. Errors name `name` and the line."""
    node = _tree(source, name)
    written = None if node is None else _written(node, name, _Budget(name, most_values))
    if written is None or not isinstance(written.value, list):
        found = "an empty file" if written is None else describe(written)
        raise RecipeError(f"{name}: found {found}, wanted a list.")
    values = _plain(written)
    assert isinstance(values, list)
    return values


def _plain(written: Written) -> Any:
    if isinstance(written.value, list):
        return [_plain(item) for item in written.value]
    if isinstance(written.value, dict):
        return {name: _plain(item) for name, item in written.value.items()}
    return written.value


def read_value(text: str, where: str) -> Written:
    """Parses the right-hand side of `--set key=value`, or a flag's value."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{where}: found {len(text):,} characters, wanted at most {MAX_CHARACTERS:,}.")
    try:
        node = _compose(text, where)
    except yaml.YAMLError:
        return Written(text, text, where)  # no YAML, so it is text: "{soft:20} {text}: {label}"
    if node is None:
        return Written(None, text, where)
    if isinstance(node, yaml.ScalarNode):
        value = node.value if node.style else scalar(node.value)
        return Written(value, text if node.style is None else node.value, where)
    return _written(node, where, _Budget(where), lines=False)


def describe(written: Written) -> str:
    """A value in the words of an error message: "'fast' (text)"."""
    return describe_value(written.value)


def describe_value(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true or false)"
    if isinstance(value, int | float):
        return f"{_shortened(str(value))} (a number)"
    if isinstance(value, str):
        return f"{_shortened(value)!r} (text)"
    return "a list" if isinstance(value, list | tuple) else "a mapping"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _tree(source: str, name: str) -> yaml.Node | None:
    """The tree of a file's nodes. RecipeError for what is too long or no YAML."""
    if len(source) > MAX_CHARACTERS:
        raise RecipeError(
            f"{name}: found {len(source):,} characters, wanted a recipe of at most {MAX_CHARACTERS:,}. Is it the data?"
        )
    try:
        return _compose(source, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise RecipeError(f"{name}{line}: this is not YAML: {problem}. Correct that line.") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    """The tree of nodes; refused where it is nested deeper than any recipe, before the reader recurses into it."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Composer)
    except _TooDeep:
        raise _too_deep(name) from None
    return node


class _TooDeep(Exception):
    """Lists or mappings within one another, more of them than MAX_DEPTH."""


class _Composer(yaml.BaseLoader):
    """Makes nodes, and counts the lists and mappings that are open meanwhile."""

    depth = 0

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        with self._one_deeper():
            return super().compose_sequence_node(anchor)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        with self._one_deeper():
            return super().compose_mapping_node(anchor)

    @contextlib.contextmanager
    def _one_deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooDeep
        yield
        self.depth -= 1


def _too_deep(name: str) -> RecipeError:
    return RecipeError(
        f"{name}: lists or mappings are nested more than {MAX_DEPTH} deep. Settings are flatter."
    )


class _Budget:
    """Counts the values that are read, each alias as often as it is used."""

    def __init__(self, name: str, most_values: int = MAX_VALUES) -> None:
        self.name, self.most_values = name, most_values
        self.values = 0

    def spend(self, depth: int) -> None:
        """Takes note of one more value. RecipeError where there are too many, or too deep ones."""
        self.values += 1
        if depth > MAX_DEPTH:  # an alias within its own anchor
            raise _too_deep(self.name)
        if self.values > self.most_values:
            raise RecipeError(
                f"{self.name}: found more than {self.most_values:,} values, aliases opened. A recipe has a few dozen."
            )


def _written(node: yaml.Node, name: str, budget: _Budget, *, lines: bool = True, depth: int = 0) -> Written:
    budget.spend(depth)
    deeper = depth + 1
    where = f"{name}:{node.start_mark.line + 1}" if lines else name
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        return Written(node.value if quoted else scalar(node.value), node.value, where)
    if isinstance(node, yaml.SequenceNode):
        return Written(
            [_written(item, name, budget, lines=lines, depth=deeper) for item in node.value], "", where
        )
    mapping: dict[str, Written] = {}
    for key_node, value_node in node.value:
        key_where = f"{name}:{key_node.start_mark.line + 1}" if lines else name
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{key_where}: found a list or mapping as a key, wanted the name of a setting.")
        key = key_node.value
        if key in mapping:
            raise RecipeError(
                f"{key_where}: {key} is given twice (first at {mapping[key].where}). Keep one of them."
            )
        value = _written(value_node, name, budget, lines=lines, depth=deeper)
        # An error should point at the key, also where a long text starts on the next line.
        mapping[key] = Written(value.value, value.text, key_where)
    return Written(mapping, "", where)
