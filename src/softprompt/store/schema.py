"""The schema of a prompt's JSON files. They may come from a stranger, so every value has a type and a limit.

Whatever does not fit is one DamagedPrompt that names the file, the key and what was wanted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from softprompt.errors import DamagedPrompt, PromptError
from softprompt.prompt.soft_prompt import Fingerprint

FORMAT = 1  # of softprompt.json
LARGEST_FILE = 16 << 20  # bytes; a prompt's notes take some kilobytes
LARGEST_CONFIG = 1 << 18  # characters
DEEPEST = 64  # lists and objects inside one another
LONGEST_NUMBER = 40  # digits
MOST_VIRTUAL_TOKENS = 1_000_000

Count = Annotated[StrictInt, Field(ge=0, le=1 << 31)]
Length = Annotated[StrictInt, Field(ge=1, le=MOST_VIRTUAL_TOKENS)]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]*$", max_length=128)]
Name = Annotated[StrictStr, Field(max_length=4096)]
Prose = Annotated[StrictStr, Field(max_length=1 << 20)]


class PeftConfig(BaseModel):
    """The keys of adapter_config.json that say how a prompt is read."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Name | None = None
    task_type: Name | None = None
    num_virtual_tokens: Length | None = None
    num_transformer_submodules: Count | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None
    token_dim: Count | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    modules_to_save: list[Name] | None = None


class Ours(BaseModel):
    """softprompt.json. Folders of version 0.1 have neither `shape`, `files` nor `folder`."""

    model_config = ConfigDict(extra="ignore")

    format: Annotated[StrictInt, Field(ge=1)] = FORMAT
    kind: Literal["soft", "deep"] | None = None
    name: Name | None = None
    length: Length | None = None
    shape: Annotated[list[Length], Field(min_length=2, max_length=4)] | None = None
    template: Prose | None = None
    target: Name | None = None
    base: dict[str, Any] | None = None
    tensors_sha256: Digest | None = None
    drafts: Digest | None = None
    files: list[Name] | None = None
    folder: Name | None = None
    peft: StrictBool | None = None
    notes: dict[str, Any] | None = None


Model = TypeVar("Model", bound=BaseModel)

_FINGERPRINT = TypeAdapter(Fingerprint)


def read(path: Path, model: type[Model]) -> Model:
    """A file of that schema. Raises DamagedPrompt; PromptError for a file of a newer softprompt."""
    value = read_object(path)
    if model is Ours and isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise PromptError(
            f"{path}: is of format {value['format']:.6g}, wanted at most {FORMAT}: a newer softprompt wrote it. Upgrade softprompt."
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        _refuse(path, error)


def fingerprint(record: dict[str, Any], path: Path) -> Fingerprint:
    """The base's fingerprint in softprompt.json; keys that are not known are left out. Raises DamagedPrompt."""
    fields = {key: value for key, value in record.items() if key in Fingerprint.__dataclass_fields__}
    for key, value in fields.items():
        if isinstance(value, bool) or (isinstance(value, int) and not 0 <= value <= 1 << 40):
            raise DamagedPrompt(
                f"{path}: base.{key}: found {_short(value)}, wanted a size. Restore the file or tune again."
            )
        limit = LARGEST_CONFIG if key == "config" else 4096
        if isinstance(value, str) and len(value) > limit:
            raise DamagedPrompt(
                f"{path}: base.{key}: found {len(value):,} characters, wanted at most {limit:,}. Restore the file or tune again."
            )
    try:
        fingerprint = _FINGERPRINT.validate_python(fields)
    except ValidationError as error:
        _refuse(path, error, "base.")
    if fingerprint.config:  # JSON inside JSON
        try:
            if not isinstance(_parsed(fingerprint.config), dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise DamagedPrompt(
                f"{path}: base.config: cannot be read as JSON ({_reason(error)}). Restore the file or tune again."
            ) from error
    return fingerprint


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, within limits on its size, depth, numbers and characters. Raises DamagedPrompt."""
    try:
        if not path.is_file():  # a pipe or device would never end
            raise ValueError("it is not a plain file")
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {LARGEST_FILE:,} are read")
        value = _parsed(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedPrompt(
            f"{path}: cannot be read as JSON ({_reason(error)}). Restore the file or tune again."
        ) from error
    if not isinstance(value, dict):
        raise DamagedPrompt(f"{path}: found a {type(value).__name__}, wanted a JSON object.")
    return value


def _parsed(text: str) -> Any:
    """JSON within limits. Raises ValueError or RecursionError."""
    value = json.loads(text, parse_int=_integer)
    _check_inside(value)
    return value


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_inside(value: Any) -> None:
    """Refuses deep nesting, and text that is no Unicode (lone surrogates), which cannot be printed or saved again."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]


def _refuse(path: Path, error: ValidationError, prefix: str = "") -> NoReturn:
    first = error.errors(include_url=False, include_context=False)[0]
    key = prefix + ".".join(map(str, first["loc"]))
    wanted = str(first["msg"])
    raise DamagedPrompt(
        f"{path}: {key}: found {_short(first['input'])}. {wanted}. Restore the file or tune again."
    ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
