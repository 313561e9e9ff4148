"""Refused settings in words: where each was written, what was found, what was wanted, and the nearest known name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from softprompt.errors import nearest
from softprompt.settings.section import Section, settings
from softprompt.settings.text import describe_value


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
            text = f"unknown setting.{nearest_setting(model, path)}"
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
                else f"settings such as {first_in(model, path)}"
            )
            if problem["type"] == "less_than_equal" and "of at most" not in wanted:
                wanted = f"at most {problem['ctx']['le']}"
            text = f"found {describe_value(value)}, wanted {wanted}."
        lines.setdefault(path, f"{where}:{label} {text}")
    return "\n".join(lines.values())


def first_in(model: type[Section], section: str) -> str:
    paths = [each.path for each in settings(model)]
    return next((path for path in paths if path.startswith(f"{section}.")), paths[0])


def nearest_setting(model: type[Section], path: str) -> str:
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
