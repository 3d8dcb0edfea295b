"""Channels go round over replicas that are SERVING, connections outlive certificates, names are looked up again."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import grpc
import pytest
from grpc import StatusCode

from colaserve.v1 import encoder_pb2_grpc
from colaserve_services.errors import UsageError
from colaserve_services.rpc import requests
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.channels import Stub, open_channel, resolve
from colaserve_services.rpc.connections import Connection, Replicas
from colaserve_services.rpc.settings import ChannelSettings, ServerSettings, Tls
from tests.services.rpc.conftest import ONE, encode, running
from tests.services.servers import failure
from tests.waiting import eventually

SERVICE = "colaserve.v1.EncoderService"


async def test_calls_go_round_over_serving_replicas_only():
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(running()) for _ in range(3)]
        first, second, _ = replicas
        target = ",".join(f"localhost:{replica.port}" for replica in replicas)
        channel = await stack.enter_async_context(open_channel(target, ChannelSettings(), SERVICE))
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)

        async def served_by(count=12):
            before = [replica.servicer.started for replica in replicas]
            for _ in range(count):
                await stub.Encode(ONE, wait_for_ready=True, timeout=30)
            return [r.servicer.started - b for r, b in zip(replicas, before, strict=True)]

        async def until(condition):
            for _ in range(200):
                with suppress(grpc.aio.AioRpcError):  # of a replica whose end was not noticed yet
                    if condition(counts := await served_by()):
                        return counts
                await asyncio.sleep(0.05)
            raise AssertionError("it never came to be")

        await until(lambda counts: counts == [4, 4, 4])
        draining = asyncio.ensure_future(second.server.drain(drain_seconds=3600))
        await until(lambda counts: counts[1] == 0 and counts[0] == counts[2] == 6)
        await first.server.stop()
        assert await until(lambda counts: counts[0] == 0) == [0, 0, 12]
        draining.cancel()


async def test_services_are_called_past_a_proxy_of_the_environment(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with running() as replica, open_channel(f"localhost:{replica.port}", ChannelSettings(), SERVICE) as channel:
        assert await encode(channel)


async def test_a_connection_is_reached_when_a_replica_serves_and_not_waited_for_longer_than_asked():
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(running(ready=False)) for _ in range(2)]
        target = ",".join(f"localhost:{replica.port}" for replica in replicas)
        connection = Connection(encoder_pb2_grpc.EncoderServiceStub, target, ChannelSettings(), SERVICE)
        stack.push_async_callback(connection.close)
        started = time.monotonic()
        await connection.reached(0.3)
        assert time.monotonic() - started >= 0.3
        await failure(connection.stub.Encode(ONE, timeout=30))  # at once, whatever its deadline
        waiting = asyncio.ensure_future(connection.reached(30))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await replicas[1].server.serving()
        await asyncio.wait_for(waiting, 10)
        await connection.stub.Encode(ONE, timeout=30)
        assert [replica.servicer.started for replica in replicas] == [0, 1]


async def test_a_stub_carries_the_key_and_the_request_id_of_the_call_being_served():
    async with running(keys=Keys(["s3cret"])) as it:
        settings = ChannelSettings(api_key="s3cret")
        async with open_channel(f"127.0.0.1:{it.port}", settings, SERVICE) as channel:
            stub = Stub(encoder_pb2_grpc.EncoderServiceStub, channel, settings)
            requests.adopt((("x-request-id", "outer"),))
            call = stub.Encode(ONE, wait_for_ready=True, timeout=30)
            await call
            assert dict(await call.trailing_metadata())["x-request-id"] == "outer"
    assert "s3cret" not in repr(settings)


async def test_a_channel_verifies_the_server_and_shows_its_certificate(authority):
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client", "client")
    async with running(ServerSettings(tls=Tls(cert, key, authority.ca))) as it:
        settings = ChannelSettings(tls=Tls(mine, my_key, authority.ca))
        async with open_channel(f"127.0.0.1:{it.port}", settings, SERVICE, host="localhost") as channel:
            await encode(channel)
        async with open_channel(f"127.0.0.1:{it.port}", settings, SERVICE, host="elsewhere") as channel:
            assert (await failure(encode(channel, wait_for_ready=False))).code() == StatusCode.UNAVAILABLE


@asynccontextmanager
async def followed_certificate(authority):
    """A server that asks for certificates, and a connection to it that looks often at its own, `client.pem`."""
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client", "first")
    async with running(ServerSettings(tls=Tls(cert, key, authority.ca))) as it:
        settings = ChannelSettings(tls=Tls(mine, my_key, authority.ca))
        connection = Connection(encoder_pb2_grpc.EncoderServiceStub, f"127.0.0.1:{it.port}", settings, SERVICE)
        connection.follow(look_seconds=0.05)
        try:
            yield it, connection
        finally:
            await connection.close()


async def test_a_renewed_client_certificate_is_shown_without_a_restart_and_running_calls_continue(authority):
    async with followed_certificate(authority) as (it, connection):
        it.servicer.gate.clear()
        early = asyncio.ensure_future(connection.stub.Encode(ONE, wait_for_ready=True, timeout=10))
        await eventually(lambda: it.servicer.started == 1)
        lives = connection.lives
        authority.issue("client", "second")
        await eventually(lambda: connection.lives > lives)
        late = asyncio.ensure_future(connection.stub.Encode(ONE, wait_for_ready=True, timeout=10))
        await eventually(lambda: it.servicer.started == 2)
        it.servicer.gate.set()
        await asyncio.gather(early, late)
        assert it.servicer.clients == ["first", "second"]


async def test_a_client_certificate_that_does_not_fit_its_key_is_not_used(authority, caplog):
    async with followed_certificate(authority) as (it, connection):
        other, key = authority.issue("other", "second")
        (authority.folder / "client.pem").write_bytes(other.read_bytes())
        await eventually(lambda: "stays in use" in caplog.text)
        await connection.stub.Encode(ONE, wait_for_ready=True, timeout=30)
        lives = connection.lives
        (authority.folder / "client.key").write_bytes(key.read_bytes())
        await eventually(lambda: connection.lives > lives)
        await connection.stub.Encode(ONE, wait_for_ready=True, timeout=30)
        assert it.servicer.clients == ["first", "second"]
        caplog.clear()
        (authority.folder / "client.pem").unlink()
        await eventually(lambda: "stays in use" in caplog.text)
        await connection.stub.Encode(ONE, timeout=30)


async def test_a_connection_reaches_its_maximum_age_without_losing_a_call():
    async with AsyncExitStack() as stack:
        it = await stack.enter_async_context(running(ServerSettings(max_connection_age=0.3)))
        target = f"127.0.0.1:{it.port}"
        channel = await stack.enter_async_context(open_channel(target, ChannelSettings(), SERVICE))
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)
        it.servicer.gate.clear()
        long = asyncio.ensure_future(stub.Encode(ONE, wait_for_ready=True, timeout=10))
        await eventually(lambda: it.servicer.started == 1)
        await asyncio.sleep(0.8)
        it.servicer.gate.set()
        await long
        for _ in range(100):
            await stub.Encode(ONE, timeout=30)
            await asyncio.sleep(0.01)
        assert it.servicer.started == 101


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("prior:50051", "dns:///prior:50051"),
        ("dns:///prior.ns.svc:50051", "dns:///prior.ns.svc:50051"),
        ("127.0.0.1:1, 127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("[::1]:1,[::1]:2", "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_targets_become_names_that_grpc_resolves(target, name):
    assert resolve(target) == name


@pytest.mark.parametrize(
    "target",
    ["", "prior", "a b:1", "x\n:1", "prior:", "prior:0", "prior:99999", "a:1,,b:2", "a:1,b", "127.0.0.1:1,[::1]:2"],
)
def test_what_is_no_target_is_refused_also_as_replicas(target):
    with pytest.raises(UsageError):
        resolve(target)
    if not target.startswith("127"):  # replicas are called one by one
        with pytest.raises(UsageError):
            Replicas(encoder_pb2_grpc.EncoderServiceStub, target, ChannelSettings(), SERVICE)


@asynccontextmanager
async def found(target, settings=None, began=lambda: None):
    replicas = Replicas(encoder_pb2_grpc.EncoderServiceStub, target, settings or ChannelSettings(), SERVICE, began)
    await replicas.find()
    try:
        yield replicas
    finally:
        await replicas.close()


async def test_each_replica_is_called_by_itself_and_reports_whether_it_serves():
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
    settings = ChannelSettings(tls=Tls(ca=authority.ca))
    async with running(ServerSettings(tls=Tls(cert, key))) as it:
        async with found(f"localhost:{it.port}", settings) as replicas:
            [each] = replicas
            answer = await each.stub.Encode(ONE, wait_for_ready=True, timeout=30)
            assert len(answer.encodings) == 1
        async with found(f"elsewhere.test:{it.port}", settings) as replicas:
            [each] = replicas
            assert (await failure(each.stub.Encode(ONE, timeout=10))).code() == StatusCode.UNAVAILABLE


@pytest.mark.parametrize("target", ["unix:/tmp/a", "unix:///tmp/a", "ipv4:127.0.0.1:1", "[::1]:5"])
async def test_what_needs_no_look_up_stands_for_itself(target):
    async with found(target) as replicas:
        assert [each.address for each in replicas] == [target.removeprefix("ipv4:")]
