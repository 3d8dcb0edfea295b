"""What is behind a role may come and go before the role is ready; health tells how it is."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve_services.launch.process import Host, keep_grpc
from colaserve_services.launch.settings import WatchSettings
from colaserve_services.rpc.settings import LogSettings, MetricsSettings, ServerSettings

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def status(host):
    async with grpc.aio.insecure_channel(host.addresses["grpc"]) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


@pytest.fixture
async def host():
    keep_grpc()
    watch = WatchSettings(MetricsSettings(port=0), LogSettings())
    host = Host("coordinator", watch, ServerSettings(), None)
    async with host.stack:
        await host.open_ports(grpc=True)
        await host.serve_grpc(context_bytes=1 << 20)
        yield host


@pytest.mark.parametrize("changes", [(), (False,), (False, True)])
async def test_what_changed_before_it_was_ready_is_not_lost(host, changes, capsys):
    for ready in changes:
        host.follow(ready)
    assert await status(host) == NOT_SERVING
    await host.ready()
    assert await status(host) == (SERVING if not changes or changes[-1] else NOT_SERVING)
