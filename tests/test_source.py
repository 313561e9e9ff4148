"""Reading data: any file, any encoding, the same splits every time, and one clear sentence for what is wrong."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from softprompt.data.example import Message, Splits
from softprompt.data.source import load_splits
from softprompt.errors import DataError

ROWS = [{"text": f"Grüße {i}, “ok”", "label": "yes" if i % 2 else "no"} for i in range(10)]
LATIN_ROWS = [{"text": f"Grüße {i}", "label": "yes" if i % 2 else "no"} for i in range(10)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(
    path: Path, rows: list[dict[str, str]] = ROWS, encoding: str = "utf-8", delimiter: str = ","
) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, found: Any) -> Path:
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def fields(splits: Any) -> list[dict[str, str]]:
    return [dict(example.fields) for example in splits.train]


def write_any(folder: Path, kind: str, rows: list[dict[str, str]] = ROWS) -> Path:
    path = folder / f"rows.{kind}"
    match kind:
        case "csv" | "tsv":
            return write_csv(path, rows, delimiter="\t" if kind == "tsv" else ",")
        case "json":
            return write_json(path, rows)
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case "parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write_any(tmp_path, kind)
    splits = load_splits(str(path), target="label")
    assert fields(splits) == ROWS
    assert [example.row for example in splits.train] == list(range(10))
    assert splits.source == str(path)
    assert splits.revision == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert splits.notes == ()
    assert (splits.validation, splits.test) == ((), ())


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_limit_takes_the_first_rows(tmp_path: Path, kind: str) -> None:
    assert fields(load_splits(write_any(tmp_path, kind), limit=3)) == ROWS[:3]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_files_are_read_by_their_own_marks(tmp_path: Path, encoding: str) -> None:
    splits = load_splits(write_csv(tmp_path / "rows.csv", encoding=encoding))
    assert fields(splits) == ROWS
    assert splits.notes == ()


@pytest.mark.parametrize(
    ("encoding", "found"), [("cp1252", "cp1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")]
)
def test_a_guessed_encoding_is_said(tmp_path: Path, encoding: str, found: str) -> None:
    splits = load_splits(write_csv(tmp_path / "rows.csv", encoding=encoding))
    assert fields(splits) == ROWS
    assert len(splits.notes) == 1
    assert f"read as {found}. Set data.encoding" in splits.notes[0]


def test_a_given_encoding_is_used_and_not_remarked_upon(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", LATIN_ROWS, encoding="cp437")
    splits = load_splits(path, encoding="cp437")
    assert fields(splits) == LATIN_ROWS
    assert splits.notes == ()


def test_utf_8_as_asked_for_still_drops_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", encoding="utf-8-sig")
    assert fields(load_splits(path, encoding="UTF8", column="text"))[0]["text"] == ROWS[0]["text"]


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-8", "does not fit data.encoding utf-8.*detected"),
        ("utf-9", "no text encoding.*Did you mean 'utf-8'"),
        ("zlib", "no text encoding"),
    ],
)
def test_a_wrong_encoding_is_refused(tmp_path: Path, encoding: str, says: str) -> None:
    path = write_csv(tmp_path / "rows.csv", LATIN_ROWS, encoding="latin-1")
    with pytest.raises(DataError, match=says):
        load_splits(path, encoding=encoding)


def test_cells_keep_line_breaks_quotes_and_white_space(tmp_path: Path) -> None:
    rows = [{"text": ' a "b", c\r\nd ', "label": "x"}, {"text": "x" * 200_000, "label": "\ty"}]
    assert fields(load_splits(write_csv(tmp_path / "rows.csv", rows))) == rows


def test_another_separator_is_found_and_said(tmp_path: Path) -> None:
    splits = load_splits(write_csv(tmp_path / "rows.csv", delimiter=";"))
    assert fields(splits) == ROWS
    assert "separates its columns by ';'" in splits.notes[0]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ntext,label\na,b\n\nc,d\n\n")
    assert fields(load_splits(path)) == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]


@pytest.mark.parametrize("found", [ROWS, {"data": ROWS}, {"version": "1.0", "RateBook": ROWS}])
def test_json_is_a_list_or_an_object_around_one(tmp_path: Path, found: Any) -> None:
    assert fields(load_splits(write_json(tmp_path / "rows.json", found))) == ROWS


def test_json_and_jsonl_under_each_others_name_are_read(tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole = tmp_path / "list.jsonl"
    whole.write_text(json.dumps(ROWS, indent=1))
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps(ROWS))
    assert fields(load_splits(lines)) == fields(load_splits(whole)) == fields(load_splits(short)) == ROWS


def test_numbers_and_truth_values_become_text_as_json_writes_them(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "rows.json", [{"text": "a", "n": 3, "x": 0.5, "b": True, "none": None, "list": [1]}]
    )
    assert fields(load_splits(path)) == [{"text": "a", "n": "3", "x": "0.5", "b": "true"}]


def test_a_column_is_text_and_fields_give_columns_other_names(tmp_path: Path) -> None:
    path = write_json(tmp_path / "rows.json", [{"q": "why", "a": [{"out": "so"}]}])
    assert fields(load_splits(path, column="q")) == [{"q": "why", "text": "why"}]
    assert fields(load_splits(path, fields={"answer": "a.0.out"}, target="answer")) == [
        {"q": "why", "answer": "so"}
    ]


def test_rows_in_memory_will_do() -> None:
    assert fields(load_splits(["a", {"text": "b", "n": 1}])) == [{"text": "a"}, {"text": "b", "n": "1"}]
    with pytest.raises(DataError, match="row 1 is int"):
        load_splits(["a", 5])  # type: ignore[list-item]


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MESSAGES = (Message("user", "hi"), Message("assistant", "hello"))


@pytest.mark.parametrize(
    "cell",
    [
        TURNS,
        json.dumps(TURNS),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}, TURNS[1]],
        {"role": ["user", "assistant"], "content": ["hi", "hello"]},
    ],
)
def test_chat_turns_are_read_in_every_usual_form(tmp_path: Path, cell: Any) -> None:
    splits = load_splits(write_json(tmp_path / "rows.json", [{"talk": cell}]), messages="talk")
    assert splits.train[0].messages == MESSAGES


def test_a_column_called_messages_is_the_chat_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"messages": TURNS, "text": "t"}]).to_parquet(str(path))
    assert load_splits(path).train[0].messages == MESSAGES
    assert load_splits(path, column="text").train[0].messages is None


@pytest.mark.parametrize("cell", ["hello", [], [1], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_what_is_no_chat_is_refused(tmp_path: Path, cell: Any) -> None:
    with pytest.raises(DataError, match=r"row 0, column 'talk'.*wanted a"):
        load_splits(write_json(tmp_path / "rows.json", [{"talk": cell}]), messages="talk")


def texts(examples: Any) -> list[str]:
    return [example.fields["text"] for example in examples]


def test_shares_and_numbers_are_held_out_by_the_seed_and_keep_their_order() -> None:
    rows = [f"row {i:02}" for i in range(40)]
    one = load_splits(rows, validation=0.1, test=5, seed=3)
    assert (len(one.train), len(one.validation), len(one.test)) == (31, 4, 5)
    assert sorted(texts(one.train) + texts(one.validation) + texts(one.test)) == rows
    for part in (one.train, one.validation, one.test):
        assert texts(part) == sorted(texts(part))
    assert load_splits(rows, validation=0.1, test=5, seed=3) == one
    assert load_splits(rows, validation=0.1, test=5, seed=4).validation != one.validation
    assert (
        load_splits(rows, validation=0.1, seed=3).validation == one.validation
    )  # a test part changes nothing


def test_the_limit_comes_before_the_share() -> None:
    splits = load_splits([f"row {i}" for i in range(40)], limit=10, validation=0.2)
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    assert max(example.row for example in splits.train + splits.validation) == 9


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (10, "takes 10 rows, but 10 are left"),
        (1.5, "wanted a share"),
        (-1, "wanted a share"),
        (True, "wanted a share"),
        ("dev", "no split 'dev'"),
        ("nowhere.csv", "no such file"),
    ],
)
def test_what_cannot_be_held_out_is_refused(tmp_path: Path, held: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_splits(write_csv(tmp_path / "rows.csv"), validation=held)


def test_a_file_can_be_held_out_but_not_the_one_that_is_learned_from(tmp_path: Path) -> None:
    path, other = write_csv(tmp_path / "a.csv"), write_csv(tmp_path / "b.csv", LATIN_ROWS[:4])
    splits = load_splits(str(path), validation=str(other), test=other)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 4, 4)
    with pytest.raises(DataError, match="learned from"):
        load_splits(path, validation=str(path))


def test_rows_that_are_learned_from_and_held_out_are_said(tmp_path: Path) -> None:
    path, other = write_csv(tmp_path / "a.csv"), write_csv(tmp_path / "b.csv", ROWS[:3] + LATIN_ROWS)
    assert "3 of the validation rows" in load_splits(path, validation=other).notes[0]


def test_a_folder_has_the_splits_that_its_files_are_called_after(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "dev.csv", LATIN_ROWS[:2])
    write_csv(tmp_path / "test.csv", LATIN_ROWS[2:5])
    splits = load_splits(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 2, 3)
    assert load_splits(tmp_path, validation="validation") == load_splits(tmp_path, validation="dev") == splits
    alone = load_splits(tmp_path, validation=0, test=0)
    assert (len(alone.train), alone.validation, alone.test) == (10, (), ())
    assert len(load_splits(tmp_path, split="test").train) == 3
    with pytest.raises(DataError, match=r"has no split 'tset'; it has: .*Did you mean 'test'"):
        load_splits(tmp_path, split="tset")
    with pytest.raises(DataError, match="which is learned from"):
        load_splits(tmp_path, validation="train")


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(2):
        path = tmp_path / "data" / f"train-0000{i}-of-00002.parquet"
        datasets.Dataset.from_list(ROWS[5 * i : 5 * i + 5]).to_parquet(str(path))
    assert fields(load_splits(tmp_path)) == ROWS


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(str(tmp_path / "many"))
    whole.save_to_disk(str(tmp_path / "one"))
    many = load_splits(tmp_path / "many")
    assert fields(many) == ROWS
    assert texts(many.test) == [ROWS[0]["text"]]
    assert fields(load_splits(tmp_path / "one")) == ROWS


def test_a_folder_without_a_name_for_its_splits_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    assert fields(load_splits(tmp_path)) == ROWS  # one file can only be the one to learn from
    write_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"folder with a.csv, b.csv; wanted train.csv"):
        load_splits(tmp_path)


def test_the_bundled_data_is_found_by_name() -> None:
    splits = load_splits("builtin:roles", column="prompt", limit=20)
    assert len(splits.train) == 20
    assert splits.validation
    assert splits.source == "builtin:roles"
    with pytest.raises(DataError, match=r"builtin:role is not bundled.*Did you mean 'roles'"):
        load_splits("builtin:role")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"column": "Txt"},
            r"no column 'Txt'; it has: text, label. Did you mean 'text'\? Change data.column",
        ),
        ({"target": "lable"}, r"Did you mean 'label'\? Change data.target"),
        ({"fields": {"a": "b.c"}}, "no column 'b.c'.*Change data.fields.a"),
        ({"messages": "chat"}, "no column 'chat'.*Change data.messages"),
        ({"limit": 0}, "data.limit is 0"),
        ({"streaming": True}, "Set data.limit"),
        ({"split": "test"}, "single file and has no split 'test'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(tmp_path: Path, options: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_splits(write_csv(tmp_path / "rows.csv"), **options)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b" \n", "is empty"),
        ("a.csv", b"text,label\n", "has no row"),
        ("a.csv", b"text,text\na,b\n", "column 'text' twice"),
        ("a.csv", b"text,label\na,b\nc,d,e\n", "line 3: 3 cells, but the header has 2"),
        ("a.csv", b"text,label\na\n", "line 2: 1 cells, but the header has 2"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "has no row"),
        ("a.json", b"[1]", "entry 0: a number instead of an object"),
        ("a.json", b"3", "holds a number; wanted a list"),
        ("a.json", b"{}", "0 lists of rows"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2, column 10: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2, column 8: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a list instead of an object"),
        ("a.json", b'[{"text": "\\ud83d"}]', "half a character"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.txt", b"text", "not a data file by its name"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as refused:
        load_splits(tmp_path / name)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (
            [{"text": "a"}, {"text": " "}, {"text": ""}],
            {"column": "text"},
            r"2 of 3 rows have nothing in column 'text' \(rows 1, 2",
        ),
        (
            [{"a": "x", "b": "y"}, {"a": "x", "b": None}],
            {"target": "b"},
            "1 of 2 rows have nothing in column 'b'",
        ),
        (
            [{"a": "x", "b": "y"}, {"b": "y"}],
            {"fields": {"q": "a"}},
            "1 of 2 rows have nothing in column 'a'",
        ),
        (
            [{"a": [{"out": "x"}]}],
            {"column": "a"},
            "row 0, column 'a': a list, but text.*Perhaps a.0.out is meant",
        ),
        ([{"a": {"out": "x"}}], {"column": "a"}, "Perhaps a.out is meant"),
    ],
)
def test_cells_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, rows: Any, options: Any, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load_splits(write_json(tmp_path / "rows.json", rows), **options)


def test_blank_text_is_allowed_where_it_is_only_read(tmp_path: Path) -> None:
    path = write_json(tmp_path / "rows.json", [{"a": "", "b": "y"}])
    assert fields(load_splits(path, fields={"q": "a"}, target="b")) == [{"a": "", "q": "", "b": "y"}]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("rows.cvs/rows.csv", "no such file"),
        ("./rowz.csv", r"no such file or folder.*Did you mean 'rows.csv'"),
        ("", "data.source is empty"),
        ("what is this?", "no data set's id"),
        ("someone/some-data", "not in the local cache while the hub is switched off.*save its rows as a csv"),
    ],
)
def test_a_source_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    write_csv(tmp_path / "rows.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        load_splits(source)


class FakeHub:
    """Stands in for datasets.load_dataset, and keeps what it was asked for."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.asked = parts, {}

    def __call__(self, source: str, /, **settings: Any) -> Any:
        self.asked = {"id": source, **settings}
        if isinstance(self.parts, Exception):
            raise self.parts
        return self.parts


def hub(monkeypatch: pytest.MonkeyPatch, parts: Any) -> FakeHub:
    fake = FakeHub(parts)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


def test_a_hub_data_set_gives_its_splits_and_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    unlabelled = datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features=features)
    fake = hub(monkeypatch, datasets.DatasetDict(train=train, validation=train.select([0]), test=unlabelled))
    splits = load_splits("owner/name", revision="v1", config="en", target="label")
    assert fake.asked == {"id": "owner/name", "name": "en", "revision": "v1", "streaming": False}
    assert fields(splits) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert splits.revision == "v1"
    assert len(splits.validation) == 1
    assert splits.test == ()  # a test split without labels, which nobody asked for, stops nothing
    assert any("'test' is left out" in note for note in splits.notes)
    with pytest.raises(DataError, match="nothing in column 'label'"):
        load_splits("owner/name", target="label", test="test")


def test_a_streamed_data_set_is_read_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def endless() -> Any:
        i = 0
        while True:
            given.append(i)
            yield {"text": f"row {i}"}
            i += 1

    fake = hub(monkeypatch, {"train": datasets.IterableDataset.from_generator(endless)})
    splits = load_splits("owner/name", limit=5, streaming=True, validation=1)
    assert fake.asked["streaming"] is True
    assert len(splits.train) + len(splits.validation) == 5
    assert len(given) < 10


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ValueError("Config name is missing.\nPlease pick one among: ['en', 'fr']"),
            "data.config is not set.*'en', 'fr'",
        ),
        (FileNotFoundError("boom\nsecond line"), "not in the local cache"),
    ],
)
def test_no_failure_of_the_hub_reaches_the_user_raw(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    hub(monkeypatch, error)
    with pytest.raises(DataError, match=says):
        load_splits("owner/name")


def test_online_the_hubs_own_reason_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    hub(monkeypatch, ConnectionError("Dataset 'owner/name' doesn't exist on the Hub\nmore"))
    with pytest.raises(
        DataError, match=r"failed: Dataset 'owner/name' doesn't exist on the Hub\. Check its id"
    ):
        load_splits("owner/name")


def test_reading_says_nothing_and_leaves_the_settings_of_datasets_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_any(tmp_path, "parquet")
    capfd.readouterr()
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    load_splits(path)
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
    assert capfd.readouterr() == ("", "")


def test_reading_text_files_imports_neither_datasets_nor_torch(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv")
    code = (
        "import sys; from softprompt.data.source import load_splits; from softprompt.data.template import Template; "
        f"load_splits({str(path)!r}); print({{'torch', 'datasets', 'transformers'}} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_real_files_have_the_rows_that_their_sources_state(shared_data: Path) -> None:
    def read(path: Path, **settings: Any) -> Splits:
        return load_splits(path, validation=0, **settings)

    roles = read(shared_data / "awesome-chatgpt-prompts/prompts.csv", column="prompt")
    assert len(roles.train) == 169
    assert set(roles.train[0].fields) == {"act", "prompt", "text"}
    assert len(read(shared_data / "awesome-chatgpt-prompts/prompts_153rows_2023-03-07.csv").train) == 153
    banking = read(shared_data / "banking77", target="category")
    assert (len(banking.train), len(banking.test)) == (10_003, 3_080)
    assert len({example.fields["category"] for example in banking.train}) == 77
    gsm8k = read(shared_data / "gsm8k", target="answer")
    assert (len(gsm8k.train), len(gsm8k.test)) == (7_473, 1_319)
    e2e = read(
        shared_data / "e2e_nlg/devset.csv", target="ref", test=str(shared_data / "e2e_nlg/testset_w_refs.csv")
    )
    assert (len(e2e.train), len(e2e.test)) == (4_672, 4_693)
    tasks = read(shared_data / "self_instruct/seed_tasks.jsonl", fields={"answer": "instances.0.output"})
    assert len(tasks.train) == 175
    music = read(shared_data / "snips/train_PlayMusic_full.json", column="data.0.text")
    assert len(music.train) == 2_000
    assert "not UTF-8" in music.notes[0]
