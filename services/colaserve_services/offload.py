"""Python work that takes too long for the event loop: done in one thread, one piece after the other.

More threads would all compete for the interpreter's lock, and the device thread would wait for each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_thread = ThreadPoolExecutor(1, thread_name_prefix="offload")


async def offload(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function returns or raises, called in that thread."""
    return await asyncio.wrap_future(_thread.submit(function, *args, **kwargs))
