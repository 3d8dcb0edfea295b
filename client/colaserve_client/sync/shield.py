"""gRPC's blocking code away from the main thread, where Ctrl-C would break it off at any place.

Python raises KeyboardInterrupt between any two instructions of the main thread. Inside gRPC's Python code that leaves
locks that are not held and calls that are half made: other errors come of it than KeyboardInterrupt, or none, and
traces on standard error. So the main thread hands a call to another thread and only waits for what comes of it.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SIGNAL_CHECK_SECONDS = 0.2
"""Waits of the main thread are no longer than that: Ctrl-C just before a wait does not end it."""


class _Outcome(NamedTuple):
    value: Any
    error: BaseException | None


_Tasks = SimpleQueue[tuple[Callable[[], Any], SimpleQueue[_Outcome]] | None]


class Shield:
    """Runs functions, for the main thread in another one; that one ends with the shield."""

    def __init__(self) -> None:
        self._tasks: _Tasks | None = None
        self._end: Callable[[], Any] = lambda: None

    @staticmethod
    def needed() -> bool:
        """Whether this is the main thread."""
        return threading.current_thread() is threading.main_thread()

    def run(self, function: Callable[[], T]) -> T:
        """What the function returns or raises. After Ctrl-C it still runs to its end, and nobody learns its outcome."""
        if not self.needed():
            return function()
        outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        try:
            self._queue().put((function, outcomes))
            outcome = _first(outcomes)
        except BaseException:
            self.close()  # its thread may be busy for long
            raise
        if outcome.error is not None:
            try:
                raise outcome.error
            finally:
                del outcome  # no cycle of the error and this frame
        return outcome.value  # type: ignore[no-any-return]

    def _queue(self) -> _Tasks:
        if self._tasks is None:
            tasks: _Tasks = SimpleQueue()
            self._end = weakref.finalize(self, tasks.put, None)
            threading.Thread(target=_work, args=(tasks,), name="colaserve-calls", daemon=True).start()
            self._tasks = tasks
        return self._tasks

    def close(self) -> None:
        """Let the thread end once it is done."""
        self._tasks = None
        self._end()


def _first(outcomes: SimpleQueue[_Outcome]) -> _Outcome:
    while True:
        with suppress(Empty):
            return outcomes.get(timeout=SIGNAL_CHECK_SECONDS)


def _work(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        function, outcomes = task
        try:
            outcomes.put(_Outcome(function(), None))
        except BaseException as error:
            outcomes.put(_Outcome(None, error))
        del task, function, outcomes  # what they hold is not kept until the next one comes
