"""Progress of long reads: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

from colaserve_services.rpc import logs

QUIET_SECONDS = 2.0  # nothing is said about what is done sooner
LINE_SECONDS = 5.0  # between two log lines

_log = logging.getLogger(__name__)


class Progress:
    """Callable with (bytes done, bytes in all)."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic):
        self._what, self._clock, self._said = what, clock, clock()
        off = True if logs.are_json() else None  # None: off where there is no terminal
        self._bar = tqdm(desc=what, unit="B", unit_scale=True, delay=QUIET_SECONDS, leave=False, disable=off)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now = self._clock()
        if self._bar.disable and now - self._said > LINE_SECONDS:
            self._said, share = now, round(done / max(total, 1), 2)
            _log.info("%s: %d%% of %s", self._what, 100 * share, size(total), extra={"fields": {"share": share}})

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def size(count: float) -> str:
    """Bytes for eyes: 512 B, 3.1 MB, 7.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
