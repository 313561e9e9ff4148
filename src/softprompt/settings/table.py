"""A table of settings, whichever it is: its fields listed, filled from text, and explained where text is refused.

recipe.py is such a table. A table is a Section whose fields are settings or Sections of them. While it is filled it
is a tree of plain values, and beside it stand the places where they were written, by dotted path. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from softprompt.errors import RecipeError
from softprompt.settings.text import Written, describe_value, read_mapping, read_value


class Section(BaseModel):
    """Settings that are refused when unknown or of another kind, rather than bent into shape."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


class Table(Section):
    """A whole table of settings, such as a recipe: filled from Python, YAML, `--set` and flags alike.

    Whatever is refused raises RecipeError, with one line a setting: where it was written, found, wanted."""

    if not TYPE_CHECKING:  # checkers see pydantic's own signature: every setting by name, with its type

        def __init__(
            self, /, *, _places: Mapping[str, str] | None = None, _origin: str = "settings", **values: Any
        ) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise RecipeError(explain(type(self), error, _places or {}, _origin)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, then apply `a.b=value` overrides in order. RecipeError names the file and the line."""
        return cls.from_flags({}, overrides, path=path)

    @classmethod
    def from_flags(
        cls,
        flags: Mapping[str, str | None],
        overrides: Sequence[str] = (),
        *,
        path: str | Path | None = None,
    ) -> Self:
        """Settle a table from a file, if any, then `--set` overrides, then flags by name ("--learning-rate")."""
        tree: dict[str, Any] = {}
        places: dict[str, str] = {}
        if path is not None:
            merge_file(cls, tree, places, path)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise RecipeError(f"--set {override}: found no '=', wanted KEY=VALUE such as tune.epochs=3.")
            put(cls, tree, places, key.strip(), text, f"--set {key.strip()}")
        named = {one.flag: one for one in settings(cls) if one.flag}
        for flag, value in flags.items():
            if value is not None:
                put(cls, tree, places, named[flag].path, value, flag)
        return cls._filled(tree, places, str(path) if path is not None else "settings")

    def changed(self, overrides: Sequence[str]) -> Self:
        """The same table with `a.b=value` overrides applied in order."""
        tree = self.model_dump()
        places: dict[str, str] = {}
        for override in overrides:
            key, _, text = override.partition("=")
            put(type(self), tree, places, key.strip(), text, key.strip())
        return type(self)._filled(tree, places, "settings")

    def to_yaml(self) -> str:
        """Every setting, defaults included, as a file that `load` reads back to the same table."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def _filled(cls, tree: dict[str, Any], places: Mapping[str, str], origin: str) -> Self:
        for section in sections(cls):
            tree.setdefault(section, {})
        made: Any = cls
        filled: Self = made(_places=places, _origin=origin, **tree)
        return filled


def setting(
    default: Any, help: str, *, flag: str | None = None, elsewhere: str | None = None, **limits: Any
) -> Any:
    """Declare one setting; `flag` is its short name on the command line, `elsewhere` what other tools call it."""
    return Field(
        default, description=help, json_schema_extra={"flag": flag, "elsewhere": elsewhere}, **limits
    )


@dataclass(frozen=True)
class Setting:
    """One setting as the command line, the docs and the error messages see it."""

    path: str
    default: Any
    required: bool
    help: str
    flag: str | None
    elsewhere: str | None
    wanted: str


def settings(model: type[Section], prefix: str = "") -> Iterator[Setting]:
    """All settings of `model`, its sections opened, in the order of their declaration."""
    inner = sections(model)
    for name, field in model.model_fields.items():
        if name in inner:
            yield from settings(inner[name], f"{prefix}{name}.")
            continue
        names: Any = field.json_schema_extra or {}
        required = field.default is PydanticUndefined
        yield Setting(
            path=f"{prefix}{name}",
            default=None if required else field.default,
            required=required,
            help=field.description or "",
            flag=names.get("flag"),
            elsewhere=names.get("elsewhere"),
            wanted=_wanted(field.annotation, field.metadata),
        )


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """The fields of `model` that are sections themselves, by name."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def merge_file(model: type[Section], tree: dict[str, Any], places: dict[str, str], path: str | Path) -> None:
    """Add what a YAML file says to `tree`, and to `places` the line of each setting."""
    _merge(model, tree, places, read_mapping(_read_file(path), str(path)))


def put(
    model: type[Section], tree: dict[str, Any], places: dict[str, str], path: str, text: str, where: str
) -> None:
    """Set one setting by its dotted path from a flag's text; `where` is what an error calls it."""
    *outer, last = path.split(".")
    section = model
    for name in outer:
        inner = sections(section)
        if name not in inner:
            if name in section.model_fields and get_origin(section.model_fields[name].annotation) is dict:
                tree = tree.setdefault(name, {})  # data.fields.text=body
                tree[last] = text
                return
            raise RecipeError(f"{where}: unknown setting.{_did_you_mean(model, path)}")
        section, tree = inner[name], tree.setdefault(name, {})
    places[path] = where
    if last in sections(section):
        raise RecipeError(
            f"{where}: {path} is a section, wanted one of its settings such as {_first_in(model, path)}."
        )
    field = section.model_fields.get(last)
    if field is None:
        raise RecipeError(f"{where}: unknown setting.{_did_you_mean(model, path)}")
    wants_text = _members(field.annotation) <= {str, NoneType}
    # Text is taken to the letter: a template's braces and a text's last blank are no YAML.
    tree[last] = text if wants_text else _plain(read_value(text, where), field.annotation)


def explain(model: type[Section], error: ValidationError, places: Mapping[str, str], origin: str) -> str:
    """One line for each setting that was refused: where, which, found, wanted."""
    known = {one.path: one for one in settings(model)}
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        names = [str(part) for part in problem["loc"]]
        # Unions append the member that failed; the setting is the longest known start of the path.
        path = next(
            (p for end in range(len(names), 0, -1) if (p := ".".join(names[:end])) in known), ".".join(names)
        )
        where = next((places[p] for p in (".".join(names), path) if p in places), origin)
        label = "" if where.endswith(path) else f" {path}:"
        if problem["type"] == "extra_forbidden":
            text = f"unknown setting.{_did_you_mean(model, path)}"
        elif problem["type"] == "missing":
            wanted = known[path].help if path in known else "a section of settings"
            text = f"nothing given, wanted: {wanted}"
            flag = known[path].flag if path in known else None
            text += f" Write it into the recipe, or pass {flag}." if flag else ""
        elif problem["type"] == "value_error":
            label, text = "", str(problem["ctx"]["error"])
        else:
            value: Any = problem["input"]
            wanted = known[path].wanted if path in known else f"settings such as {_first_in(model, path)}"
            text = f"found {describe_value(value)}, wanted {wanted}."
        lines.setdefault(path, f"{where}:{label} {text}")
    return "\n".join(lines.values())


def _read_file(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file. Check the path.") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: found a folder, wanted a recipe file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: byte {error.start} is not UTF-8, as a recipe must be. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from None


def _merge(
    model: type[Section],
    tree: dict[str, Any],
    places: dict[str, str],
    written: dict[str, Written],
    prefix: str = "",
) -> None:
    inner = sections(model)
    for key, item in written.items():
        places[prefix + key] = item.where
        if key in inner and isinstance(item.value, dict):
            _merge(inner[key], tree.setdefault(key, {}), places, item.value, f"{prefix}{key}.")
        elif key in inner and item.value is None:
            tree[key] = {}  # a heading with nothing under it
        else:
            field = model.model_fields.get(key)
            tree[key] = _plain(item, field.annotation if field is not None else Any)


def _plain(item: Written, annotation: Any) -> Any:
    """The value for a field: a setting that wants text takes `1e5` or `true` as the text it was written as."""
    if isinstance(item.value, dict):
        inner = get_args(annotation)[1] if get_origin(annotation) is dict else Any
        return {key: _plain(value, inner) for key, value in item.value.items()}
    if isinstance(item.value, list):
        return [_plain(value, Any) for value in item.value]
    if item.value is not None and _members(annotation) <= {str, NoneType}:
        return item.text
    return item.value


def _members(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_members(member) for member in get_args(annotation)))
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
    if get_origin(annotation) is dict:
        return "a mapping of names to texts"
    if get_origin(annotation) is list:
        inner = _wanted(get_args(annotation)[0])
        return "a list of texts" if inner == "text" else f"a list: {inner}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}
    limits = [
        text.format(getattr(note, attribute))
        for note in metadata
        for attribute, text in words.items()
        if getattr(note, attribute, None) is not None
    ]
    return " ".join([names.get(annotation, "a mapping"), " and ".join(limits)]).strip()


def _first_in(model: type[Section], section: str) -> str:
    known = [one.path for one in settings(model)]
    return next((path for path in known if path.startswith(f"{section}.")), known[0])


def _did_you_mean(model: type[Section], path: str) -> str:
    """The nearest known setting as a question, or where to look."""
    known = [one.path for one in sorted(settings(model), key=lambda one: one.flag is None)]
    section, _, last = path.rpartition(".")
    same_name = [one for one in known if one.split(".")[-1] == last]
    siblings = {one.split(".")[-1]: one for one in known if one.rpartition(".")[0] == section}
    anywhere = {one.split(".")[-1]: one for one in reversed(known)}
    elsewhere = {one.elsewhere: one.path for one in settings(model)}
    near = (
        same_name
        or ([elsewhere[last]] if last in elsewhere else [])
        or [siblings[name] for name in difflib.get_close_matches(last, siblings, 1, 0.6)]
        or [anywhere[name] for name in difflib.get_close_matches(last, anywhere, 1, 0.6)]
        or difflib.get_close_matches(path, known, 1, 0.75)
    )
    return f" Did you mean {' or '.join(near)}?" if near else " `softprompt recipe` lists them all."
