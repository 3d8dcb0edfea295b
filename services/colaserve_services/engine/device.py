"""The one thread of a process that computes on its device."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from colaserve_services.engine.failures import lost_device
from colaserve_services.engine.watchdog import Watchdog

log = logging.getLogger(__name__)


class Worker(Protocol):
    """Something that the device thread works for."""

    def step(self, heavy: bool) -> bool:
        """Do one bounded piece of work; False if there was none. `heavy`: also for those that need much of it."""

    @property
    def computes(self) -> bool:
        """Whether a step that has ended still computes on the device."""

    def next_deadline(self) -> float | None:
        """When (time.monotonic) a look is due even if nobody wakes the thread."""

    def fail(self, error: Exception) -> None:
        """End all that is held: a step failed in a way that is no session's fault."""


class DeviceThread:
    """Shares its time among workers: a step for the one that had least of it, of equals for the one registered first.
    Heavy work of all together has at most half of it while there is other work.

    Several threads that each compute with torch on a CPU fight through their OpenMP teams, so whatever roles live in a
    process, one thread computes for all of them. A team once made counts against the cores until its thread ends, also
    while it does nothing (docs/decisions.md, "One OpenMP team"): other threads compute nothing, or end.

    So long prefills of one stage leave the others their part, and the short steps of encoder and decoder come before
    the prior's next one. Time in which a worker has nothing to do is not owed to it later.

    The watchdog ends the process when the thread dies, as it does with the device, or hangs in a step.
    """

    def __init__(
        self,
        name: str = "device",
        watchdog: Watchdog | None = None,
        begin: Callable[[], None] = lambda: None,
    ):
        """`begin` is the first thing that the thread does."""
        self._begin = begin
        self._workers: list[Worker] = []
        self._had: dict[Worker, float] = {}  # seconds of the device
        self._least = 0.0  # that a worker counts as having had: what the one served last had before
        self._owed = 0.0  # seconds that other work has before more heavy work
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._watchdog = watchdog or Watchdog()

    def register(self, worker: Worker) -> None:
        """Add a worker; before `start`."""
        self._workers.append(worker)
        self._had[worker] = 0.0

    def start(self) -> None:
        self._thread.start()
        self._watchdog.watch(self._thread)

    def stop(self) -> None:
        """End after the running step; what is in flight is abandoned. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def wake(self) -> None:
        """There may be work, or something to free. Any thread."""
        self._wake.set()

    def took(self, seconds: float, heavy: float) -> None:
        """So long did a pass take, of which this part was heavy work."""
        self._owed = max(0.0, self._owed + (2 * heavy - 1) * seconds)

    def expect(self, shape: object) -> None:
        """What the running step computes now; see `Watchdog.expect`."""
        self._watchdog.expect(shape)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self._begin()
            while not self._stopping:
                self._wake.clear()
                if not self._one_step():
                    self._wake.wait(self._patience())
            self._watchdog.stop()  # from here on it may be gone
        except BaseException:  # the watchdog sees that the thread is gone
            log.exception("the device thread dies")

    def _one_step(self) -> bool:
        """One step of one worker; False if none had work."""
        for heavy in (False, True) if self._owed else (True,):
            if heavy and self._owed:
                if any(worker.computes for worker in self._workers):
                    return False
                self._owed = 0.0  # there is no other work
            for worker in sorted(self._workers, key=self._had.__getitem__):
                began = time.monotonic()
                if self._works(worker, heavy):
                    self._least = max(self._least, self._had[worker])
                    self._had[worker] = self._least + time.monotonic() - began
                    return True
        return False

    def _works(self, worker: Worker, heavy: bool) -> bool:
        with self._watchdog.step():
            try:
                return worker.step(heavy)
            except Exception as error:
                if lost_device(error):
                    raise
                log.exception("a step failed; its sessions end")
                worker.fail(error)
                return True

    def _patience(self) -> float | None:
        due = [deadline for worker in self._workers if (deadline := worker.next_deadline()) is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None
