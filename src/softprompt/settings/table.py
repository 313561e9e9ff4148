"""A table of settings, whichever it is: its fields listed, filled from text, and explained where text is refused.

recipe.py is such a table. A table is a Section whose fields are settings or Sections of them. While it is filled it
is a tree of plain values, and beside it are the places where they were written, by dotted path. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticUndefined

from softprompt.errors import RecipeError, nearest
from softprompt.settings.text import MAX_CHARACTERS, Written, describe_value, read_mapping, read_value

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


class Table(Section):
    """A whole table of settings, such as a recipe: filled from Python, YAML, `--set` and flags alike.

    Whatever is refused raises RecipeError, with one line a setting: where it was written, found, wanted."""

    if not TYPE_CHECKING:  # checkers see pydantic's own signature: every setting by name, with its type

        def __init__(
            self,
            /,
            *,
            _places: Mapping[str, str] | None = None,
            _origin: str = "settings",
            _among: type[Section] | None = None,
            **values: Any,
        ) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise RecipeError(explain(_among or type(self), error, _places or {}, _origin)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file, then applies `a.b=value` overrides in order. RecipeError names the file and the line."""
        return cls.from_flags({}, overrides, path=path)

    @classmethod
    def from_flags(
        cls,
        flags: Mapping[str, Flag],
        overrides: Sequence[str] = (),
        *,
        path: str | Path | None = None,
    ) -> Self:
        """Settles a table from a file, if any, then `--set` overrides, then flags by name ("--learning-rate")."""
        (table,) = fill((cls,), flags, overrides, path=path)
        assert isinstance(table, cls)
        return table

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
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def _filled(
        cls,
        tree: dict[str, Any],
        places: Mapping[str, str],
        origin: str,
        among: type[Section] | None = None,
    ) -> Self:
        for section in sections(cls):
            tree.setdefault(section, {})
        made: Any = cls
        filled: Self = made(_places=places, _origin=origin, _among=among, **tree)
        return filled


Flag: TypeAlias = str | bool | Sequence[str] | None
"""A flag's value as the shell gives it: text, true or false, several texts where it is repeated; None: not given."""


def fill(
    tables: Sequence[type[Table]],
    flags: Mapping[str, Flag] | None = None,
    overrides: Sequence[str] = (),
    *,
    path: str | Path | None = None,
) -> tuple[Table, ...]:
    """Fills all tables of a verb from one YAML file, then `--set` overrides, then flags by name.

    Each key belongs to the tables that declare it; a key that none declares is refused. All faults are reported at
    once. A setting that is declared `by_hand` cannot be switched on by the file alone."""
    model = joined(tuple(tables))
    tree: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        merge_file(model, tree, places, path)
    by_file = dict(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: found no '=', wanted KEY=VALUE such as tune.epochs=3.")
        put(model, tree, places, key.strip(), text, f"--set {key.strip()}")
    named = {each.flag: each for each in settings(model) if each.flag}
    for flag, value in (flags or {}).items():
        if value is not None:
            put(model, tree, places, named[flag].path, value, flag)
    for each in settings(model):
        if each.by_hand and by_file.get(each.path) and places[each.path].startswith(f"{path}:"):
            raise RecipeError(
                f"{places[each.path]}: {each.path} is set, which a file alone cannot do: {each.help} "
                f"If you trust it, pass {each.flag} as well."
            )
    origin = str(path) if path is not None else "settings"
    filled, faults = [], []
    unknown = [key for key in tree if key not in model.model_fields]
    faults += [f"{places[key]}: {key}: unknown setting.{_did_you_mean(model, key)}" for key in unknown]
    for table in tables:
        own = {key: value for key, value in tree.items() if key in table.model_fields}
        try:
            filled.append(table._filled(own, places, origin, model))
        except RecipeError as error:
            faults += [line for line in str(error).splitlines() if line not in faults]
    if faults:
        raise RecipeError("\n".join(sorted(faults, key=lambda line: _line_number(line, origin))))
    return tuple(filled)


def _line_number(fault: str, origin: str) -> int:
    """The file's line that a fault names, so that faults are reported in the order of the file; 0 without one."""
    number = fault.removeprefix(f"{origin}:").partition(":")[0]
    return int(number) if fault.startswith(f"{origin}:") and number.isdecimal() else 0


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
            shape=_shape(field.annotation),
            choices=tuple(_choices(field.annotation)),
        )


def _shape(annotation: Any) -> Literal["value", "switch", "list", "mapping"]:
    members = _members(annotation) - {NoneType}
    if members == {bool}:
        return "switch"
    origins = {get_origin(member) for member in members}
    if origins & {list, tuple}:
        return "list"
    return "mapping" if origins & {dict, Mapping} else "value"


def _choices(annotation: Any) -> list[str]:
    """The words that a setting's Literals name."""
    words: list[str] = []
    for member in sorted(_members(annotation), key=str):
        if get_origin(member) is Literal:
            words += [str(word) for word in get_args(member)]
        elif get_origin(member) in (list, tuple, dict, Mapping):
            words += [
                word for inner in get_args(member)[:1] if inner is not Ellipsis for word in _choices(inner)
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


def merge_file(model: type[Section], tree: dict[str, Any], places: dict[str, str], path: str | Path) -> None:
    """Adds what a YAML file says to `tree`, and to `places` the line of each setting."""
    _merge(model, tree, places, read_mapping(_read_file(path), str(path)))


def put(
    model: type[Section],
    tree: dict[str, Any],
    places: dict[str, str],
    path: str,
    value: str | bool | Sequence[str],
    where: str,
) -> None:
    """Sets one setting by its dotted path from a flag's text or texts; `where` is what an error calls it."""
    *outer, last = path.split(".")
    section = model
    for name in outer:
        inner = sections(section)
        if name not in inner:
            field = section.model_fields.get(name)
            if field is not None and _shape(field.annotation) == "mapping" and isinstance(value, str):
                tree[name] = dict(tree.get(name) or {})
                _put_named(tree[name], last, value, field.annotation, where)  # data.fields.text=body
                return
            raise RecipeError(f"{where}: unknown setting.{_did_you_mean(model, path)}")
        section, tree = inner[name], tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{where}: {name} is a section of settings, and is given as one value before.")
    last = former_names(section).get(last, last)
    path = ".".join([*outer, last])
    places[path] = where
    if last in sections(section):
        raise RecipeError(
            f"{where}: {path} is a section, wanted one of its settings such as {_first_in(model, path)}."
        )
    field = section.model_fields.get(last)
    if field is None:
        raise RecipeError(f"{where}: unknown setting.{_did_you_mean(model, path)}")
    annotation = field.annotation
    if isinstance(value, bool):
        tree[last] = value
    elif not isinstance(value, str):
        _put_several(tree, last, value, annotation, where)
    else:
        # Text is taken exactly as written: a template's braces and a text's last blank are no YAML.
        wants_text = _members(annotation) <= {str, NoneType}
        tree[last] = value if wants_text else _plain(read_value(value, where), annotation)


def _put_several(tree: dict[str, Any], name: str, values: Sequence[str], annotation: Any, where: str) -> None:
    """Sets a list or a mapping from the texts of a repeated flag; words of a known list may be joined by commas."""
    if _shape(annotation) == "mapping":
        tree[name] = {}
        for value in values:
            key, equals, text = value.partition("=")
            if not equals:
                raise RecipeError(f"{where} {value}: found no '=', wanted NAME=VALUE.")
            _put_named(tree[name], key.strip(), text, annotation, where)
        return
    (kind,) = {get_args(m)[0] for m in _members(annotation) if get_origin(m) in (list, tuple)}
    if _choices(kind):
        values = [word.strip() for value in values for word in value.split(",") if word.strip()]
    # Texts are taken exactly as written, as one text is: "###" is no YAML comment.
    texts_only = _members(kind) <= {str, NoneType}
    each = [value if texts_only else _plain(read_value(value, where), kind) for value in values]
    tree[name] = _as_kind(each, annotation)


def _put_named(tree: dict[str, Any], key: str, text: str, annotation: Any, where: str) -> None:
    (kind,) = {get_args(m)[1] for m in _members(annotation) if get_origin(m) in (dict, Mapping)}
    tree[key] = text if _members(kind) <= {str, NoneType} else _plain(read_value(text, where), kind)


def _as_kind(values: list[Any], annotation: Any) -> list[Any] | tuple[Any, ...]:
    """A tuple where the setting is one; strict fields take no list for it."""
    is_tuple = any(get_origin(member) is tuple for member in _members(annotation))
    return tuple(values) if is_tuple else values


def explain(model: type[Section], error: ValidationError, places: Mapping[str, str], origin: str) -> str:
    """One line for each setting that was refused: where, which, found, wanted."""
    settings_by_path = {each.path: each for each in settings(model)}
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        names = [str(part) for part in problem["loc"]]
        # Unions append the member that failed; the setting is the longest known start of the path.
        path = next(
            (p for end in range(len(names), 0, -1) if (p := ".".join(names[:end])) in settings_by_path),
            ".".join(names),
        )
        where = next((places[p] for p in (".".join(names), path) if p in places), origin)
        label = "" if where.endswith(path) else f" {path}:"
        if problem["type"] == "extra_forbidden":
            text = f"unknown setting.{_did_you_mean(model, path)}"
        elif problem["type"] == "missing":
            flag = settings_by_path[path].flag if path in settings_by_path else None
            label, text = "", f"{path} is missing. "
            text += f"Use {flag}, or write it into the file" if flag else "Write it into the file"
            text += f": {settings_by_path[path].help}" if path in settings_by_path else "."
        elif problem["type"] == "value_error":
            label, text = "", str(problem["ctx"]["error"])
        else:
            value: Any = problem["input"]
            wanted = (
                settings_by_path[path].wanted
                if path in settings_by_path
                else f"settings such as {_first_in(model, path)}"
            )
            if problem["type"] == "less_than_equal" and "of at most" not in wanted:
                wanted = f"at most {problem['ctx']['le']}"
            text = f"found {describe_value(value)}, wanted {wanted}."
        lines.setdefault(path, f"{where}:{label} {text}")
    return "\n".join(lines.values())


def _read_file(path: str | Path) -> str:
    try:
        if not Path(path).is_file() and Path(path).exists() and not Path(path).is_dir():
            raise RecipeError(f"{path}: found a device or a pipe, wanted a recipe file.")
        if Path(path).exists() and Path(path).stat().st_size > 4 * MAX_CHARACTERS:
            raise RecipeError(
                f"{path}: found a file of {Path(path).stat().st_size:,} bytes, wanted a recipe. Is it the data? Then: "
                f"--data {path}."
            )
        return Path(path).read_text(encoding="utf-8")
    except RecipeError:
        raise
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
    inner, former = sections(model), former_names(model)
    for key, item in written.items():
        if former.get(key, key) not in written:  # with both names set, the section refuses them
            key = former.get(key, key)
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
    members = _members(annotation)
    if isinstance(item.value, dict):
        inner = next(
            (get_args(member)[1] for member in members if get_origin(member) in (dict, Mapping)), Any
        )
        return {key: _plain(value, inner) for key, value in item.value.items()}
    if isinstance(item.value, list):
        inner = next((get_args(member)[0] for member in members if get_origin(member) in (list, tuple)), Any)
        return _as_kind([_plain(value, inner) for value in item.value], annotation)
    if item.value is not None and members <= {str, NoneType}:
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
    if get_origin(annotation) in (dict, Mapping):
        kinds = {"text": "texts", "a number": "numbers"}
        inner = _wanted(get_args(annotation)[1])
        keys = "names" if _members(get_args(annotation)[0]) == {str} else "whole numbers"
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


def _first_in(model: type[Section], section: str) -> str:
    paths = [each.path for each in settings(model)]
    return next((path for path in paths if path.startswith(f"{section}.")), paths[0])


def _did_you_mean(model: type[Section], path: str) -> str:
    """The nearest known setting as a question, or where to look."""
    paths = [each.path for each in sorted(settings(model), key=lambda each: each.flag is None)]
    section, _, last = path.rpartition(".")
    same_name = [name for name in paths if name.split(".")[-1] == last]
    siblings = {name.split(".")[-1]: name for name in paths if name.rpartition(".")[0] == section}
    anywhere = {name.split(".")[-1]: name for name in reversed(paths)}
    elsewhere = {each.elsewhere: each.path for each in settings(model)}
    near = (
        " or ".join(same_name)
        or elsewhere.get(last)
        or siblings.get(nearest(last, siblings) or "")
        or anywhere.get(nearest(last, anywhere) or "")
        or nearest(path, paths, 0.75)
    )
    return f" Did you mean {near}?" if near else " `softprompt recipe` lists them all."
