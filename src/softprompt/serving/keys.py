"""Keys and the prompts they may use: keys are stored as digests and compared in constant time."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from softprompt.errors import RecipeError
from softprompt.serving.refusals import Refused
from softprompt.settings.text import read_list
from softprompt.store.plain_file import read_text

log = logging.getLogger(__name__)

LARGEST_BYTES = 4_000_000  # of a key file
MOST_VALUES = 100_000  # in it, aliases opened: some ten thousand keys


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    models: list[str] = ["*"]
    rows: int = Field(default=64, ge=1)
    admin: bool = False


@dataclass(frozen=True)
class Caller:
    """A caller: the prompts they may see, and how many rows they may run at once."""

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
    """The digest that a key file holds in place of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a file. Without a file anyone may use everything but the administration."""

    def __init__(self, keys: Sequence[_Key] = (), path: Path | None = None) -> None:
        self._keys = list(keys)
        self._path = path
        self._stamp = _stamp(path)

    @property
    def are_wanted(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._keys)

    def refresh(self) -> None:
        """Reads the file again where it has changed: a key that was taken out is refused from then on.

        A file that cannot be read leaves the keys as they are, and is said in the log."""
        if self._path is None or _stamp(self._path) == self._stamp:
            return
        stamp = _stamp(self._path)
        try:
            self._keys = Keys.load(self._path)._keys
        except RecipeError as error:
            log.error("The keys stay as they were: %s", error)
        self._stamp = stamp

    @classmethod
    def load(cls, path: str | Path | None) -> Keys:
        """Reads a YAML list of {name, sha256, models, rows, admin}. Raises RecipeError."""
        if path is None:
            return cls()
        try:
            listed = read_list(read_text(Path(path), LARGEST_BYTES), str(path), MOST_VALUES)
            keys = TypeAdapter(list[_Key]).validate_python(listed)
        except (OSError, UnicodeDecodeError) as error:
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
        return cls(keys, Path(path))

    def demand_caller(self, authorization: str | None) -> Caller:
        """The caller that a header belongs to. Raises Refused (401) where the key is missing or wrong."""
        caller = self.caller(authorization)
        if caller is None:
            raise Refused(
                401,
                "The key is missing or not known. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        return caller

    def caller(self, authorization: str | None) -> Caller | None:
        """The caller that a header belongs to; None where the key is missing or wrong."""
        if not self._keys:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256_of(key.strip())
        caller = None
        for key_entry in self._keys:  # all are compared, so that the time reveals nothing
            if hmac.compare_digest(key_entry.sha256, digest) and scheme.lower() == "bearer":
                caller = Caller(key_entry.name, tuple(key_entry.models), key_entry.rows, key_entry.admin)
        return caller


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)
