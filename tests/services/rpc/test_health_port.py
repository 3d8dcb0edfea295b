"""The probes' port: health and nothing else, in plain text, beside a server with TLS and keys."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colaserve.v1 import encoder_pb2, encoder_pb2_grpc
from colaserve_services.errors import UsageError
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import ServerSettings, ServerTls
from tests.services.rpc.conftest import ONE, Encoder, running
from tests.waiting import eventually

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_it_tells_health_without_tls_and_keys_and_serves_nothing_else(authority):
    cert, key = authority.issue("server")
    settings = ServerSettings(health_port=0, tls=ServerTls(cert, key, authority.ca))
    async with (
        running(settings, Keys(["secret"]), ready=False) as it,
        grpc.aio.insecure_channel(f"127.0.0.1:{it.server.health_port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == SERVING
        await it.server.serving()
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await encoder_pb2_grpc.EncoderServiceStub(channel).GetInfo(encoder_pb2.EncoderServiceGetInfoRequest())
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_while_draining_it_says_not_serving_and_alive():
    async with running(ServerSettings(health_port=0)) as it:
        health_channel = grpc.aio.insecure_channel(f"127.0.0.1:{it.server.health_port}")
        async with health_channel:
            health = health_pb2_grpc.HealthStub(health_channel)
            it.servicer.gate.clear()
            call = it.stub.Encode(ONE)
            await eventually(lambda: it.servicer.started)
            drain = asyncio.create_task(it.server.drain(0.0))
            await asyncio.sleep(0.1)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == SERVING
            it.servicer.gate.set()
            await call
            await drain


async def test_without_the_setting_there_is_no_such_port():
    async with running() as it:
        assert it.server.health_port is None


async def test_a_taken_port_is_told_before_anything_is_served():
    async with running(ServerSettings(health_port=0)) as it:
        other = RpcServer(ServerSettings(health_port=it.server.health_port), Metrics())
        other.add(Encoder())
        with pytest.raises(UsageError, match="--health-port"):
            await other.start()
        await other.stop()
