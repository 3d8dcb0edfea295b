"""Who may work now, who waits, who is turned away at once: a bounded queue in front of the stages."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.limits import CoordinatorLimits
from colaserve_services.coordinator.observer import CoordinatorObserver
from colaserve_services.errors import Overloaded

_SHORTEST_HINT, _LONGEST_HINT = 0.1, 60.0
_WEIGHT = 0.1  # of the latest call in the running mean of service seconds


class Admission:
    """First come, first served; nobody waits without end."""

    def __init__(self, limits: CoordinatorLimits, observer: CoordinatorObserver):
        self._limits, self._observer = limits, observer
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._by_key: Counter[str] = Counter()
        self._service_seconds = 1.0  # running mean

    @property
    def running(self) -> int:
        """Calls at work."""
        return self._running

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[None]:
        """Work inside. Raises Overloaded at once when queue or key are full, or after waiting too long, and
        DeadlineExceeded when the call's deadline comes first."""
        self._refuse_if_full(call.key)
        self._by_key[call.key] += 1
        try:
            await self._enter(call)
            started = time.monotonic()
            try:
                yield
            finally:
                self._leave(time.monotonic() - started)
        finally:
            self._by_key[call.key] -= 1
            if not self._by_key[call.key]:
                del self._by_key[call.key]

    def retry_after(self) -> float:
        """Seconds after which a place is likely free for one more: the queue before it, at the mean pace so far."""
        rounds = math.ceil((len(self._waiting) + 1) / self._limits.max_running)
        return min(max(rounds * self._service_seconds, _SHORTEST_HINT), _LONGEST_HINT)

    def _refuse_if_full(self, key: str) -> None:
        limits = self._limits
        if limits.max_per_key and self._by_key[key] >= limits.max_per_key:
            raise self._refusal("key", f"{limits.max_per_key} calls of this key are under way, its limit")
        if self._running >= limits.max_running and len(self._waiting) >= limits.max_waiting:
            raise self._refusal("queue", f"{self._running} calls run and {len(self._waiting)} wait, the limits")

    def _refusal(self, reason: str, message: str) -> Overloaded:
        self._observer.refused(reason)
        return Overloaded(message, self.retry_after())

    async def _enter(self, call: Call) -> None:
        if self._running < self._limits.max_running:
            self._running += 1
            self._tell()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._tell()
        try:
            await self._wait(turn, call)
        except BaseException:
            self._give_up(turn)
            raise

    async def _wait(self, turn: asyncio.Future[None], call: Call) -> None:
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

    def _leave(self, seconds: float) -> None:
        self._service_seconds += _WEIGHT * (seconds - self._service_seconds)
        self._pass_on()
        self._tell()

    def _pass_on(self) -> None:
        """Hand a free place to whoever waits longest."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._running -= 1

    def _tell(self) -> None:
        self._observer.queued(len(self._waiting), self._running)
