"""Python work that takes too long for the event loop: done in one thread, one piece after the other.

More threads would all compete for the interpreter's lock, and the device thread would wait for each of them.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Offload:
    """A thread that calls functions in turn. After each it rests `rest` times as long as that computed [0], so that
    callers who send much of it leave the interpreter to the others."""

    def __init__(self, name: str, rest: float = 0.0):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._rest, self._rested_at = rest, 0.0

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises, called in that thread."""
        return await asyncio.wrap_future(self._thread.submit(self._call, partial(function, *args, **kwargs)))

    def _call(self, work: Callable[[], T]) -> T:
        time.sleep(max(0.0, self._rested_at - time.monotonic()))
        begun = time.thread_time()
        try:
            return work()
        finally:
            self._rested_at = time.monotonic() + self._rest * (time.thread_time() - begun)


offload = Offload("offload", rest=1)
