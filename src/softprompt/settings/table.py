"""A table of settings, such as a recipe: filled from Python, a YAML file, `--set` and flags alike. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import yaml
from pydantic import ValidationError

from softprompt.errors import RecipeError
from softprompt.settings.explain import explain, nearest_setting
from softprompt.settings.section import Section, joined, sections, settings
from softprompt.settings.sources import merge_file, put


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
    faults += [f"{places[key]}: {key}: unknown setting.{nearest_setting(model, key)}" for key in unknown]
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
