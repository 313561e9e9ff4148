"""The package's metadata: README.md with links that hold on a package index, and the project's URLs.

On an index there are no files beside the README. Where `repository` is set in pyproject.toml, relative links become absolute and the
project gets its URLs; without it, links keep their words and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Metadata(MetadataHookInterface):
    """Fills in what pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = str(self.config.get("repository", "")).rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, repository)}
        if repository:
            metadata["urls"] = {
                "Repository": repository,
                "Documentation": f"{repository}/blob/main/docs/index.md",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }


def for_an_index(text: str, repository: str) -> str:
    """Markdown whose links and pictures do not depend on files beside it."""
    picture, link = r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)\n*", r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)"
    if repository:
        text = re.sub(picture, lambda found: f"![{found[1]}]({repository}/raw/main/{found[2]})\n\n", text)
        return re.sub(link, lambda found: f"[{found[1]}]({repository}/blob/main/{found[2]})", text)
    return re.sub(link, r"\1", re.sub(picture, "", text))
