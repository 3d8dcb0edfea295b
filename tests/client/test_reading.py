"""One set of rules for text, lines and JSON, whoever reads them."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from colaserve_client.reading import (
    MAX_DEPTH,
    Unreadable,
    parse_json,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
)

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_newline_and_carriage_return_newline_alone_end_a_line_and_texts_keep_them(path: Path) -> None:
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    found = list(read_lines(write(path, f"{inside}\r\n\nlast\r".encode())))
    assert found == [(1, inside), (2, ""), (3, "last\r")]
    assert read_text(path) == f"{inside}\r\n\nlast\r"
    assert list(read_json_lines(write(path, '{"a": "x\u2028y"}\r\n'.encode()))) == [(1, {"a": "x\u2028y"})]


def test_byte_order_marks_are_skipped(path: Path) -> None:
    assert read_text(write(path, MARK + b"a")) == "a"
    assert [line for _, line in read_lines(write(path, MARK + b"a\n" + MARK + b"b\n"))] == ["a", "b"]
    assert read_json(write(path, MARK + b'{"a": 1}')) == {"a": 1}
    assert [value for _, value in read_json_lines(write(path, MARK + b"{}\n\r\n{}"))] == [{}, {}]


def lines(path: Path) -> list[tuple[int, str]]:
    return list(read_lines(path))


def records(path: Path) -> list[object]:
    return list(read_json_lines(path))


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        *[(b"good\nbad " + half + b" bad\n", read, r"file:2: byte 0x\w\w is not UTF-8")
          for half in (b"\xff", b"\xed\xa0\x80", "日".encode()[:2]) for read in (read_text, lines)],
        *[("a".encode("utf-16"), read, "file: is UTF-16") for read in (read_text, lines)],
        (None, read_text, "file: No such file"),
        (None, lambda path: lines(path.parent), "Is a directory"),
        (b"[]", read_json, r"file: expected a JSON object, got list$"),
        (b"{}\n\nnull\n", records, r"file:3: expected a JSON object, got NoneType$"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_file_and_line(path, content, read, message):
    if content is not None:
        write(path, content)
    with pytest.raises(Unreadable, match=message):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1 2}', "not JSON: .* at column 9"),
        ('{"a": "NaN", "b": NaN}', "NaN is no number there, at column 19"),
        ("[-Infinity]", "-Infinity is no number there, at column 2"),
        (r'{"a": "\ud800"}', r"half of a surrogate pair \(\\ud800\), .* column 8"),
        (r'{"\uDC00": "\ud83d\ude00"}', r"half of a surrogate pair \(\\uDC00\), .* column 3"),
        ("[" * 100_000 + "]" * 100_000, f"nested more than {MAX_DEPTH} levels deep at column {MAX_DEPTH + 1}"),
        ('{"a":' * 100_000, "levels deep"),
        ("[" + "1" * 5000 + "]", "a number of more than 4300 digits at column 2"),
        ("", "not JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_none_is_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(Unreadable, match=rf"^name:7: .*{message}"):
        parse_json(text, "name", 7)
    with pytest.raises(Unreadable, match=r"^name:3: "):
        parse_json("\n\n" + text, "name")


@pytest.mark.parametrize(
    "text", ["[" * MAX_DEPTH + "]" * MAX_DEPTH, '"' + "[{" * 200 + '"', r'"\\ud800 \ud83d\ude00"', '"\u2028"']
)
def test_json_at_its_bounds_is_read(text: str) -> None:
    assert parse_json(text, "name") is not None


def test_standard_input_is_read_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(MARK + b"a\r\n")
    assert list(read_lines("-")) == [(1, "a")]
    given(b"good\n\xff")
    with pytest.raises(Unreadable, match=r"^standard input:2: byte 0xff"):
        read_text("-")
    for closed in (None, SimpleNamespace(closed=True)):
        monkeypatch.setattr("sys.stdin", closed)
        with pytest.raises(Unreadable, match=r"^standard input is closed$"):
            read_text("-")
