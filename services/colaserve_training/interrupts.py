"""Ctrl-C, SIGTERM and SIGHUP during training: the running step is finished and a state saved before the run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from colaserve_services.errors import ColaserveError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(ColaserveError):
    """A signal ended the run; its state was saved. The message says how to continue."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class Stop:
    """Which signal asked this process to stop; 0 while none did."""

    signal = 0


@contextmanager
def noticed(alone: bool = True) -> Iterator[Stop]:
    """Note signals instead of dying of them. A second one ends the process at once if it is `alone`.

    Under torchrun a Ctrl-C reaches each process twice, from the terminal and from torchrun, which kills processes
    that have not ended 30 seconds later. A signal that was ignored at start (nohup) stays ignored.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if alone and stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in caught:
            signal.signal(number, before[number])
