"""The map of the source in docs/architecture.md: every folder and file with the first sentence of its docstring.

`python tests/house_map.py` writes it anew; a test compares."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "softprompt"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: made by tests/house_map.py -->\n", "<!-- end of map -->\n"


def first_sentence(path: Path) -> str:
    """What a module says of itself, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[.])\s|\n\n", " ".join(text.split("\n")), maxsplit=1)[0].strip()


def lines(folder: Path, depth: int = 0) -> list[str]:
    """The files of a folder, then its folders, indented by depth."""
    found: list[str] = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py" or depth == 0:
            found.append(f"{'  ' * depth}{path.name:<22} {first_sentence(path)}")
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        found.append("")
        found.append(f"{'  ' * depth}{inner.name + '/':<22} {first_sentence(inner / '__init__.py')}")
        found += lines(inner, depth + 1)
    return found


def house_map() -> str:
    """The map as the page holds it."""
    return f"{BEGIN}```text\n" + "\n".join(line.rstrip() for line in lines(SOURCE)) + f"\n```\n{END}"


def with_map(page: str) -> str:
    """The page with a current map."""
    start, end = page.index(BEGIN), page.index(END) + len(END)
    return page[:start] + house_map() + page[end:]


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
