"""What is behind a role may come and go before the role is ready; health tells how it is."""

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.launch.process import Host, keep_grpc
from colaserve_services.launch.settings import Process
from colaserve_services.rpc.settings import ServerSettings

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
