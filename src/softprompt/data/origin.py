"""Where rows come from: files by split, rows in memory, a data set of the hub, a bundled one; found by what a user writes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from softprompt.data.delimited import Quoting
from softprompt.data.files import Raw, data_suffix, named_classes, quiet_datasets, read_file, refuse_special
from softprompt.data.memory import MemoryRows, Source, checked, package_of, split_mapping
from softprompt.errors import DataError, SoftPromptError, did_you_mean

BUILTIN = Path(__file__).parent / "builtin"

SPLIT_NAMES = {  # other names under which a split is found
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_GIVEN = "the given rows"  # how messages name rows that came from no file
_HASHED_BYTES = 2**30  # larger files go without a revision rather than being read through


@dataclass(frozen=True)
class Asked:
    """The settings by which a source is read; assumptions made while reading are added to `notes`."""

    revision: str | None
    config: str | None
    encoding: str | None
    quoting: Quoting
    streaming: bool
    limit: int | None
    notes: list[str]

    def files(self, name: str, by_split: Mapping[str, tuple[Path, ...]]) -> FilesOrigin:
        """Files that are read so."""
        return FilesOrigin(name, by_split, self.encoding, self.notes, self.quoting)


class Origin(Protocol):
    """A source that was found: its name for messages, what fixes its content, its splits and their rows."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def endless(self) -> bool: ...  # rows may never end, so every split is read up to the limit

    def splits(self) -> tuple[str, ...]: ...

    def rows(self, split: str) -> Iterator[Raw]: ...


@dataclass(frozen=True)
class FilesOrigin:
    """Files on this machine, by split. A single file is a `train` split and nothing else."""

    name: str
    by_split: Mapping[str, tuple[Path, ...]]
    encoding: str | None
    notes: list[str]
    quoting: Quoting = "auto"
    endless: bool = False

    @property
    def revision(self) -> str | None:
        paths = [path for paths in self.by_split.values() for path in paths]
        if sum(path.stat().st_size for path in paths) > _HASHED_BYTES:
            return None
        digests = []
        for path in paths:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return "sha256:" + (
            digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        )

    def splits(self) -> tuple[str, ...]:
        return tuple(self.by_split)

    def rows(self, split: str) -> Iterator[Raw]:
        for path in self.by_split[split_name(split, self)]:
            yield from read_file(path, encoding=self.encoding, notes=self.notes, quoting=self.quoting)


@dataclass(frozen=True)
class MemoryOrigin:
    """Rows in memory, by split."""

    by_split: Mapping[str, MemoryRows]
    name: str = _GIVEN
    revision: str | None = None
    endless: bool = False

    def splits(self) -> tuple[str, ...]:
        return tuple(self.by_split)

    def rows(self, split: str) -> Iterator[Raw]:
        return self.by_split[split_name(split, self)].rows()


@dataclass(frozen=True)
class HubOrigin:
    """A data set that `datasets` loaded: splits by name, from the hub, its cache or a folder that it saved."""

    name: str
    parts: Mapping[str, Any]
    asked: str | None = None
    revision: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "revision", _commit(self.parts) or self.asked)

    @property
    def endless(self) -> bool:
        return any(not hasattr(part, "__len__") for part in self.parts.values())

    def splits(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def rows(self, split: str) -> Iterator[Raw]:
        part = self.parts[split_name(split, self)]
        if hasattr(part, "with_format"):
            part = part.with_format(None)  # plain Python values, whatever the data set was set to give
        features = part.features
        if (
            features
        ):  # leave images, sound and arrays where they are: decoding them is slow and of no use here
            plain = [
                name
                for name, feature in features.items()
                if not hasattr(feature, "decode_example") or hasattr(feature, "names")
            ]
            part = part.select_columns(plain)
        with quiet_datasets():
            try:
                for raw in part:
                    yield named_classes(dict(raw), features)
            except SoftPromptError:
                raise
            except Exception as error:  # the network, pyarrow and fsspec raise many kinds
                raise DataError(f"{self.name}: reading split {split!r} failed: {_lines(error)}.") from error


def find_origin(source: Source, asked: Asked) -> Origin:
    """The origin that a source names or is. Raises DataError for none."""
    if not isinstance(source, (str, os.PathLike)):
        return _in_memory(source, asked.limit)
    written = os.fspath(source)
    if not written.strip():
        raise DataError(
            "data.source is empty. Give a file, a folder, builtin:NAME, or a data set's id on the hub."
        )
    if written.startswith("builtin:"):
        return _builtin(written.removeprefix("builtin:"), asked.notes)
    path = Path(written).expanduser()
    if path.is_dir():
        return _folder(path, written, asked)
    if path.exists():
        refuse_special(path)
        if data_suffix(path) is None:
            raise DataError(
                f"{written}: not a data file by its name. Wanted csv, tsv, json, jsonl or parquet."
            )
        return asked.files(written, {"train": (path,)})
    if not isinstance(source, str) or reads_as_path(written):
        raise DataError(
            f"{written}: no such file or folder (looked in {Path.cwd()}).{_near(path)} Check data.source."
        )
    return _hub(written, asked.revision, asked.config, asked.streaming)


def _in_memory(source: object, limit: int | None) -> Origin:
    """Rows in memory, as one split called train or as the splits that they are given by."""
    if split_mapping(source, sum(SPLIT_NAMES.values(), ())):
        assert isinstance(source, Mapping)
        parts = {str(name): part for name, part in source.items()}
    else:
        parts = {"train": source}
    for part in parts.values():
        if package_of(part) == "datasets" and not hasattr(part, "__len__") and limit is None:
            raise DataError(
                f"{_GIVEN.capitalize()}: an {type(part).__name__} need not end. Set data.limit to the rows to read."
            )
    if all(package_of(part) == "datasets" and hasattr(part, "features") for part in parts.values()):
        return HubOrigin(_GIVEN, parts)
    name = "{}" if len(parts) == 1 else "{}, split {}"
    return MemoryOrigin({split: checked(part, name.format(_GIVEN, split)) for split, part in parts.items()})


def split_name(wanted: str, origin: Origin) -> str:
    """Finds the source's own name of a split. Raises DataError, naming those it has."""
    splits = origin.splits()
    alike = next((names for names in SPLIT_NAMES.values() if wanted in names), ())
    for name in (wanted, *alike):
        if name in splits:
            return name
    if isinstance(origin, FilesOrigin) and splits == ("train",):
        beside = next((path for paths in origin.by_split.values() for path in paths), Path()).with_stem(
            wanted
        )
        hint = f" Did you mean the file {beside}?" if beside.exists() else ""
        raise DataError(
            f"{origin.name} is a single file and has no split {wanted!r}.{hint} "
            "Give a file, a number of rows such as 50, or a share such as 0.1."
        )
    raise DataError(
        f"{origin.name} has no split {wanted!r}; it has: {', '.join(splits)}.{did_you_mean(wanted, splits)}"
    )


def _builtin(name: str, notes: list[str]) -> Origin:
    bundled = sorted(
        path.stem for path in BUILTIN.glob("*") if path.suffix == ".csv" or (path / "train.csv").is_file()
    )
    if name not in bundled:
        raise DataError(
            f"builtin:{name} is not bundled; these are: {', '.join(f'builtin:{stem}' for stem in bundled)}."
            f"{did_you_mean(name, bundled)}"
        )
    if (BUILTIN / f"{name}.csv").is_file():
        return FilesOrigin(f"builtin:{name}", {"train": (BUILTIN / f"{name}.csv",)}, "utf-8", notes)
    return FilesOrigin(f"builtin:{name}", _split_files([BUILTIN / name]), "utf-8", notes)


def _folder(path: Path, written: str, asked: Asked) -> Origin:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with quiet_datasets() as datasets:
            try:
                loaded = datasets.load_from_disk(str(path))
            except Exception as error:  # pyarrow and datasets raise many kinds
                raise DataError(
                    f"{written}: datasets cannot load it: {_lines(error)}. Save it again."
                ) from error
        return HubOrigin(written, loaded if isinstance(loaded, Mapping) else {"train": loaded})
    by_split = _split_files([path / asked.config] if asked.config else [path, path / "data"])
    if by_split:
        return asked.files(written, by_split)
    files = sorted(file for file in path.iterdir() if file.is_file() and data_suffix(file))
    if len(files) == 1:
        return asked.files(written, {"train": (files[0],)})
    seen = ", ".join(file.name for file in files[:6]) or "no data file"
    raise DataError(
        f"{written} is a folder with {seen}{', ...' if len(files) > 6 else ''}; wanted train.csv (or tsv, json, jsonl, "
        "parquet), and validation and test beside it. Name one of its files, or rename them."
    )


def _split_files(folders: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Files called after splits (train.csv, train-00000-of-00002.parquet), in the first folder that has any."""
    for folder in folders:
        by_split: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*")):
            stem = re.sub(r"-\d+-of-\d+$", "", path.name.split(".")[0])
            split = next((name for name, aliases in SPLIT_NAMES.items() if stem in aliases), None)
            if split and path.is_file() and data_suffix(path):
                by_split.setdefault(split, []).append(path)
        if by_split:
            return {name: tuple(paths) for name, paths in by_split.items()}
    return {}


def _hub(name: str, revision: str | None, config: str | None, streaming: bool) -> Origin:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(
            f"{name!r} is no file, no folder, and no data set's id (owner/name). Check data.source."
        )
    with quiet_datasets() as datasets:
        try:
            parts = datasets.load_dataset(name, name=config, revision=revision, streaming=streaming)
        except Exception as error:  # the hub, its cache and its builders raise many kinds
            raise DataError(_unavailable(name, config, error)) from error
    return HubOrigin(name, parts, revision)


def _unavailable(name: str, config: str | None, error: Exception) -> str:
    local = f"or save its rows as a csv file and set data.source (--data) to that file.{_near(Path(name))}"
    if isinstance(error, ValueError) and ("Config name" in str(error) or "BuilderConfig" in str(error)):
        return f"{name}: data.config is {config or 'not set'}: {_lines(error, 3)}. Set data.config to one of these."
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    offline = "Offline" in str(error) or any(
        os.environ.get(switch, "0") not in ("", "0") for switch in switches
    )
    if offline:
        return (
            f"{name} is no file or folder here, and as a data set of the hub it is not in the local cache while the "
            "hub is switched off (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE). Switch it on for the first download, "
            + local
        )
    return (
        f"{name} is no file or folder here, and loading it from the hub failed: {_lines(error)}. "
        "Check its id, the network, and your access (hf auth login), " + local
    )


def _commit(parts: Mapping[str, Any]) -> str | None:
    """Reads the commit that `datasets` downloaded from out of the files' addresses."""
    for part in parts.values():
        for address in getattr(getattr(part, "info", None), "download_checksums", None) or {}:
            commit = re.search(r"@([0-9a-f]{40})/", str(address))
            if commit:
                return commit[1]
    return None


def reads_as_path(written: str) -> bool:
    """Whether a user who writes this means a file or folder, rather than a split or a data set of the hub."""
    return (
        data_suffix(Path(written)) is not None
        or written.startswith((".", "/", "~"))
        or "\\" in written
        or written.count("/") > 1
    )


def _near(path: Path) -> str:
    """Suggests a file beside `path` with a similar name."""
    folder = path.expanduser().parent
    if not folder.is_dir():
        return ""
    hint = did_you_mean(path.name, [file.name for file in islice(folder.iterdir(), 2000)])
    return hint if hint else ""


def _lines(error: BaseException, count: int = 1) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:count]).rstrip(".") or type(error).__name__
