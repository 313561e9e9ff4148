"""The standard streams: output that every terminal's encoding takes, input that must be UTF-8."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Sequence

from softprompt.errors import DataError

# What our own output draws with, for terminals that cannot show it.
STAND_INS = {
    **dict.fromkeys("─━╸╺╴╶╌╍┄┅", "-"),
    **dict.fromkeys("│┃┆┇╎╏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛┡┩╇╈", "+"),
    "…": "...",
    "·": ".",
    "•": "*",
    "±": "+-",
    "×": "x",
    "–": "-",
    "—": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "→": "->",
    "▶": ">",
    "█": "#",
    "⠀": " ",
}


def prepare_streams() -> None:
    """Lets every character be printed: what an encoding lacks is replaced, or is spelled out (\\u4e2d)."""
    codecs.register_error("softprompt", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="softprompt")


def read_input() -> str:
    """Standard input as text. Raises DataError where it is not UTF-8."""
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # a replacement without bytes
        return sys.stdin.read()
    try:
        return str(buffer.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: byte {error.start} is not UTF-8, as a text must be. Convert it, with iconv for example."
        ) from None


def refuse_broken_arguments(arguments: Sequence[str]) -> None:
    """Raises DataError for an argument whose bytes are not UTF-8: no text, name or file that we write can hold it."""
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"argument {number} of the command: character {error.start} is not UTF-8, as a text must be. Convert it, "
                "or rename the file."
            ) from None


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_spelled(character) for character in characters), error.end


def _spelled(character: str) -> str:
    if character in STAND_INS:
        return STAND_INS[character]
    if "\u2800" <= character <= "\u28ff":  # braille dots, which plots are drawn with
        return "*"
    return character.encode("ascii", "backslashreplace").decode("ascii")
