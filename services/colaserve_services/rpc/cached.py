"""An answer that is expensive to compute, cached for a while."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """What `find` gives, at most `seconds` old. Callers that come together share one call of it, which goes on when one
    of them is cancelled. For one event loop."""

    def __init__(self, find: Callable[[], Awaitable[T]], seconds: float):
        self._find, self._seconds = find, seconds
        self._answer: asyncio.Future[T] | None = None
        self._begun = 0.0

    async def get(self) -> T:
        """The answer, or what `find` raised."""
        now = time.monotonic()
        if self._answer is None or (self._answer.done() and now - self._begun >= self._seconds):
            self._answer, self._begun = asyncio.ensure_future(self._find()), now
        return await asyncio.shield(self._answer)
