"""Waiting until something comes to be."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 20.0  # seconds; a busy machine may stand still for some


async def eventually(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Return once a condition holds; fail when it does not in time."""
    for pause in _looks(holds, seconds):
        await asyncio.sleep(pause)


def wait_until(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """The same where there is no event loop."""
    for pause in _looks(holds, seconds):
        time.sleep(pause)


def _looks(holds: Callable[[], object], seconds: float) -> Iterator[float]:
    """The pauses between looks, until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it did not come to be within {seconds:g} s"
        yield 0.005


@contextmanager
def when(holds: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """What is inside runs, while another thread acts as soon as a condition holds; fail when it never did."""
    acted: list[object] = []

    def wait_and_act() -> None:
        wait_until(holds)
        acted.append(act())

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert acted, "the moment to act did not come"
