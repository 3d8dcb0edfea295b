"""Ends a text before the first occurrence of any of several strings, while the text still comes in pieces.

However the text is cut into pieces, what is let through is whole_text[:p], p the least position where any of the
strings begins. Only the end of the text that may belong to one of them is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 1000
"""Characters that a stop string may have: what is kept of a text, and searched for each piece, grows with them."""


@dataclass(frozen=True)
class Hit:
    """An occurrence: characters [start, end) of the text pushed so far, and the string found there."""

    start: int
    end: int
    stop: str


class StopStrings:
    """Text goes in by `push`; what can no longer be part of a stop string comes out.

    `hit` is the earliest occurrence that is complete; while an earlier one may still complete, `ended` is false.
    """

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "an empty stop string would end every text before it begins"
        self._stops = stops
        self._tail = ""  # pushed and not let through
        self._passed = 0  # characters before the tail
        self.hit: Hit | None = None
        self.ended = False

    @property
    def held(self) -> str:
        """The end of what was pushed, which is not let through yet."""
        return self._tail

    def push(self, text: str) -> str:
        """Take text in; return the text that is certain to come before any stop string. Nothing after the end."""
        if self.ended:
            return ""
        self._tail += text
        certain = len(self._tail) - max((_begun(stop, self._tail) for stop in self._stops), default=0)
        found = [(start, start + len(stop), stop) for stop in self._stops if (start := self._tail.find(stop)) >= 0]
        if found:
            start, end, stop = min(found)
            self.hit, self.ended = Hit(self._passed + start, self._passed + end, stop), start <= certain
            certain = min(certain, start)
        return self._pass(certain)

    def flush(self) -> str:
        """The text is over: what is held back and belongs to no stop string."""
        if self.ended:
            return ""
        self.ended = self.hit is not None
        return self._pass(self.hit.start - self._passed if self.hit else len(self._tail))

    def _pass(self, count: int) -> str:
        out, self._tail = self._tail[:count], self._tail[count:]
        self._passed += count
        return out


def _begun(stop: str, text: str) -> int:
    """Characters of the longest beginning of a stop string, short of all of it, that a text ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
