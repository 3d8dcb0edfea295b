"""A session: what one caller holds in an engine, and the way its results go back to the caller's event loop."""

import asyncio
import contextvars
import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timings:
    """Where the time of a piece of work went, in microseconds."""

    queue_us: int
    compute_us: int


class _Shown(Generic[T]):
    """A preview on its way; None once something came that replaces it."""

    def __init__(self, item: T):
        self.item: T | None = item


class Outbox(Generic[T]):
    """Results on their way from the device thread to one asyncio reader; ends with a close or an error."""

    def __init__(self, on_read: Callable[[], None] = lambda: None):
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | _Shown[T] | BaseException | None] = asyncio.Queue()
        self._shown: _Shown[T] | None = None  # at the queue's end
        self._on_read = on_read
        self._lock = threading.Lock()
        self.unread = 0

    def put(self, item: T) -> None:
        with self._lock:
            self.unread += 1
        self.soon(self._add, item)

    def show(self, item: T) -> None:
        """An item that does not count as unread, and that the next one of any kind replaces while it is unread."""
        self.soon(self._add, _Shown(item))

    def close(self) -> None:
        self.soon(self._add, None)

    def fail(self, error: BaseException) -> None:
        self.soon(self._add, error)

    def _add(self, item: T | _Shown[T] | BaseException | None) -> None:
        if self._shown is not None:
            self._shown.item = None
        self._shown = item if isinstance(item, _Shown) else None
        self._queue.put_nowait(item)

    def soon(self, call: Callable[..., object], *values: object) -> None:
        """Call on the reader's event loop."""
        with suppress(RuntimeError):  # it is closed, and with it the reader is gone
            self._loop.call_soon_threadsafe(call, *values)

    async def get(self) -> T | None:
        """The next result; None when there are no more. Raises what the session failed with."""
        while isinstance(item := await self._queue.get(), _Shown):
            if item.item is not None:
                return item.item
        if item is None or isinstance(item, BaseException):
            self._queue.put_nowait(item)  # later reads end the same way
            if item is not None:
                raise item
            return None
        with self._lock:
            self.unread -= 1
        self._on_read()
        return item


class Session(Generic[T]):
    """Base of the engines' sessions. Made on the event loop; everything but `cancel` and `evict` then belongs to the
    device thread."""

    def __init__(self, *, claim: int, most: int, deadline: float | None, on_read: Callable[[], None]):
        """Pages of KV: what it takes to start, and what it may grow to."""
        self.claim, self.most, self.deadline = claim, most, deadline
        self.pages = array("i")  # that it holds, one a block
        self.keys: Sequence[bytes] = ()  # of its leading blocks, which others may have computed or may begin with
        self.remembered = 0  # of these blocks, how many others can begin with
        self.outbox: Outbox[T] = Outbox(on_read)
        self._call = contextvars.copy_context()  # of the call that it serves
        self.end_call: Callable[[Exception], None] = lambda error: None  # wherever that call waits; in its context
        self.arrived = time.monotonic()
        self.started: float | None = None
        self.reserves = False  # whether it may hold pages
        self.holds_kv = False  # whether it has started since it last might
        self.slot = -1  # its own among those that run
        self.holds_since = math.inf  # when it did (time.monotonic)
        self.served = 0  # number of the last pass that took part of its context or prefix in; 0: none yet
        self.passed = 0  # newcomers that were taken since it was preempted
        self.cancelled = False
        self.finished = False
        self.idle_since = math.inf  # when a pass could last have computed for it (time.monotonic); inf: one can now

    @property
    def wanted(self) -> bool:
        """Whether it still has something to do for someone."""
        return not (self.finished or self.cancelled)

    def log(self, logger: logging.Logger, level: int, message: str, *values: object, of: Exception | None) -> None:
        """A line of the log that bears the request id of the session's call; `of`: whose traceback goes with it."""
        self._call.run(logger.log, level, message, *values, exc_info=of)

    def evict(self, error: Exception) -> None:
        """Fail, and end its call too: that may wait for a caller who neither sends nor reads. Any thread."""
        self.outbox.fail(error)
        self.outbox.soon(self._call.run, self.end_call, error)
        self.cancel()

    def cancel(self) -> None:
        """The caller is gone. Any thread; the device thread frees the session before its next step."""
        self.cancelled = True

    @property
    def cached(self) -> int:
        """Leading blocks that are in its pages."""
        return 0

    def begin(self) -> None:
        """Called before the first `start`."""

    def start(self, known: int, beside: Sequence[Any]) -> None:
        """Called before the first step, and after each `preempt` once there are pages again.

        `known`: leading blocks that its pages hold already; `beside`: what was kept with each.
        """

    def lacking(self) -> int:
        """Pages that the next pass takes and it does not hold."""
        return 0

    def preemptible(self) -> bool:
        """Whether it has come far enough since `start` that `preempt` costs little of what it did."""
        return False

    def preempt(self) -> None:
        """Its pages are gone: keep what is needed to write them again, and set `claim`."""

    def free(self) -> list[int]:
        """Pages that it holds beside `pages`; called once, also for a session that never started."""
        return []

    def ready(self) -> bool:
        """Whether a forward pass would compute something for this session."""
        return True

    def remaining(self) -> int:
        """How much of its context is still to be computed, in the engine's own unit."""
        return 0

    def resumed(self) -> None:
        """It was idle, and has something to compute again."""

    def timings(self, since: float) -> Timings:
        """Of a result finished now whose work was first possible at `since`."""
        started = self.started if self.started is not None else since
        begin = max(started, since)
        return Timings(int((begin - since) * 1e6), int((time.monotonic() - begin) * 1e6))
