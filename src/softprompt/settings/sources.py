"""Settings from text: a YAML file, `--set` and flags into one tree of plain values, each with the place it came from.

The tree holds the values by name; beside it, `places` holds where each was written, by dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from softprompt.errors import RecipeError
from softprompt.settings.explain import first_in, nearest_setting
from softprompt.settings.section import Section, choices_of, former_names, members_of, sections, shape_of
from softprompt.settings.text import MAX_CHARACTERS, Written, read_mapping, read_value


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
            if field is not None and shape_of(field.annotation) == "mapping" and isinstance(value, str):
                tree[name] = dict(tree.get(name) or {})
                _put_named(tree[name], last, value, field.annotation, where)  # data.fields.text=body
                return
            raise RecipeError(f"{where}: unknown setting.{nearest_setting(model, path)}")
        section, tree = inner[name], tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{where}: {name} is a section of settings, and is given as one value before.")
    last = former_names(section).get(last, last)
    path = ".".join([*outer, last])
    places[path] = where
    if last in sections(section):
        raise RecipeError(
            f"{where}: {path} is a section, wanted one of its settings such as {first_in(model, path)}."
        )
    field = section.model_fields.get(last)
    if field is None:
        raise RecipeError(f"{where}: unknown setting.{nearest_setting(model, path)}")
    annotation = field.annotation
    if isinstance(value, bool):
        tree[last] = value
    elif not isinstance(value, str):
        _put_several(tree, last, value, annotation, where)
    else:
        # Text is taken exactly as written: a template's braces and a text's last blank are no YAML.
        wants_text = members_of(annotation) <= {str, NoneType}
        tree[last] = value if wants_text else _plain(read_value(value, where), annotation)


def _put_several(tree: dict[str, Any], name: str, values: Sequence[str], annotation: Any, where: str) -> None:
    """Sets a list or a mapping from the texts of a repeated flag; words of a known list may be joined by commas."""
    if shape_of(annotation) == "mapping":
        tree[name] = {}
        for value in values:
            key, equals, text = value.partition("=")
            if not equals:
                raise RecipeError(f"{where} {value}: found no '=', wanted NAME=VALUE.")
            _put_named(tree[name], key.strip(), text, annotation, where)
        return
    (kind,) = {get_args(m)[0] for m in members_of(annotation) if get_origin(m) in (list, tuple)}
    if choices_of(kind):
        values = [word.strip() for value in values for word in value.split(",") if word.strip()]
    # Texts are taken exactly as written, as one text is: "###" is no YAML comment.
    texts_only = members_of(kind) <= {str, NoneType}
    each = [value if texts_only else _plain(read_value(value, where), kind) for value in values]
    tree[name] = _as_kind(each, annotation)


def _put_named(tree: dict[str, Any], key: str, text: str, annotation: Any, where: str) -> None:
    (kind,) = {get_args(m)[1] for m in members_of(annotation) if get_origin(m) in (dict, Mapping)}
    tree[key] = text if members_of(kind) <= {str, NoneType} else _plain(read_value(text, where), kind)


def _as_kind(values: list[Any], annotation: Any) -> list[Any] | tuple[Any, ...]:
    """A tuple where the setting is one; strict fields take no list for it."""
    is_tuple = any(get_origin(member) is tuple for member in members_of(annotation))
    return tuple(values) if is_tuple else values


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
        raise RecipeError(
            f"{path}: found a folder, wanted a recipe file. A prompt's folder is given as --prompt {path}."
        ) from None
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
    members = members_of(annotation)
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
