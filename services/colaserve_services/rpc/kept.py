"""An answer that is expensive to find: found once for all who ask together, and kept for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """What `find` gives, at most `seconds` old. For one event loop; one who leaves does not end it for the others."""

    def __init__(self, find: Callable[[], Awaitable[T]], seconds: float):
        self._find, self._seconds = find, seconds
        self._finding: asyncio.Future[T] | None = None
        self._begun = 0.0

    async def get(self) -> T:
        """The answer, or what `find` raised."""
        now = time.monotonic()
        if self._finding is None or (self._finding.done() and now - self._begun >= self._seconds):
            self._finding, self._begun = asyncio.ensure_future(self._find()), now
        return await asyncio.shield(self._finding)
