"""The index of a library: which version each name means, and the digest of every version."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprompt.errors import DamagedPrompt, PromptError

INDEX = "index.json"

# An index may come from a stranger: a name becomes a folder of the library, and a digest one of this machine's cache.
PromptName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Number: TypeAlias = Annotated[int, Field(ge=1, lt=10**9)]
Size: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]


class Version(BaseModel):
    """One version of a prompt, as it was when it was published. `metrics` are figures on held-out data."""

    model_config = ConfigDict(extra="ignore")
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    base: Annotated[str, Field(max_length=4096)]
    kind: Annotated[str, Field(max_length=100)]
    virtual_tokens: Size
    bytes: Size
    published: Annotated[str, Field(max_length=100)]
    metrics: dict[str, float] = {}


class Name(BaseModel):
    """The versions that a name means: `current`, and before that `former`."""

    model_config = ConfigDict(extra="ignore")
    current: Number
    former: Number | None = None
    versions: dict[Number, Version]


class Index(BaseModel):
    """Everything that a library holds."""

    model_config = ConfigDict(extra="ignore")
    schema_version: Literal[1] = 1
    names: dict[PromptName, Name] = {}

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
        index = Index.model_validate_json(text)
        if "schema_version" not in index.model_fields_set:
            raise DamagedPrompt(f"{where}: is not the index of a library (no schema_version). Restore it.")
        return index
    except ValidationError as error:
        raise DamagedPrompt(
            f"{where}: is not the index of a library ({error.errors()[0]['msg']}). Restore it."
        ) from error
