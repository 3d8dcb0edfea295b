"""A text on a terminal, with a preview behind it that can be replaced."""

import math
from shutil import get_terminal_size
from typing import Self
from unicodedata import category, east_asian_width

from colaserve_client.cli import output

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
        output.echo(text, end="")
        *_, self._column = _laid_out(output.printable(text), self._column, math.inf)

    def show(self, text: str) -> None:
        """Show a preview, as much of it as the terminal has room for."""
        columns, lines = get_terminal_size()
        if self._column == columns:  # no way leads back behind the last cell of a row
            self.write("\n")
        shown, rows, _ = _laid_out(output.printable(text), self._column, lines - 1)
        up, right = f"\x1b[{rows}A" if rows else "", f"\x1b[{self._column}C" if self._column else ""
        self._replace(f"{_DIM}{shown}{_USUAL}", f"\r{up}{right}{_ERASE}")

    def _replace(self, text: str, take_back: str = "") -> None:
        try:
            if self._take_back or text:
                print(self._take_back + text, end="", file=output.standard_output(), flush=True)
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
