"""Who may use which prompts: keys are kept as digests and compared in constant time."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from softprompt.errors import RecipeError


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    models: list[str] = ["*"]
    rows: int = Field(default=64, ge=1)
    admin: bool = False


@dataclass(frozen=True)
class Caller:
    """Who asks: what they may see, and how many rows they may have at once."""

    name: str
    models: tuple[str, ...] = ("*",)
    rows: int = 1_000_000
    admin: bool = False

    def may_use(self, model: str) -> bool:
        """Whether a model of this name exists for them."""
        bare = model.partition("@")[0]
        return any(fnmatch.fnmatchcase(bare, pattern) for pattern in self.models)


ANYONE = Caller("anyone", admin=False)


def sha256_of(key: str) -> str:
    """What a key file holds in place of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a file. Without a file anyone may use everything but the administration."""

    def __init__(self, keys: Sequence[_Key] = ()) -> None:
        self._keys = list(keys)

    @classmethod
    def load(cls, path: str | Path | None) -> Keys:
        """Read a YAML list of {name, sha256, models, rows, admin}. Raises RecipeError."""
        if path is None:
            return cls()
        try:
            listed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            keys = TypeAdapter(list[_Key]).validate_python(listed)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path}: the keys cannot be read ({error}). Check --keys.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RecipeError(
                f"{path}: {where}: {first['msg']}. Wanted a list of entries with name and sha256, and models, rows, admin."
            ) from error
        if not keys:
            raise RecipeError(
                f"{path}: holds no key, so nobody could ask anything. Add one, or leave --keys out."
            )
        return cls(keys)

    def caller(self, authorization: str | None) -> Caller | None:
        """Who a header stands for; None where the key is missing or wrong."""
        if not self._keys:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256_of(key.strip())
        found = None
        for known in self._keys:  # all are compared, so that time tells nothing
            if hmac.compare_digest(known.sha256, digest) and scheme.lower() == "bearer":
                found = Caller(known.name, tuple(known.models), known.rows, known.admin)
        return found
