"""Ends the process when its device thread is gone or hangs: nothing else in it would notice."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

EXIT_CODE: Final = 70  # EX_SOFTWARE
_PATIENCE = 60.0  # seconds that a step may last at least
_TIMES_THE_LONGEST = 20  # and so many times the longest step so far
_FIRST_OF_A_SHAPE = 600.0  # seconds: kernels may be compiled and tuned
_INTERVAL = 1.0  # seconds between two looks
_LATE = 5.0  # seconds between two looks that count at most: for longer this process was stopped

_log = logging.getLogger(__name__)


def end_process(reason: str) -> None:
    """Say why, and exit at once: threads that hang cannot be joined, and may hold the locks of the log."""
    last_line = threading.Thread(target=_log.critical, args=("%s; the process ends", reason), daemon=True)
    last_line.start()
    last_line.join(5.0)
    os._exit(EXIT_CODE)


class Watchdog:
    """Watches one thread that works in steps.

    Only time in which this process ran counts: one that was stopped and goes on is not hung.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str], None] = end_process,
        interval: float = _INTERVAL,
    ):
        self._clock, self._end, self._interval = clock, end, interval
        self._stopped = threading.Event()
        self._shapes: set[object] = set()
        self._longest = 0.0
        self._step = 0  # number of the step that runs or ran last
        self._running = self._new_shape = False
        self._seen, self._lasted, self._looked = 0, 0.0, clock()  # of the looks: step, its seconds, time of the last

    # The watched thread's side.

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step lasts as long as this context."""
        self._step += 1
        self._new_shape, began = False, self._clock()
        self._running = True
        try:
            yield
        finally:
            self._running = False
            if not self._new_shape:
                self._longest = max(self._longest, self._clock() - began)

    def expect(self, shape: object) -> None:
        """The running step computes this shape; the first of a shape may take long."""
        if shape not in self._shapes:
            self._shapes.add(shape)
            self._new_shape = True

    # The watching side.

    def watch(self, thread: threading.Thread) -> None:
        """Look at a started thread now and then, until `stop`."""
        threading.Thread(target=self._watch, args=(thread,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """The thread may end now."""
        self._stopped.set()

    def _watch(self, thread: threading.Thread) -> None:
        while not self._stopped.wait(self._interval):
            reason = self.look(thread)
            if reason is not None:
                self._end(reason)
                return

    def look(self, thread: threading.Thread) -> str | None:
        """Why the process has to end; None if it has not."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, _LATE), now
        if not thread.is_alive() and not self._stopped.is_set():
            return "the device thread is gone"
        if not self._running or self._seen != self._step:
            self._seen, self._lasted = self._step, 0.0
            return None
        self._lasted += passed
        limit = max(_FIRST_OF_A_SHAPE if self._new_shape else _PATIENCE, _TIMES_THE_LONGEST * self._longest)
        if self._lasted <= limit:
            return None
        return f"a step on the device has lasted {self._lasted:.0f} s, longer than the {limit:.0f} s it may"
