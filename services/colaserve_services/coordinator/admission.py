"""Who may work now, who waits, who is turned away at once: a bounded queue in front of the stages.

The queue is here and not in the stages, so that nobody encodes a prompt for a call that is refused later, and a refusal
comes at once. So the places follow the stages: as many calls work as the prior takes without letting them wait. How
many that is it tells itself: each generation brings the time that it waited there (`learned`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.observer import CoordinatorObserver
from colaserve_services.errors import Overloaded, Unavailable
from colaserve_services.rpc import unread

_SHORTEST_HINT, _LONGEST_HINT = 0.1, 60.0
_WEIGHT = 0.1  # of the latest call in the running mean of the pace
_SHORT_WAIT, _LONG_WAIT = 0.1, 1.0  # seconds in the prior's queue: below, there is room for more; above, for fewer
_SHRINK = 0.9
_FIRST_ROUND = 8  # calls that may wait at least while nobody knows how long one takes

_UNREAD_LOOK = 0.2  # seconds between two looks whether anybody waits, at a stream that nobody reads

_log = logging.getLogger(__name__)


class Admission:
    """First come, first served; nobody waits without end."""

    def __init__(self, limits: CoordinatorLimits, observer: CoordinatorObserver):
        self._limits, self._observer = limits, observer
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._by_key: Counter[str] = Counter()
        self._pace = 1.0  # seconds between two calls that end, were all places taken; running mean
        self._measured = 0  # calls it is the mean of
        self._places = float(limits.max_running)
        self._shrunk = 0.0  # when

    @property
    def running(self) -> int:
        """Calls at work."""
        return self._running

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    def begin_with(self, places: int) -> None:
        """How many calls may work at once to begin with: what one replica of the prior takes. 0: it did not say."""
        self._places = float(min(places or self._limits.max_running, self._limits.max_running))

    def learned(self, waited: float, admitted: float) -> None:
        """A generation that got its place at `admitted` (time.monotonic) waited so many seconds in the prior's queue.

        More calls work at once while none of them waits there and some wait here, fewer while they wait long; once
        fewer, that counts for the calls admitted from then on."""
        if waited < _SHORT_WAIT and self._waiting:
            self._places = min(self._places + 1, self._limits.max_running)
            _log.debug("places: %.0f", self._places)
            self._fill()
        elif waited > _LONG_WAIT and admitted > self._shrunk:
            self._places = max(self._places * _SHRINK, 1.0)
            self._shrunk = time.monotonic()
            _log.debug("places: %.0f, a call waited %.1f s at the prior", self._places, waited)

    @asynccontextmanager
    async def slot(self, call: Call, brief: bool = False) -> AsyncIterator[None]:
        """Work inside. Raises Overloaded at once when queue or key are full, or after waiting too long, and
        DeadlineExceeded when the call's deadline comes first. `brief`: the call tells nothing of how long others take.
        """
        self.check(call)
        self._by_key[call.key] += 1
        try:
            await self._enter(call)
            started, beside = time.monotonic(), self._running
            try:
                yield
                if not brief:
                    self._learn_pace((time.monotonic() - started) / ((beside + self._running) / 2))
            finally:
                self._pass_on()
                self._tell()
        finally:
            self._by_key[call.key] -= 1
            if not self._by_key[call.key]:
                del self._by_key[call.key]

    async def read_in_time(self, reading: asyncio.Future[None]) -> None:
        """Wait until a response is read. Raises Unavailable, and ends the call, once it was not read for so long that
        its slot is better given to one of those that wait."""
        seconds = self._limits.idle_seconds
        await asyncio.wait([reading], timeout=seconds)
        while not reading.done():
            if self._waiting:
                error = Unavailable(f"not read for {seconds:g} s while others waited")
                self._observer.refused("idle")
                unread.end_call(error)
                raise error
            await asyncio.wait([reading], timeout=_UNREAD_LOOK)

    def retry_after(self) -> float:
        """Seconds after which a place is likely free for one more."""
        return min(max(self._wait(), _SHORTEST_HINT), _LONGEST_HINT)

    def check(self, call: Call) -> None:
        """Raise Overloaded when queue or key are full. `slot` does it too; this is for before the first work."""
        limits = self._limits
        if limits.max_per_key and self._by_key[call.key] >= limits.max_per_key:
            raise self._refusal("key", f"{limits.max_per_key} calls of this client are under way, its limit")
        if self._running < int(self._places):
            return
        if len(self._waiting) >= limits.max_waiting:
            raise self._refusal("queue", f"{self._running} calls run and {len(self._waiting)} wait, the limits")
        if self._too_long():
            raise self._refusal(
                "queue", f"{self._running} calls run and {len(self._waiting)} wait, which takes too long"
            )

    def _too_long(self) -> bool:
        """Whether one more call would likely wait in vain. Estimates err, so half the patience counts; before the first
        call has ended there is none, and one round may wait."""
        if not self._measured:
            return len(self._waiting) >= max(int(self._places), _FIRST_ROUND)
        return bool(self._waiting) and self._wait() > self._limits.queue_seconds / 2

    def _wait(self) -> float:
        """Seconds that one more call would wait: the queue before it, at the mean pace so far."""
        return (len(self._waiting) + 1) * self._pace

    def _refusal(self, reason: str, message: str) -> Overloaded:
        self._observer.refused(reason)
        _log.debug("refused: %s; %s; one ends each %.2f s", reason, message, self._pace)
        return Overloaded(message, self.retry_after())

    async def _enter(self, call: Call) -> None:
        if self._running < int(self._places):
            self._running += 1
            self._tell()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._tell()
        try:
            await self._turn(turn, call)
        except BaseException:
            self._give_up(turn)
            raise

    async def _turn(self, turn: asyncio.Future[None], call: Call) -> None:
        left = call.left()
        patience = self._limits.queue_seconds if left is None else min(left, self._limits.queue_seconds)
        await asyncio.wait([turn], timeout=patience)
        if not turn.done():
            call.left()
            raise self._refusal("wait", f"no place was free within {self._limits.queue_seconds:g} s")

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done():  # its turn came in the same moment: pass it on
            self._pass_on()
        else:
            self._waiting.remove(turn)
        self._tell()

    def _learn_pace(self, seconds: float) -> None:
        """A call ended well, its time shared among those that ran beside it. One that was left early tells nothing."""
        self._measured += 1
        self._pace += max(_WEIGHT, 1 / self._measured) * (seconds - self._pace)

    def _pass_on(self) -> None:
        """A place is free: hand it to whoever waits longest, unless there are to be fewer places."""
        self._running -= 1
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._running < int(self._places):
            self._running += 1
            self._waiting.popleft().set_result(None)

    def _tell(self) -> None:
        self._observer.queued(len(self._waiting), self._running)
