"""Ends a text before the first occurrence of any of several strings, while the text still comes in pieces.

However the text is cut into pieces, what is let through is whole_text[:p], p the least position where any of the
strings begins. Work per character is constant for each string (Knuth, Morris and Pratt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 1000
"""Characters that a stop string may have: what it costs before any text is there grows with them."""


@dataclass(frozen=True)
class Hit:
    """An occurrence: characters [start, end) of the text pushed so far."""

    start: int
    end: int


class StopStrings:
    """Text goes in by `push`; what can no longer be part of a stop string comes out.

    `hit` is the earliest occurrence that is complete; while an earlier one may still complete, `ended` is false.
    """

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "an empty stop string would end every text before it begins"
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""  # pushed and not let through
        self._length = 0  # characters pushed
        self.hit: Hit | None = None
        self.ended = False

    @property
    def length(self) -> int:
        """Characters pushed so far, held ones included."""
        return self._length

    def push(self, text: str) -> str:
        """Take text in; return the text that is certain to come before any stop string. Nothing after the end."""
        out = []
        for character in text:
            if self.ended:
                break
            out.append(self._push(character))
        return "".join(out)

    def flush(self) -> str:
        """The text is over: what is held back and belongs to no stop string."""
        if self.ended:
            return ""
        self.ended = self.hit is not None
        return self._release(self.hit.start if self.hit else self._length)

    def _push(self, character: str) -> str:
        self._held += character
        self._length += 1
        for matcher in self._matchers:
            self._note(matcher.push(character), matcher.length)
        pending = min((self._length - matcher.matched for matcher in self._matchers), default=self._length)
        if self.hit is None:
            return self._release(pending)
        self.ended = pending >= self.hit.start
        return self._release(min(pending, self.hit.start))

    def _note(self, complete: bool, length: int) -> None:
        start = self._length - length
        if complete and (self.hit is None or start < self.hit.start):
            self.hit = Hit(start, self._length)

    def _release(self, until: int) -> str:
        count = len(self._held) - (self._length - until)
        out, self._held = self._held[:count], self._held[count:]
        return out


class _Matcher:
    """Finds one string in a text that comes a character at a time."""

    def __init__(self, pattern: str):
        self._pattern, self._fallback = pattern, _fallbacks(pattern)
        self.length = len(pattern)
        self.matched = 0  # longest beginning of the pattern that the text ends with; less than the pattern

    def push(self, character: str) -> bool:
        """Whether the pattern ends with this character."""
        self.matched = _advance(self._pattern, self._fallback, self.matched, character)
        if self.matched < self.length:
            return False
        self.matched = 0  # its next occurrence could only come later than this one
        return True


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix of the pattern: the length of its longest proper prefix that is also its suffix."""
    fallback = [0]
    for character in pattern[1:]:
        fallback.append(_advance(pattern, fallback, fallback[-1], character))
    return fallback


def _advance(pattern: str, fallback: list[int], matched: int, character: str) -> int:
    while matched and pattern[matched] != character:
        matched = fallback[matched - 1]
    return matched + (pattern[matched] == character)
