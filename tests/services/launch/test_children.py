"""A process under `up --split` that runs but answers nobody."""

import asyncio
import contextlib
import logging
import os
import signal
from collections import Counter

import psutil
import pytest

from colaserve_services.launch.children import Child, Liveness
from colaserve_services.rpc.settings import ChannelSettings
from tests.conftest import GOLDEN
from tests.services.launch.processes import QUIET
from tests.waiting import eventually

pytestmark = pytest.mark.slow

FREE = (f"--model={GOLDEN / 'tiny_b4'}", "--host=127.0.0.1", "--grpc-port=0", "--metrics-port=0", "--drain-seconds=0")
LIVENESS = Liveness(period=0.1, timeout=0.5, failures=3)


def processes():
    return set(psutil.Process().children())


async def stand_still_until_ended(process):
    """Once is enough where the watch has had an answer before: who never answered still starts."""
    while process.is_running():
        process.suspend()
        with contextlib.suppress(AssertionError):
            await eventually(lambda: not process.is_running(), 4)
            return
        process.resume()
        await asyncio.sleep(1)


async def test_one_that_no_longer_answers_is_ended_and_starts_again_on_its_ports(caplog):
    environment, before = {**os.environ, **QUIET}, processes()
    child = Child("prior", "prior", list(FREE), environment, ChannelSettings(), 1.0, LIVENESS)
    try:
        async with asyncio.timeout(100):
            await child.start()
            await child.serving()
            addresses, (first,) = child.addresses, processes() - before
            watch = asyncio.ensure_future(child.keep_running())
            await stand_still_until_ended(first)
            await eventually(lambda: processes() - before)
            await child.serving()
            assert child.addresses == addresses
            watch.cancel()
    finally:
        await child.stop(signal.SIGTERM)
    assert not processes() - before
    assert Counter(record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR) == {
        "prior is not alive: ending it": 1,
        "prior ended with exit code -9: it starts again in 0 s": 1,
    }
