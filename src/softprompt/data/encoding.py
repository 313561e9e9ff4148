"""The encoding of a text file: its byte order mark, UTF-8, or a guess with a note; two equal guesses are refused.

A single-byte file is taken for Windows-1252 if its accented letters occur among plain ones, as in every language
that it was made for. What else it may be is charset-normalizer's guess, taken only where no other comes near it.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from softprompt.errors import DataError, did_you_mean

CESU_8 = "cesu-8"  # not a codec of Python's: UTF-8 whose characters beyond U+FFFF are two halves of three bytes each

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_USUAL = ("utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "cp1251", "gb18030", "shift_jis", "euc-kr")
_GUESSED_BYTES = 128 * 1024  # of lines that are not ASCII: more makes charset-normalizer no surer
_CHAOS_MARGIN = 0.05  # a guess must be less disorderly than the next one by this share ...
_COHERENCE_MARGIN = 0.1  # ... or look like a language by this much more
_JOINED = re.compile(r"[^\W\d_]+")
# by³em, robi¹: signs within words or at their end, so they are letters of another encoding
_AMID_LETTERS = re.compile(r"[^\W\d_]([¡-¿×÷][^\W\d_]|[¹³¿¯¼¾¥£])")
_WESTERN_SHARE = 0.35  # of letters that are accented: 0.2 is much in French, and beyond 0.5 is another script


@dataclass(frozen=True)
class _Guess:
    codec: str
    others: tuple[str, ...]
    text: str
    chaos: float
    coherence: float


def named(encoding: str) -> str:
    """The codec of `data.encoding`. Raises DataError for what is no text encoding."""
    try:
        name = codecs.lookup(encoding).name
        "".encode(encoding)  # refuses codecs that do not make text, such as zlib
    except LookupError:
        raise DataError(
            f"data.encoding is {encoding!r}, which is no text encoding.{did_you_mean(encoding, _USUAL)} "
            f"Use one that Python knows, such as {', '.join(_USUAL[:5])}, or leave it out."
        ) from None
    return "utf-8-sig" if name == "utf-8" else name  # a byte order mark is no part of the first column's name


def detected(sample: bytes, path: Path, notes: list[str], *, whole: bool) -> str:
    """The codec that the first bytes of a file show; `whole` says that they are all of it.

    A guess is added to `notes`. Raises DataError where lines differ in their encoding, or several encodings fit."""
    for mark, codec in _MARKS:
        if sample.startswith(mark):
            return codec
    head = sample[:4096]
    if b"\0" in head:
        codec = "utf-16-le" if head[1::2].count(0) >= head[::2].count(0) else "utf-16-be"
        notes.append(
            f"{path} has zero bytes and no byte order mark; read as {codec}. Set data.encoding if that is wrong."
        )
        return codec
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=whole)
    except UnicodeDecodeError as error:
        return _not_utf_8(sample, error.start, path, notes)
    return "utf-8"


def joined_halves(raw: bytes) -> str:
    """CESU-8 as text: every two halves joined to the character that they are. UnicodeError where a half is alone."""
    text = raw.decode("utf-8", "surrogatepass")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _not_utf_8(sample: bytes, at: int, path: Path, notes: list[str]) -> str:
    lines = sample.split(b"\n")
    foreign = [(number, line) for number, line in enumerate(lines, 1) if not line.isascii()]
    if len(foreign) > 1 and foreign[-1][0] == len(lines):
        foreign.pop()  # the sample may cut it
    if b"\xed" in sample and _is_cesu_8(foreign):
        notes.append(
            f"{path} is not UTF-8 but CESU-8: characters in two halves of three bytes each. The halves are joined."
        )
        return CESU_8
    wrong = [number for number, line in foreign if not _decodes(line, "utf-8")]
    right = [number for number, line in foreign if _decodes(line, "utf-8")]
    if wrong and right:
        raise DataError(
            f"{path}, line {wrong[0]}: not UTF-8, while line {right[0]} is: the file mixes encodings. "
            "Save it in one, or set data.encoding to that which fits all lines."
        )
    where = f"byte 0x{sample[at]:02x} at {at:,}"
    clue = b"\n".join(line for _, line in foreign)[:_GUESSED_BYTES]
    codec = "cp1252" if _looks_western(clue) else _guessed(clue, path, where)
    notes.append(f"{path} is not UTF-8 ({where}); read as {codec}. Set data.encoding if letters look wrong.")
    return codec


def _is_cesu_8(lines: list[tuple[int, bytes]]) -> bool:
    try:
        for _, line in lines:
            joined_halves(line)
    except UnicodeError:
        return False
    return True


def _decodes(line: bytes, codec: str) -> bool:
    try:
        line.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


def _looks_western(clue: bytes) -> bool:
    """Whether Windows-1252 fits: accented letters within words of plain ones, or dashes and quotation marks alone."""
    if not _decodes(clue, "cp1252"):
        return False
    text = clue.decode("cp1252")
    if _AMID_LETTERS.search(text):
        return False
    letters = [letter for letter in text if letter.isalpha() or letter > "\x7f"]
    if sum(letter > "\x7f" for letter in letters) > _WESTERN_SHARE * len(letters):
        return False
    words = [word for word in _JOINED.findall(text) if not word.isascii()]
    mixed = [word for word in words if any(map(str.isascii, word)) or len(word) == 1]
    return len(mixed) >= 0.8 * len(words)


def _guessed(clue: bytes, path: Path, where: str) -> str:
    """The encoding that charset-normalizer finds, where it is sure. DataError asks for data.encoding otherwise."""
    from charset_normalizer import from_bytes

    guesses = [
        _Guess(match.encoding, tuple(match.could_be_from_charset), str(match), match.chaos, match.coherence)
        for match in from_bytes(clue)
        if not match.encoding.startswith("utf")
    ]
    if guesses:
        best = guesses[0]
        rivals = [guess for guess in guesses[1:] if guess.text != best.text]
        if all(
            guess.chaos - best.chaos > _CHAOS_MARGIN
            or (best.coherence - guess.coherence > _COHERENCE_MARGIN and guess.chaos >= best.chaos)
            for guess in rivals
        ):
            return best.codec
    names = ", ".join(guess.codec for guess in guesses[:4]) or "none that is known"
    raise DataError(
        f"{path} is not UTF-8 ({where}), and its encoding is not clear (it may be {names}). "
        "Set data.encoding, for example to cp1252, cp1251, gb18030 or shift_jis, or save the file as UTF-8."
    )
