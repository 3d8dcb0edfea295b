"""Progress of long reads: a bar on a terminal, a log line now and then elsewhere."""

import logging
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from colaserve_services.rpc import logs

QUIET_SECONDS = 2.0  # nothing is said about what is done sooner
LINE_SECONDS = 5.0  # between two log lines

_log = logging.getLogger(__name__)


class Progress(tqdm):
    """Called with (bytes done, bytes in all), or updated as a tqdm bar by a library that makes it."""

    def __init__(self, desc: str = "", clock: Callable[[], float] = time.monotonic, **given: Any):
        self._what, self._clock, self._said = desc, clock, clock()
        off = True if logs.are_json() else None  # None: off where there is no terminal
        given |= {"unit": "B", "unit_scale": True, "delay": QUIET_SECONDS, "leave": False, "disable": off}
        super().__init__(desc=desc, **given)

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        self.update(done - self.n)

    def update(self, n: float | None = 1) -> bool | None:
        """So many bytes more."""
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        now, total = self._clock(), self.total or 0
        if now - self._said > LINE_SECONDS:
            self._said, share = now, round(self.n / max(total, 1), 2)
            _log.info("%s: %d%% of %s", self._what, 100 * share, size(total), extra={"fields": {"share": share}})
        return None


def size(count: float) -> str:
    """Bytes for eyes: 512 B, 3.1 MB, 7.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
