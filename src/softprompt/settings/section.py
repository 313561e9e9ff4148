"""Declaring settings: each one once, as a field of a Section, with its help, its flag and its limits. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticUndefined

ENDLESS = 10**9
"""A limit from here on only keeps nonsense out; help and docs leave it away."""


class Section(BaseModel):
    """Settings that are refused when unknown or of another kind, rather than bent into shape."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """The values under today's names, wherever they come from: a prompt's notes keep the names of their time."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for former, name in former_names(cls).items():
            if former in values:
                if name in values:
                    raise ValueError(f"{former} is the former name of {name}, and both are set. Keep {name}.")
                values[name] = values.pop(former)
        return values


@cache
def joined(tables: tuple[type[Section], ...]) -> type[Section]:
    """A model with the settings of all tables, to look them up in; the first that declares a name counts."""
    if len(tables) == 1:
        return tables[0]
    fields: dict[str, Any] = {}
    for table in tables:
        for name, field in table.model_fields.items():
            fields.setdefault(name, (field.annotation, field))
    model: type[Section] = create_model("Joined", __base__=Section, **fields)
    return model


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    aliases: Sequence[str] = (),
    elsewhere: str | None = None,
    was: str | None = None,
    by_hand: bool = False,
    **limits: Any,
) -> Any:
    """Declares one setting.

    `flag` is its name on the command line, `aliases` are further names there ("-n"), and `elsewhere` is what other
    tools call it. `was` is its name in former versions, which is still read. A setting `by_hand` must be set on the command line or in Python: a file alone cannot switch it on."""
    names: dict[str, Any] = {
        "flag": flag,
        "aliases": list(aliases),
        "elsewhere": elsewhere,
        "was": was,
        "by_hand": by_hand,
    }
    return Field(default, description=help, json_schema_extra=names, **limits)


@dataclass(frozen=True)
class Setting:
    """One setting as the command line, the docs and the error messages see it."""

    path: str
    default: Any
    required: bool
    help: str
    flag: str | None
    aliases: tuple[str, ...]
    elsewhere: str | None
    by_hand: bool
    wanted: str
    shape: Literal["value", "switch", "list", "mapping"]
    """How a flag takes it: one value, --x or --no-x, or several values."""
    choices: tuple[str, ...]
    """The words among its values, for the shell to complete."""


def settings(model: type[Section], prefix: str = "") -> Iterator[Setting]:
    """All settings of `model`, its sections opened, in the order of their declaration."""
    inner = sections(model)
    for name, field in model.model_fields.items():
        if name in inner:
            yield from settings(inner[name], f"{prefix}{name}.")
            continue
        names: Any = field.json_schema_extra or {}
        default = field.get_default(call_default_factory=True, validated_data={})
        required = default is PydanticUndefined
        yield Setting(
            path=f"{prefix}{name}",
            default=None if required else default,
            required=required,
            help=field.description or "",
            flag=names.get("flag"),
            aliases=tuple(names.get("aliases", ())),
            elsewhere=names.get("elsewhere"),
            by_hand=bool(names.get("by_hand")),
            wanted=_wanted(field.annotation, field.metadata),
            shape=shape_of(field.annotation),
            choices=tuple(choices_of(field.annotation)),
        )


def shape_of(annotation: Any) -> Literal["value", "switch", "list", "mapping"]:
    members = members_of(annotation) - {NoneType}
    if members == {bool}:
        return "switch"
    origins = {get_origin(member) for member in members}
    if origins & {list, tuple}:
        return "list"
    return "mapping" if origins & {dict, Mapping} else "value"


def choices_of(annotation: Any) -> list[str]:
    """The words that a setting's Literals name."""
    words: list[str] = []
    for member in sorted(members_of(annotation), key=str):
        if get_origin(member) is Literal:
            words += [str(word) for word in get_args(member)]
        elif get_origin(member) in (list, tuple, dict, Mapping):
            words += [
                word for inner in get_args(member)[:1] if inner is not Ellipsis for word in choices_of(inner)
            ]
    return words


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """The fields of `model` that are sections themselves, by name."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


@cache
def former_names(model: type[Section]) -> dict[str, str]:
    """Names that settings of `model` itself had in former versions, and the names that they have now."""
    declared = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {
        str(names["was"]): name
        for name, names in declared.items()
        if isinstance(names, dict) and names.get("was") is not None
    }


def members_of(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(members_of(member) for member in get_args(annotation)))
    return {annotation}


def _wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A field's kind in words: "a whole number of at least 1, or auto"."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        spread = [part for note in notes for part in getattr(note, "metadata", [note])]
        return _wanted(inner, spread)
    if get_origin(annotation) in (Union, UnionType):
        parts = [_wanted(member, metadata) for member in get_args(annotation) if member is not NoneType]
        return ", or ".join(parts)
    if get_origin(annotation) is Literal:
        options = [str(option) for option in get_args(annotation)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if get_origin(annotation) in (dict, Mapping):
        kinds = {"text": "texts", "a number": "numbers"}
        inner = _wanted(get_args(annotation)[1])
        keys = "names" if members_of(get_args(annotation)[0]) == {str} else "whole numbers"
        return f"a mapping of {keys} to {kinds.get(inner, inner)}"
    if get_origin(annotation) in (list, tuple):
        inner = _wanted(get_args(annotation)[0])
        return "a list of texts" if inner == "text" else f"a list: {inner}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}
    limits = [
        text.format(getattr(note, attribute))
        for note in metadata
        for attribute, text in words.items()
        if (limit := getattr(note, attribute, None)) is not None
        and not (attribute == "le" and limit >= ENDLESS)
    ]
    return " ".join([names.get(annotation, "a mapping"), " and ".join(limits)]).strip()
