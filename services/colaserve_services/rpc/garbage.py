"""When the garbage collector runs: after so many bytes of requests.

A call that failed leaves its message in a reference cycle of exceptions, tasks and frames (grpc.aio, asyncio and
starlette make them). Python's collector goes by the number of objects, not by their size, so that a hundred messages
of 4 MiB would stay in memory for minutes.
"""

import gc
from collections.abc import Callable
from typing import Final

EVERY: Final = 16 * 1024 * 1024  # bytes received between two runs


class Garbage:
    """Counts the bytes of requests at one edge."""

    def __init__(self, every: int = EVERY, collect: Callable[[], object] = gc.collect):
        self._every, self._collect, self._received = every, collect, 0

    def received(self, size: int) -> None:
        """A message of `size` bytes has come; collect what earlier ones left if that is due."""
        self._received += size
        if self._received >= self._every:
            self._received = 0
            self._collect()


def keep_what_is_there() -> None:
    """Leave all objects there are now, such as modules and networks, out of later runs, which are short then."""
    gc.collect()
    gc.freeze()
