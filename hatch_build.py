"""The package's metadata: the version from git's tags, README.md with links that hold on a package index, and the URLs.

The tag v0.3.0 makes 0.3.0, twelve commits after it 0.3.1.dev12. Without such a tag or without git it is a development version of
NEXT.

On an index there are no files beside the README. Where `repository` is set in pyproject.toml, relative links become absolute and the
project gets its URLs; without it, links keep their words and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface
from setuptools_scm import ScmVersion, get_version
from setuptools_scm.version import guess_next_dev_version

NEXT = "0.2.0"


def version(folder: str = str(Path(__file__).parent)) -> str:
    """The version of the checkout, or of the unpacked source archive, in `folder`."""
    return get_version(
        folder,
        version_scheme=_scheme,
        local_scheme="no-local-version",
        fallback_version=f"{NEXT}.dev0",
    )


def _scheme(scm: ScmVersion) -> str:
    """Tags decide; before the first one, commits count towards NEXT."""
    if str(scm.tag) == "0.0":
        return f"{NEXT}.dev{scm.distance or 0}"
    return guess_next_dev_version(scm)


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
