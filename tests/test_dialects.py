"""Files as the world writes them: quoting, encodings, marks and numbers, each read right or refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from softprompt.data.source import load_splits
from softprompt.errors import DataError

CASES = Path(__file__).parent / "cases"


def rows(path: Path, **settings: Any) -> list[dict[str, str]]:
    return [dict(one.fields) for one in load_splits(path, validation=0, **settings).train]


def case(name: str, **settings: Any) -> list[dict[str, str]]:
    return rows(CASES / name, **settings)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_cells_of_tabs_that_open_with_a_quote_are_plain_text() -> None:
    assert case("tsv-open-quotes.tsv") == [
        {"label": "ham", "text": '"Are you there?'},
        {"label": "spam", "text": "Win a prize now"},
        {"label": "ham", "text": "See you soon"},
        {"label": "spam", "text": '"Free tickets for you'},
        {"label": "ham", "text": "Thank you"},
    ]
    splits = load_splits(CASES / "tsv-open-quotes.tsv", validation=0)
    assert "quotes are read as plain text" in splits.notes[0]
    assert "data.quoting" in splits.notes[0]


def test_cells_of_tabs_that_quotes_enclose_are_read_without_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tn\n"He said ""hi"""\t1\n"two\nlines"\t2\n"a\tb"\t3\n')
    assert [row["text"] for row in rows(path)] == ['He said "hi"', "two\nlines", "a\tb"]


def test_quoting_is_as_the_setting_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,n\n"a" b,1\n"c",2\n')
    assert [row["text"] for row in rows(path, quoting="none")] == ['"a" b', '"c"']
    assert [row["text"] for row in rows(path)] == ["a b", "c"]
    with pytest.raises(DataError, match=r"line 2: a double quote opens a cell"):
        case("tsv-open-quotes.tsv", quoting="double")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('text,n\na,1\n"b,2\nc,3\nd,4\n', 3),  # never closed
        ('text,n\na,1\n"b,2\nc,3\n"d,4\ne,5\n', 3),  # closed by the next cell that opens one
        ('text,n\n"x\ny",1\nz,"2\nc,3\n', 4),  # after a cell that rightly has two lines
    ],
)
def test_the_line_is_named_where_a_quote_opened(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"line {line}: a double quote opens.*data.quoting to none"):
        rows(write(tmp_path / "a.csv", text))


def test_excels_first_line_and_second_marks_are_passed_over(tmp_path: Path) -> None:
    assert case("csv-excel-sep-line.csv") == [{"text": "good film", "label": "pos"}]
    assert case("csv-two-boms.csv") == [{"text": "good film", "label": "pos"}]
    lines = write(tmp_path / "a.jsonl", "\ufeff\ufeff" + '{"text": "a"}\n')
    assert rows(lines) == rows(write(tmp_path / "a.json", "\ufeff\ufeff" + '[{"text": "a"}]'))
    assert rows(lines) == [{"text": "a"}]


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    assert case("jsonl-nan-label.jsonl")[1] == {"text": "b"}
    with pytest.raises(DataError, match=r"1 of 3 rows have nothing in column 'label' \(rows 1"):
        case("jsonl-nan-label.jsonl", target="label")


def test_numbers_are_labels_as_the_file_writes_them(tmp_path: Path) -> None:
    assert [row["label"] for row in case("csv-float-labels.csv")] == ["1.0", "", "2.0"]
    numbers = ["1.0", "1.10", "1e3", "-0.50", "3", "12345678901234567890123", "9" * 5000]
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "a", "n": {number}}}\n' for number in numbers))
    assert [row["n"] for row in rows(path, target="n")] == numbers


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\u2029d\x0be"
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i in range(3)), "utf-8"
    )
    assert [row["text"] for row in rows(path)] == [text] * 3


@pytest.mark.parametrize(
    ("codec", "found", "text"),
    [
        ("cp1252", "cp1252", "Le thé était déjà froid, garçon: où êtes-vous allé hier soir ?"),
        ("cp1252", "cp1252", "It’s fine — a “good” film"),
        ("cp1251", "cp1251", "Этот фильм мне очень понравился, и я бы посмотрел его ещё раз"),
        ("koi8-r", "koi8_r", "Этот фильм мне очень понравился, и я бы посмотрел его ещё раз"),
        ("euc-kr", "cp949", "이 영화는 정말 재미있었습니다"),
        ("big5", "big5", "這部電影讓我覺得非常好看"),
    ],
)
def test_an_encoding_that_can_be_told_is_read_and_said(
    tmp_path: Path, codec: str, found: str, text: str
) -> None:
    path = write(tmp_path / "a.csv", ("text\n" + f'"{text}"\n' * 3).encode(codec))
    splits = load_splits(path, validation=0)
    assert splits.train[0].fields["text"] == text
    assert f"read as {found}. Set data.encoding" in splits.notes[0]


def test_gbk_is_read_and_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    assert case("csv-gbk.csv")[0] == {"text": "这部电影很好看", "label": "正面"}
    with pytest.raises(DataError, match=r"is not clear \(it may be cp1251, .*Set data.encoding"):
        case("csv-cp1251.csv")
    assert case("csv-cp1251.csv", encoding="cp1251")[0] == {"text": "Отличный фильм", "label": "хорошо"}
    with pytest.raises(DataError, match=r"line 3: not UTF-8, while line 2 is"):
        case("csv-mixed-encodings.csv")
    with pytest.raises(DataError, match=r"byte 0xe9 at 8.*Set data.encoding"):
        rows(write(tmp_path / "a.csv", b"text\ncaf\xe9 \x81\n"))
    polish = "Ten film był świetny i bardzo mi się podobał".encode("cp1250")
    with pytest.raises(DataError, match=r"Set data.encoding"):
        rows(write(tmp_path / "a.csv", b"text\n" + polish + b"\n"))


def test_characters_in_two_halves_are_joined(tmp_path: Path) -> None:
    halves = "pizza \U0001f355, Música".encode("utf-16", "surrogatepass").decode("utf-16")
    raw = halves.encode("utf-16-le")
    units = "".join(chr(int.from_bytes(raw[i : i + 2], "little")) for i in range(0, len(raw), 2))
    path = write(tmp_path / "a.csv", b'text\n"' + units.encode("utf-8", "surrogatepass") + b'"\n')
    assert rows(path) == [{"text": "pizza \U0001f355, Música"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_lists_nested_without_end_are_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match="nested deeper"):
        rows(path)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_small_file_that_unpacks_without_end_is_refused(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = write(tmp_path / f"a.jsonl.{suffix}", pack(b'{"text": "' + b"a" * (80 * 2**20)))
    with pytest.raises(DataError, match="unpacks to more than"):
        rows(path)


def test_pipes_sockets_devices_and_folders_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.csv")
        for name, kind in (("pipe", "a named pipe"), ("device", "a device"), ("socket", "a socket")):
            with pytest.raises(DataError, match=f"{name}.csv is {kind}, wanted a file"):
                load_splits(tmp_path / f"{name}.csv")
            good = write(tmp_path / "good.csv", "text\na\nb\n")
            with pytest.raises(DataError, match=f"{name}.csv is {kind}, wanted a file"):
                load_splits(good, validation=str(tmp_path / f"{name}.csv"))
    with pytest.raises(DataError, match=r"folder.csv is a folder with no data file"):
        load_splits(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "ok", "label": "\ud800"},
        {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"name": "\ud800"}]}]},
    ],
)
def test_half_a_character_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"row 1, .*half a character"):
        rows(path)
