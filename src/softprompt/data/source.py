"""Examples from any source, parted into what is learned from, chosen by and judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from softprompt.data.columns import Columns
from softprompt.data.delimited import Quoting
from softprompt.data.example import Example, Splits
from softprompt.data.held_out import Draw, default_count, how_many
from softprompt.data.label_notes import single_note, sorted_note, variants_note, withheld_note
from softprompt.data.memory import Source
from softprompt.data.origin import (
    SPLIT_NAMES,
    Asked,
    FilesOrigin,
    Origin,
    find_origin,
    reads_as_path,
    split_name,
)
from softprompt.errors import DataError

OWN = "own"  # the source's own split of that name if it has one, and nothing else

Held = float | int | str | Path | None


def load_splits(
    source: Source,
    *,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    fields: Mapping[str, str] | None = None,
    messages: str | None = None,
    target: str | None = None,
    references: str | None = None,
    limit: int | None = None,
    validation: Held = None,
    test: Held = None,
    seed: int = 0,
    encoding: str | None = None,
    quoting: Quoting = "auto",
    streaming: bool = False,
) -> Splits:
    """Reads rows and parts them into what is learned from, chosen by and judged on.

    `source`: a file (csv, tsv, json, jsonl, parquet), a folder of such files named after their splits, a folder that
    `datasets` saved, "builtin:NAME", or a data set's id on the hub; local files come first. Or rows in memory: any
    iterable of texts, mappings and Examples, a pandas or polars DataFrame, a pyarrow Table, a Dataset or (with a
    `limit`) an IterableDataset, and a DatasetDict or a mapping of split names to any of these. Rows in memory are
    numbered from 0 in the order in which they come.

    Every column of text or numbers is a field under its own name. `column` is also {text}; `fields` gives columns
    other names (template name to column; "instances.0.output" reaches into nested values); `messages` is the column
    of chat turns (by itself where it is called messages or conversations). What is learned (`target`, else `column`)
    must not be blank. `references` is a column of lists: further right answers, which only judging reads.

    `limit` takes the first rows of `split`. `validation` and `test` are a share of those rows (0.1), a number of
    them (50), the name of a split, or a file; shares and numbers are drawn by `seed`, in a way that adding a test
    part leaves the validation part as it was. "own" takes the source's own split of that name if it has one, 0 none.
    None is "own"; but where that gives no validation rows, and there are 40 rows or more, a tenth of them (10 to 1,000)
    are held out, each label's share as it is in all.
    `encoding` and `quoting` are those of text files; without them they are detected, and what is guessed is said.
    `streaming` with a `limit` reads a hub data set without downloading it all (local files are always read so).

    Raises DataError for anything that cannot be read, found or held out.
    """
    if limit is not None and limit < 1:
        raise DataError(f"data.limit is {limit}; it must be at least 1. Leave it out to read every row.")
    if streaming and limit is None:
        raise DataError("data.streaming reads rows until data.limit, which is not set. Set data.limit.")
    columns = Columns(column, dict(fields or {}), messages, target, references=references)
    notes: list[str] = []
    asked = Asked(revision, config, encoding, quoting, streaming, limit, notes)
    origin = find_origin(source, asked)
    raw_rows = origin.rows(split)
    first = list(islice(raw_rows, 1))
    if first:
        columns = columns.shaped(first[0])
    rows = columns.examples(chain(first, raw_rows), origin.name, limit, notes)
    if limit is not None and len(rows) < limit:
        notes.append(f"{origin.name} has {len(rows)} rows; data.limit asked for {limit}.")
    is_cut = limit is not None and len(rows) == limit
    of_order = (
        sorted_note(rows, columns.learned, "data.limit") if is_cut else single_note(rows, columns.learned)
    )
    notes += [note for note in (of_order, variants_note(rows, columns.learned)) if note is not None]
    drawn = Draw(rows, seed)
    held: dict[str, Sequence[Example]] = {}
    for part, wanted in (("validation", validation), ("test", test)):
        if isinstance(wanted, (bool, int, float)) and not wanted:
            held[part] = ()
        elif isinstance(wanted, (int, float)):
            held[part] = drawn.take(how_many(wanted, len(rows), part), part)
        else:
            other = None if wanted is None or wanted == OWN else _as_origin(wanted, origin, asked)
            most = limit if origin.endless else None
            held[part] = _named(part, wanted, origin, other, split, columns, most, notes)
            if wanted is None or wanted == OWN:
                withheld = withheld_note(held[part], rows, columns.learned, part)
                held[part] = () if withheld is not None else held[part]
                notes += [] if withheld is None else [withheld]
        count = default_count(len(rows)) if part == "validation" and wanted is None else 0
        if count and not held[part]:
            held[part] = drawn.take_by_label(count, columns.learned)
            notes.append(
                f"{count} of {len(rows)} rows are held out for validation, drawn by data.seed. "
                "Set data.validation to choose others, or to 0 to learn from all."
            )
    train = drawn.rest()
    for part, examples in held.items():
        notes += _repeated(train, examples, part)
    return Splits(
        train,
        held["validation"],
        held["test"],
        origin.name,
        origin.revision,
        tuple(dict.fromkeys(notes)),
        columns.shape,
    )


def _as_origin(wanted: str | Path, origin: Origin, asked: Asked) -> Origin | None:
    """The file that `wanted` names; None where it is the name of a split."""
    written = str(wanted)
    if isinstance(wanted, str) and (written in origin.splits() or written in sum(SPLIT_NAMES.values(), ())):
        return None
    if not (written.startswith("builtin:") or reads_as_path(written) or Path(written).expanduser().exists()):
        return None
    other = find_origin(wanted, replace(asked, revision=None, config=None, streaming=False))
    both = (origin, other)
    if all(isinstance(source, FilesOrigin) for source in both) and _same_file(*both):  # type: ignore[arg-type]
        raise DataError(
            f"{written} is the file that is learned from, so nothing would be held out. Give another file."
        )
    return other


def _same_file(first: FilesOrigin, second: FilesOrigin) -> bool:
    mine = {path.resolve() for path in first.by_split.get("train", ())}
    return any(path.resolve() in mine for path in second.by_split.get("train", ()))


def _named(
    part: str,
    wanted: str | Path | None,
    origin: Origin,
    other: Origin | None,
    split: str,
    columns: Columns,
    limit: int | None,
    notes: list[str],
) -> Sequence[Example]:
    """Rows held out in their own split or file."""
    if wanted is not None and other is not None:
        own = other.splits()
        return columns.examples(other.rows(part if part in own else own[0]), other.name, limit, notes)
    name = (
        next((alias for alias in SPLIT_NAMES[part] if alias in origin.splits()), None)
        if wanted is None or wanted == OWN
        else str(wanted)
    )
    if wanted is not None and str(wanted) == "none":
        return ()
    if name is None or (wanted in (None, OWN) and name == split):
        return ()
    if split_name(name, origin) == split_name(split, origin):
        raise DataError(
            f"data.{part} is the split {name!r}, which is learned from. Name another, or a share such as 0.1."
        )
    try:
        return columns.examples(origin.rows(name), f"{origin.name}, split {name}", limit, notes)
    except DataError as error:
        if wanted is not None and wanted != OWN:
            raise
        notes.append(f"The split {name!r} is left out: {error}")
        return ()


def _repeated(train: Iterable[Example], held: Iterable[Example], part: str) -> list[str]:
    """A note on rows that are both learned from and held out."""
    held_rows = [(tuple(sorted(example.fields.items())), example.messages) for example in held]
    wanted = set(held_rows)  # the held out rows are the fewer ones: what is kept is bounded by them
    if not wanted:
        return []
    learned = {
        row
        for example in train
        if (row := (tuple(sorted(example.fields.items())), example.messages)) in wanted
    }
    same = sum(row in learned for row in held_rows)
    return [f"{same} of the {part} rows are also among the training rows, word for word."] if same else []
