"""A table on a page of the docs, between two marks."""

from __future__ import annotations

from pathlib import Path


def put_table(page: Path, name: str, text: str) -> None:
    """Puts `text` in place of what stands between the page's marks of that name. Raises ValueError without them."""
    begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
