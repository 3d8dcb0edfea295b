"""Waiting until something comes to be."""

import asyncio
import time
from collections.abc import Callable


async def eventually(holds: Callable[[], object], seconds: float = 5.0) -> None:
    """Return once a condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it did not come to be within {seconds:g} s"
        await asyncio.sleep(0.005)
