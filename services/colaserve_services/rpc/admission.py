"""Bounds at a server's edge: calls at once, calls at once and per second by client. Refusals come at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from colaserve_services.errors import Overloaded
from colaserve_services.rpc.settings import AdmissionLimits

MOST_BUCKETS = 10_000  # clients whose rate is remembered


class Admission:
    """Counts the calls of one server."""

    def __init__(
        self,
        limits: AdmissionLimits,
        refused: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits, self._refused, self._clock = limits, refused, clock
        self._running: Counter[str] = Counter()
        self._total = 0
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> (tokens left, when)

    @contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Count a call of `client` while it runs; raise Overloaded when it is one too many."""
        limits = self._limits
        if limits.max_calls and self._total >= limits.max_calls:
            self._refuse("calls", f"this server runs {self._total} calls, the most it takes", 1.0)
        if limits.max_calls_per_client and self._running[client] >= limits.max_calls_per_client:
            self._refuse("client", f"this client runs {self._running[client]} calls, the most it may", 1.0)
        self._take_token(client)
        self._running[client] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]

    def _take_token(self, client: str) -> None:
        rate = self._limits.max_rate_per_client
        if not rate:
            return
        now = self._clock()
        tokens, since = self._buckets.pop(client, (max(rate, 1.0), now))
        tokens = min(max(rate, 1.0), tokens + (now - since) * rate)
        if len(self._buckets) >= MOST_BUCKETS:
            del self._buckets[next(iter(self._buckets))]  # the one not seen for longest
        self._buckets[client] = (tokens if tokens < 1 else tokens - 1, now)
        if tokens < 1:
            self._refuse("rate", f"this client may start {rate:g} calls a second", (1 - tokens) / rate)

    def _refuse(self, reason: str, message: str, retry_after: float) -> None:
        self._refused(reason)
        raise Overloaded(message, retry_after)
