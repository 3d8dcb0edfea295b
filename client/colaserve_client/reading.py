"""How every part of colaserve reads text, lines and JSON from files and standard input.

- Text is UTF-8. Byte order marks, at the start of the file or of a line, are skipped.
- "\\n" and "\\r\\n" end a line and nothing else does: U+2028, U+0085, a form feed or a lone "\\r" belongs to its line.
- JSON is that of RFC 8259 (no NaN), at most `MAX_DEPTH` levels deep, and without halves of surrogate pairs.
- "-" is standard input.

What breaks these rules raises `Unreadable`, whose message begins with the file and, where there is one, the line.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from colaserve_client.errors import ColaserveError

MAX_DEPTH: Final = 100  # levels of lists and objects in JSON: far above what configs and requests need
MARK: Final = "\ufeff"  # the byte order mark
_WIDE_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16 and UTF-32
_STRING: Final = r'"(?:[^"\\]++|\\.)*+"'
_STRING_OR_BRACKET: Final = re.compile(rf"{_STRING}|[\[\]{{}}]", re.DOTALL)
_ESCAPE: Final = re.compile(  # the group is half of a surrogate pair
    r"\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(\\u[dD][89a-fA-F][\da-fA-F]{2})|\\.", re.DOTALL
)


class Unreadable(ColaserveError):
    """A file, or standard input, that cannot be read as what it should be."""


def name_of(path: str | PathLike[str]) -> str:
    """What messages call a file."""
    return "standard input" if str(path) == "-" else str(path)


def read_text(path: str | PathLike[str]) -> str:
    """All text of a file, with its line ends as they are."""
    name = name_of(path)
    try:
        data = standard_input().read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(f"{name}: {error.strerror or error}") from error
    return _decode(data, name, 1).removeprefix(MARK)


def read_lines(path: str | PathLike[str], *, whole: bool = False) -> Iterator[tuple[int, str]]:
    """(number, line) of each line, as they come; numbers count from 1, the line's end is cut off.

    `whole` leaves out a last line without an end: it was cut off in writing.
    """
    name = name_of(path)
    try:
        with nullcontext(standard_input()) if str(path) == "-" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if whole and not line.endswith(b"\n"):
                    return
                line = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
                yield number, _decode(line, name, number).removeprefix(MARK)
    except OSError as error:
        raise Unreadable(f"{name}: {error.strerror or error}") from error


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds."""
    return _object(parse_json(read_text(path), name_of(path)), name_of(path))


def read_json_lines(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line of a JSON lines file; empty lines are counted and left out."""
    name = name_of(path)
    for number, line in read_lines(path):
        if line.strip(" \t\r"):
            yield number, _object(parse_json(line, name, number), f"{name}:{number}")


def parse_json(text: str, name: str, first_line: int = 1) -> Any:
    """The value of a JSON text that begins at that line of the file `name`."""

    def refuse(position: int, problem: str) -> NoReturn:
        line = first_line + text.count("\n", 0, position)
        column = position - text.rfind("\n", 0, position)
        raise Unreadable(f"{name}:{line}: {problem} at column {column}")

    def constant(word: str) -> NoReturn:
        refuse(_outside_strings(text, word), f"not JSON: {word} is no number there,")

    if text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for found in _STRING_OR_BRACKET.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > MAX_DEPTH:
                refuse(found.start(), f"JSON is nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        refuse(error.pos, f"not JSON: {error.msg}")
    except ValueError:  # Python's own bound on whole numbers
        most = sys.get_int_max_str_digits()
        refuse(_outside_strings(text, rf"\d{{{most + 1}}}"), f"a number of more than {most} digits")
    for found in _ESCAPE.finditer(text):
        if found[1]:
            refuse(found.start(), f"half of a surrogate pair ({found[1]}), which is no character,")
    return value


def standard_input() -> BinaryIO:
    """The bytes of standard input; `Unreadable` when it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise Unreadable("standard input is closed")
    return sys.stdin.buffer


def _decode(data: bytes, name: str, first_line: int) -> str:
    if first_line == 1 and data.startswith(_WIDE_MARKS):
        raise Unreadable(f"{name}: is UTF-16 or UTF-32; convert it to UTF-8 first")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        byte = data[error.start]
        raise Unreadable(f"{name}:{line}: byte 0x{byte:02x} is not UTF-8; convert it to UTF-8 first") from error


def _outside_strings(text: str, pattern: str) -> int:
    """Where the pattern is found first, the strings of a JSON text left out."""
    matches = re.finditer(rf"{_STRING}|({pattern})", text, re.DOTALL)
    return next(found.start() for found in matches if found[1])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
