"""Progress of long reads on stderr: a line that moves on a terminal, a line now and then elsewhere, JSON where the log
is JSON."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from colaserve_services.rpc import logs

QUIET_SECONDS = 2.0  # nothing is said about what is done sooner, except on a terminal
LINE_SECONDS = 5.0  # between two lines where there is no terminal

_log = logging.getLogger(__name__)


class Progress:
    """Callable with (bytes done, bytes in all)."""

    def __init__(self, what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._what, self._stream, self._clock = what, stream or sys.stderr, clock
        self._started = self._said = clock()
        self._json = stream is None and logs.are_json()
        self._terminal = self._stream.isatty() and not self._json
        self._open = False  # a moving line stands without its end

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._terminal:
            if now - self._said > 0.1 or done >= total:
                self._say(done, total, now, "\r")
        elif now - self._started > QUIET_SECONDS and now - self._said > LINE_SECONDS:
            self._say(done, total, now, "")

    def close(self) -> None:
        """End a line that stands open."""
        if self._open:
            self._write("\n")
            self._open = False

    def _say(self, done: int, total: int, now: float, begin: str) -> None:
        self._said, self._open = now, begin == "\r"
        rate = done / max(now - self._started, 1e-9)
        share = 100 * done // total if total else 100
        if self._json:
            _log.info(
                self._what, extra={"fields": {"share": share / 100, "bytes": total, "bytes_per_second": round(rate)}}
            )
            return
        text = f"{self._what}: {share}% of {size(total)}, {size(rate)}/s"
        self._write(f"\r{text:<70}" if self._open else f"{text}\n")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk, a terminal that is gone: no reason to end
            self._stream.write(text)
            self._stream.flush()


def size(count: float) -> str:
    """Bytes for eyes: 512 B, 3.1 MB, 7.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
