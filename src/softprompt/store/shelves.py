"""Locations of a library: a folder, or an address that fsspec knows (s3://, gs://, memory://, ...).

A folder of a version is never changed, and an index is replaced as a whole, so a reader sees the former state or the new one.
What lies elsewhere is copied into a cache on this machine, under its digest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import platformdirs

from softprompt.errors import DamagedPrompt, MissingExtra, PromptError, SaveError
from softprompt.store.atomic import replace_file
from softprompt.store.index import INDEX
from softprompt.store.lock import locked
from softprompt.store.ownership import check_replaceable, folder_named, make_folder
from softprompt.store.plain_file import read_text

FILES = ("softprompt.json", "adapter_model.safetensors", "adapter_config.json", "README.md")
LOCK_WAITS_SECONDS = 30.0  # for another program that publishes


class Shelf(Protocol):
    """The files of a library."""

    name: str

    def stamp(self) -> str | None:
        """Changes whenever the index does; None while there is none."""

    def index(self) -> str | None:
        """The index's text; None while there is none. Raises DamagedPrompt."""

    def write_index(self, text: str) -> None:
        """Replaces the index. Raises SaveError."""

    def has(self, version: str) -> bool:
        """Whether something that cannot be replaced lies where `version` would."""

    def add(self, folder: Path, version: str) -> None:
        """Copies the folder of a saved prompt in as `version` (NAME/NUMBER). Raises SaveError."""

    def folder(self, version: str, digest: str) -> Path:
        """A folder on this machine that holds a version. Raises PromptError."""

    def locked(self) -> AbstractContextManager[None]:
        """While inside, nobody else publishes, where that can be helped."""


class LocalShelf:
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = folder_named(path), str(path)

    def stamp(self) -> str | None:
        try:
            status = (self.path / INDEX).stat()
        except OSError:
            return None
        # Two switches within a clock tick leave time and size as they were, but not the file: it is replaced by rename.
        return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"

    def index(self) -> str | None:
        try:
            return read_text(self.path / INDEX)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedPrompt(f"{self.path / INDEX}: cannot be read ({error}). Restore it.") from error

    def write_index(self, text: str) -> None:
        try:
            replace_file(self.path / INDEX, text)
        except OSError as error:
            raise SaveError(f"{self.path / INDEX}: cannot be written ({error.strerror}).") from error

    def has(self, version: str) -> bool:
        return os.path.lexists(self.path / version)

    def add(self, folder: Path, version: str) -> None:
        version_folder = self.path / version
        draft = version_folder.parent / f".{version_folder.name}.{os.getpid()}.draft"
        try:
            # Drafts of publishers that were killed: no other one holds the lock.
            for former in version_folder.parent.glob(".*.draft"):
                shutil.rmtree(former, ignore_errors=True)
            shutil.copytree(folder, draft)
            os.replace(draft, version_folder)
        except OSError as error:
            raise SaveError(
                f"{version_folder}: cannot be written ({error.strerror or error}). Nothing was published."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def folder(self, version: str, digest: str) -> Path:
        return self.path / version

    def locked(self) -> AbstractContextManager[None]:
        check_replaceable(self.path, (INDEX,), kind="library")
        make_folder(self.path)
        return locked(self.path, "publishing", wait_seconds=LOCK_WAITS_SECONDS)


class RemoteShelf:
    """An address of fsspec. Storage there has no locks: an index that changed meanwhile is refused, not overwritten."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.files, self.root = _opened(self.name)
        self._read_stamp: str | None = None

    def stamp(self) -> str | None:
        try:
            self.files.invalidate_cache()
            return str(self.files.ukey(f"{self.root}/{INDEX}"))
        except FileNotFoundError:
            return None
        except Exception as error:  # each kind of storage has errors of its own
            raise PromptError(f"{self.name}: cannot be reached ({error}). Check the address.") from error

    def index(self) -> str | None:
        self._read_stamp = self.stamp()
        if self._read_stamp is None:
            return None
        try:
            content: bytes = self.files.cat_file(f"{self.root}/{INDEX}")
            return content.decode()
        except Exception as error:
            raise DamagedPrompt(f"{self.name}/{INDEX}: cannot be read ({error}). Restore it.") from error

    def write_index(self, text: str) -> None:
        if self.stamp() != self._read_stamp:
            raise SaveError(f"{self.name}: another program published meanwhile. Publish again.")
        try:
            self.files.pipe_file(f"{self.root}/{INDEX}", text.encode())
        except Exception as error:
            raise SaveError(f"{self.name}/{INDEX}: cannot be written ({error}).") from error

    def has(self, version: str) -> bool:
        return False  # files that no index names are overwritten

    def add(self, folder: Path, version: str) -> None:
        try:
            self.files.makedirs(f"{self.root}/{version}", exist_ok=True)
            for path in sorted(folder.iterdir()):
                self.files.pipe_file(f"{self.root}/{version}/{path.name}", path.read_bytes())
        except Exception as error:
            raise SaveError(
                f"{self.name}/{version}: cannot be written ({error}). Nothing was published."
            ) from error

    def folder(self, version: str, digest: str) -> Path:
        return copied(f"{self.name}/{version}", digest)

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()


def shelf_at(location: str | Path) -> Shelf:
    """The shelf at a folder or an address. Raises MissingExtra for an address whose package is not installed."""
    return RemoteShelf(str(location)) if is_address(location) else LocalShelf(folder_named(location))


def is_address(location: str | Path) -> bool:
    """Whether it is an address of fsspec, and no path."""
    return "://" in str(location)


def copied(url: str, digest: str) -> Path:
    """A copy, in the cache of this machine, of a prompt's folder at an address. Raises PromptError.

    The caller compares the digest, so that a cache that was tampered with is found too."""
    cache = Path(platformdirs.user_cache_dir("softprompt")) / "prompts"
    copy_folder = cache / digest
    if copy_folder.is_dir():
        return copy_folder
    files, root = _opened(url)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            for name in FILES:
                if files.exists(f"{root}/{name}"):
                    (Path(draft) / name).write_bytes(files.cat_file(f"{root}/{name}"))
            if not any(Path(draft).iterdir()):
                raise PromptError(f"{url}: holds no prompt. Give the address of a folder that `tune` saved.")
            whole = Path(draft).with_name(f"{Path(draft).name}.whole")
            shutil.copytree(draft, whole)
        try:
            os.replace(whole, copy_folder)
        except OSError:  # another process was faster
            shutil.rmtree(whole, ignore_errors=True)
    except PromptError:
        raise
    except Exception as error:
        raise PromptError(f"{url}: cannot be read ({error}). Check the address.") from error
    return copy_folder


def _opened(url: str) -> tuple[Any, str]:
    import fsspec.core

    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingExtra(
            f"{url}: {error}. S3 and Google Cloud need pip install 'softprompt[remote]'; see fsspec for others."
        ) from error
    except Exception as error:
        raise PromptError(f"{url}: is no address that fsspec knows ({error}). Check it.") from error
    return files, str(root).rstrip("/")
