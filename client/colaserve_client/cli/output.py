"""What verbs print: values as JSON for machines, tables and sentences for people."""

import codecs
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from shutil import get_terminal_size
from typing import Any, Self, TextIO
from unicodedata import category, east_asian_width

import click
import numpy as np

from colaserve_client.arrays import shortest_all
from colaserve_client.latents import Latents
from colaserve_client.results import GenerationResult


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses are objects, latents {space, shape, values}."""
    if isinstance(value, Latents):
        return {"space": value.space, "shape": list(value.values.shape), "values": shortest_all(value.values)}
    if isinstance(value, np.ndarray):
        return shortest_all(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


_NUMBER = re.compile(r"-?[\d.,]*")  # or no value at all
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def printable(text: str) -> str:
    """The text with control characters but for tabs and line ends written out, so that none steers a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def standard_output() -> TextIO:
    """Where answers go that have no file; a `click.ClickException` when it is closed."""
    if sys.stdout is None or sys.stdout.closed:
        raise click.ClickException("standard output is closed: there is nowhere to write the answer")
    return sys.stdout


def echo(text: str = "", end: str = "\n") -> None:
    """Print text at once: as it is, but `printable` on a terminal."""
    out = standard_output()
    print(printable(text) if out.isatty() else text, end=end, file=out, flush=True)


def print_json(value: Any, out: TextIO | None = None) -> None:
    """A value for machines, on one line; in ASCII where the output's encoding lacks other characters."""
    out = out or standard_output()
    ascii_only = codecs.lookup(out.encoding or "utf-8").name != "utf-8"
    print(json.dumps(plain(value), ensure_ascii=ascii_only, allow_nan=False), file=out, flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns, each as wide as it needs, numbers to the right."""
    columns = []
    for heading, *cells in zip(*([str(cell) for cell in row] for row in (headings, *rows)), strict=True):
        width = max(map(len, (heading, *cells)))
        numbers = all(_NUMBER.fullmatch(cell) for cell in cells)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in (heading, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Names and values, one a line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in rows)


def answer(value: Any, as_json: bool, shown: Callable[[], str]) -> None:
    """Print what a verb found: the value for machines, or `shown` for people."""
    if as_json:
        print_json(value)
    else:
        echo(shown())


def answer_each(
    texts: Sequence[str], found: Sequence[Any], as_json: bool, headings: Sequence[str], rows: Sequence[Any], name: str
) -> None:
    """Print what a verb found of each text: for machines beside the text, called `name`, or a row each for people."""
    each = [{name: text, **plain(one)} for text, one in zip(texts, found, strict=True)]
    answer(each, as_json, lambda: table(headings, rows))


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def scaled(count: int, units: Mapping[str, int]) -> str:
    """A number in the largest of the units that it reaches, to four digits."""
    reached = ((unit, length) for unit, length in units.items() if count >= length)
    return next((f"{count / length:.4g} {unit}" for unit, length in reached), f"{count:,}")


def summary(result: GenerationResult, seconds: float) -> str:
    """A generation in one line."""
    usage, seed = result.usage, result.seed
    return (
        f"{counted(usage.completion_tokens, 'token')} after {usage.prompt_tokens} of the prompt,"
        f" {counted(usage.blocks, 'block')} ({usage.wasted_blocks} wasted), {seconds:.2f} s,"
        f" ended by {result.finish_reason}, --seed {seed.base_seed}"
        + (f" --sample-id {seed.sample_id}" if seed.sample_id else "")
    )


_DIM, _USUAL, _ERASE = "\x1b[2m", "\x1b[22m", "\x1b[J"
_NO_CELL = ("Mn", "Me", "Cf", "Cc")  # categories of characters


class Screen:
    """Text that stays, and behind it a preview, which whatever comes next replaces. Leaving the context erases it, and
    an error, which is printed next, ends the line. (click ends it after Ctrl-C.)"""

    def __init__(self) -> None:
        self._column = 0  # of the cursor, behind the text that stays
        self._take_back = ""  # moves it there from the end of the preview, and erases the preview

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        self._replace("")
        if isinstance(error, Exception) and self._column:
            self.write("\n")

    def write(self, text: str) -> None:
        """Append text that stays."""
        self._replace("")
        echo(text, end="")
        *_, self._column = _laid_out(printable(text), self._column, math.inf)

    def show(self, text: str) -> None:
        """Show a preview, as much of it as the terminal has room for."""
        columns, lines = get_terminal_size()
        if self._column == columns:  # no way leads back behind the last cell of a row
            self.write("\n")
        shown, rows, _ = _laid_out(printable(text), self._column, lines - 1)
        up, right = f"\x1b[{rows}A" if rows else "", f"\x1b[{self._column}C" if self._column else ""
        self._replace(f"{_DIM}{shown}{_USUAL}", f"\r{up}{right}{_ERASE}")

    def _replace(self, text: str, take_back: str = "") -> None:
        try:
            if self._take_back or text:
                print(self._take_back + text, end="", file=standard_output(), flush=True)
        finally:  # Ctrl-C comes as soon as the text is seen
            self._take_back = take_back


def _laid_out(text: str, column: int, most: float) -> tuple[str, int, int]:
    """The part of a text from this column on that takes at most so many more rows; how many it takes; where it ends."""
    width, rows = get_terminal_size().columns, 0
    for index, character in enumerate(text):
        cells = 2 if east_asian_width(character) in "WF" else int(category(character) not in _NO_CELL)
        if character == "\t":
            cells = min(8 - column % 8, max(width - 1 - column, 0))
        wraps = column + cells > width
        if (wraps or character == "\n") and rows == most:
            return text[:index], rows, column
        rows += wraps or character == "\n"
        column = 0 if character == "\n" else cells if wraps else column + cells
    return text, rows, column
