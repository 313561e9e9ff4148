"""Records on disk: typed, with a schema version; unknown figures are null there and nan here. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from softprompt.errors import DataError, first_line
from softprompt.settings.text import describe_value
from softprompt.store.atomic import replace_file
from softprompt.store.json_values import plain
from softprompt.store.plain_file import read_text

SCHEMA = 2  # 1: the records of version 0.1, which carry no number

Value: TypeAlias = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A figure; null in a record means unknown."""

T = TypeVar("T")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record atomically: a reader finds the old file or the new one, never half of it."""
    replace_file(path, json.dumps(plain(record), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises DataError, in one line, for anything else."""
    try:
        record: Any = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise DataError(f"{path}: the record cannot be read ({reason}). Make the run again.") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: found {describe_value(record)}, wanted a record (a JSON object). Make the run again."
        )
    schema = record.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise DataError(
            f"{path}: its schema is {describe_value(schema)}, and this version reads up to {SCHEMA}. Update softprompt."
        )
    return record


def typed(kind: type[T], record: Mapping[str, Any], where: str) -> T:
    """`record` as an instance of the dataclass `kind`; unknown keys are dropped.

    Raises DataError, in one line, that names the first value of a wrong type."""
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
        read = adapter.validate_python(dict(record))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join(map(str, problem["loc"]))
        value = "nothing" if problem["type"] == "missing" else describe_value(problem["input"])
        raise DataError(
            f"{where}: {path}: found {value}, wanted: {problem['msg']}. Make the run again."
        ) from None
    except RecursionError:
        raise DataError(f"{where}: the record is nested too deeply. Make the run again.") from None
    return read


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
