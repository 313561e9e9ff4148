"""The index of a library: which version each name means, and the digest of every version."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt.errors import DamagedPrompt, PromptError

INDEX = "index.json"


class Version(BaseModel):
    """One version of a prompt, as it was when it was published. `metrics` are figures on held-out data."""

    model_config = ConfigDict(extra="ignore")
    digest: str
    base: str
    kind: str
    virtual_tokens: int
    bytes: int
    published: str
    metrics: dict[str, float] = {}


class Name(BaseModel):
    """The versions that a name means: `current`, and before that `former`."""

    model_config = ConfigDict(extra="ignore")
    current: int
    former: int | None = None
    versions: dict[int, Version]


class Index(BaseModel):
    """Everything that a library holds."""

    model_config = ConfigDict(extra="ignore")
    schema_version: int = 1
    names: dict[str, Name] = {}

    def find(self, name: str, where: str) -> tuple[str, int, Version]:
        """The current version of `name`, or the one that `name@3` means. Raises PromptError, listing the names."""
        bare, _, asked = name.partition("@")
        entry = self.names.get(bare)
        if entry is not None:
            for number, version in entry.versions.items():
                if number == entry.current if not asked else str(number) == asked:
                    return bare, number, version
        names = ", ".join(sorted(self.names)) or "nothing"
        raise PromptError(
            f"{where}: has no prompt {name}; it has {names}. `softprompt list {where}` shows all."
        )


def parse_index(text: str, where: str) -> Index:
    """Reads an index. Raises DamagedPrompt."""
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        raise DamagedPrompt(
            f"{where}: is not the index of a library ({error.errors()[0]['msg']}). Restore it."
        ) from error
