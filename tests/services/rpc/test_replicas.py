"""The replicas behind a target, one connection each."""

import asyncio
import socket
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from colaserve.v1 import encoder_pb2_grpc
from colaserve_services.errors import UsageError
from colaserve_services.rpc.connections import Replicas
from colaserve_services.rpc.settings import ChannelSettings, ClientTls, ServerSettings, ServerTls
from tests.services.rpc.conftest import ONE, running
from tests.waiting import eventually

SERVICE = "colaserve.v1.EncoderService"


@asynccontextmanager
async def found(target, settings=None, began=lambda: None):
    replicas = Replicas(encoder_pb2_grpc.EncoderServiceStub, target, settings or ChannelSettings(), SERVICE, began)
    await replicas.find()
    try:
        yield replicas
    finally:
        await replicas.close()


async def test_each_replica_is_called_by_itself_and_tells_whether_it_serves():
    began = asyncio.Event()
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running()) for _ in range(2)]
        target = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        replicas = await stack.enter_async_context(found(target, began=began.set))
        assert [each.address for each in replicas] == target.split(",")
        await eventually(lambda: all(each.serving for each in replicas))
        await asyncio.wait_for(began.wait(), 5)
        first, second = replicas
        for each in (first, first, second):
            await each.stub.Encode(ONE, timeout=30)
        assert [server.servicer.started for server in servers] == [2, 1]
        lives = first.lives, second.lives
        draining = asyncio.ensure_future(servers[0].server.drain(drain_seconds=3600))
        await eventually(lambda: not first.serving)
        assert second.serving
        assert (first.lives > lives[0], second.lives) == (True, lives[1])
        draining.cancel()


async def test_names_are_looked_up_again_and_replicas_that_are_gone_are_left_when_they_do_not_serve(monkeypatch):
    known = ["127.0.0.1"]

    async def getaddrinfo(host, port, **options):
        if not known:
            raise socket.gaierror("nobody knows it")
        assert host == "stage.test"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with running() as it, found(f"dns:///stage.test:{it.port}") as replicas:
        replicas.follow(look_seconds=0.01)
        [first] = replicas
        await eventually(lambda: first.serving)
        known[:] = ["127.0.0.2", "127.0.0.3"]
        await eventually(lambda: len(list(replicas)) == 3)  # the first one serves still
        known.clear()
        await asyncio.sleep(0.05)
        assert len(list(replicas)) == 3
        known[:] = ["127.0.0.2"]
        await it.server.stop()
        await eventually(lambda: [each.address for each in replicas] == [f"127.0.0.2:{it.port}"])


async def test_certificates_are_for_the_name_that_was_looked_up(authority, monkeypatch):
    async def getaddrinfo(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    cert, key = authority.issue("server")
    settings = ChannelSettings(tls=ClientTls(authority.ca))
    async with running(ServerSettings(tls=ServerTls(cert, key))) as it:
        async with found(f"localhost:{it.port}", settings) as replicas:
            [each] = replicas
            await each.stub.Encode(ONE, wait_for_ready=True, timeout=30)
        async with found(f"elsewhere.test:{it.port}", settings) as replicas:
            [each] = replicas
            with pytest.raises(grpc.aio.AioRpcError):
                await each.stub.Encode(ONE, timeout=10)


@pytest.mark.parametrize("target", ["", "a", "a:1,", "a:1,b", "a:0", "a:70000"])
def test_what_is_no_address_is_refused(target):
    with pytest.raises(UsageError):
        Replicas(encoder_pb2_grpc.EncoderServiceStub, target, ChannelSettings(), SERVICE)


@pytest.mark.parametrize("target", ["unix:/tmp/a", "unix:///tmp/a", "ipv4:127.0.0.1:1", "[::1]:5"])
async def test_what_needs_no_look_up_stands_for_itself(target):
    async with found(target) as replicas:
        assert [each.address for each in replicas] == [target.removeprefix("ipv4:")]
