"""Training data from files: text, or JSON lines with `text` or with `prompt` and `response`; checked as a whole first.

What makes a file unusable (not there, not UTF-8, not JSON, a missing field) is an error that names file and line.
Empty records and prompt/response pairs longer than the context are left out, counted and said; text that is longer is
cut into pieces of the context's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from colaserve_client.reading import Unreadable, parse_json, read_lines
from colaserve_services.errors import UsageError
from colaserve_training.rows import Row


@dataclass(frozen=True)
class Record:
    """One text (empty prompt), or one prompt with its response; `place` is "FILE:LINE"."""

    prompt: str
    response: str
    place: str


@dataclass(frozen=True)
class Dataset:
    """Rows ready to train, and what happened on the way."""

    rows: tuple[Row, ...]
    files: int
    empty: int
    too_long: int
    cut: int
    context: int

    def summary(self) -> str:
        """One line for the operator."""
        tokens = sum(len(row.ids) for row in self.rows)
        return (
            f"data: {len(self.rows):,} rows, {tokens:,} tokens from {self.files} file(s); {self.empty} empty left out, "
            f"{self.too_long} pairs over {self.context} tokens left out, {self.cut} longer texts cut into pieces"
        )


def read_dataset(paths: Sequence[Path], tokenizer: Tokenizer, context: int, end_id: int) -> Dataset:
    """Read, check and tokenize `paths`; raises UsageError, one line, when they cannot be trained on."""
    rows: list[Row] = []
    empty = too_long = cut = 0
    for record in (record for path in paths for record in read_records(path)):
        made = _rows(record, tokenizer, context, end_id) if record.response.strip() else None
        empty += made is None
        too_long += made == []
        cut += bool(made and len(made) > 1)
        rows += made or []
    data = Dataset(tuple(rows), len(paths), empty, too_long, cut, context)
    if not rows:
        raise UsageError(f"{', '.join(map(str, paths))}: nothing to train on ({data.summary()})")
    return data


def _rows(record: Record, tokenizer: Tokenizer, context: int, end_id: int) -> list[Row]:
    prompt = tokenizer.encode(record.prompt, add_special_tokens=False).ids
    ids = [*prompt, *tokenizer.encode(record.response, add_special_tokens=False).ids, end_id]
    if len(ids) <= context:
        return [Row(tuple(ids), len(prompt))]
    if prompt:
        return []
    return [Row(tuple(ids[start : start + context])) for start in range(0, len(ids), context)]


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file: .jsonl by line, anything else as one text a paragraph (empty lines between)."""
    try:
        lines = list(read_lines(path))
        if not any(line.strip() for _, line in lines):
            raise UsageError(f"{path}: the file is empty")
        if path.suffix == ".jsonl":
            yield from (_record(line, number, path) for number, line in lines)
        else:
            yield from _paragraphs(lines, path)
    except Unreadable as error:
        raise UsageError(str(error)) from error


def _paragraphs(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Record]:
    for empty, group in groupby(lines, key=lambda numbered: not numbered[1]):
        if not empty:
            numbers, text = zip(*group, strict=True)
            yield Record("", "\n".join(text).strip(), f"{path}:{numbers[0]}")


def _record(line: str, number: int, path: Path) -> Record:
    place = f"{path}:{number}"
    if not line.strip():
        return Record("", "", place)
    value = parse_json(line, str(path), number)
    if not isinstance(value, dict):
        raise UsageError(f"{place}: got {type(value).__name__}, expected an object with text, or prompt and response")
    if "text" in value:
        return Record("", _text(value, "text", place), place)
    return Record(_text(value, "prompt", place), _text(value, "response", place), place)


def _text(value: dict[str, Any], field: str, place: str) -> str:
    found = value.get(field)
    if not isinstance(found, str):
        got = "nothing" if found is None else type(found).__name__
        raise UsageError(f"{place}: {field}: got {got}, expected a string (records have text, or prompt and response)")
    return found
