"""What is behind a role may come and go before it is ready, as health tells; signals are never lost; a process under
`up --split` that runs but answers nobody is ended."""

import asyncio
import contextlib
import logging
import os
import signal
from collections import Counter

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.launch.process import Host, Signals, keep_grpc
from colaserve_services.launch.settings import Process
from colaserve_services.launch.split import Child, Liveness
from colaserve_services.rpc.settings import ChannelSettings, ServerSettings
from tests.conftest import GOLDEN
from tests.services.launch.processes import QUIET
from tests.waiting import eventually

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def status(host):
    async with grpc.aio.insecure_channel(host.addresses["grpc"]) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


@pytest.fixture
async def host():
    keep_grpc()
    host = Host("coordinator", Process(metrics_port=0))
    async with host.stack:
        await host.open_ports(ServerSettings())
        await host.serve_grpc(context_bytes=1 << 20)
        yield host


@pytest.mark.parametrize("changes", [(), (False,), (False, True)])
async def test_what_changed_before_it_was_ready_is_not_lost(host, changes, capsys):
    for ready in changes:
        host.follow(ready)
    assert await status(host) == NOT_SERVING
    await host.ready()
    assert await status(host) == (SERVING if not changes or changes[-1] else NOT_SERVING)


async def probed(host, question):
    async with httpx.AsyncClient() as http:
        return (await http.get(host.addresses["metrics"].replace("/metrics", f"/{question}"))).status_code


async def test_probes_find_health_at_the_metrics_port(host):
    assert (await probed(host, "live"), await probed(host, "ready")) == (200, 503)
    await host.ready()
    assert (await probed(host, "live"), await probed(host, "ready")) == (200, 200)
    await host.failing(True)
    assert (await probed(host, "live"), await probed(host, "ready")) == (503, 503)
    await host.failing(False)
    await host.drain(0.0)
    assert (await probed(host, "live"), await probed(host, "ready")) == (200, 503)
    assert await probed(host, "other") == 404


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


@pytest.mark.slow
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
