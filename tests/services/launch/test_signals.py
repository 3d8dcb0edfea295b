"""Signals are never lost, whatever they come with."""

import asyncio
import signal

import pytest

from colaserve_services.launch.signals import Signals


@pytest.fixture
async def signals():
    yield Signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_signal_ends_work(signals):
    asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)
    assert await signals.ended(asyncio.sleep(30)) == signal.SIGTERM


@pytest.mark.parametrize("steps", range(4))
async def test_a_signal_that_comes_as_work_ends_ends_it_or_is_there_afterwards(signals, steps):
    """`steps` of the event loop before the end of the work."""

    async def work():
        signal.raise_signal(signal.SIGTERM)
        for _ in range(steps):
            await asyncio.sleep(0)

    if await signals.ended(work()) == signal.SIGTERM:
        return
    assert await asyncio.wait_for(signals.next(), 1) == signal.SIGTERM
