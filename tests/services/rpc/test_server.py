"""A real server in process on a free port: what happens to a call at its edge, and how it starts and ends."""

import asyncio
import json
import logging
import os
import time

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from colaserve.v1 import encoder_pb2
from colaserve_services.errors import InvalidRequest, NotAuthenticated, Overloaded, UsageError
from colaserve_services.rpc import logs
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import LogSettings, ServerSettings, Tls
from colaserve_services.rpc.tls import channel_credentials, server_credentials
from colaserve_services.rpc.watched_files import WatchedFiles
from tests.services.rpc.conftest import ONE, encode, running, shown_certificate
from tests.services.servers import failure, refusal
from tests.waiting import PATIENCE, eventually

SERVICE = "colaserve.v1.EncoderService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(channel, service=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_is_per_service_and_turns_to_serving_after_the_warm_up():
    async with running(ready=False) as it:
        assert await health_of(it.channel) == NOT_SERVING
        assert await health_of(it.channel, SERVICE) == NOT_SERVING
        assert await health_of(it.channel, "liveness") == SERVING
        await it.server.serving()
        assert await health_of(it.channel) == SERVING
        assert await health_of(it.channel, SERVICE) == SERVING
        assert (await failure(health_of(it.channel, "colaserve.v1.PriorService"))).code() == StatusCode.NOT_FOUND


async def test_what_cannot_compute_is_neither_ready_nor_alive_until_it_can():
    async with running() as it:
        await it.server.failing(True)
        await it.server.serving()  # what lies behind it came: that does not help
        assert [await health_of(it.channel, name) for name in ("", SERVICE, "liveness")] == [NOT_SERVING] * 3
        await it.server.failing(False)
        assert [await health_of(it.channel, name) for name in ("", SERVICE, "liveness")] == [SERVING] * 3


async def test_reflection_lists_the_services():
    async with running() as it:
        stub = reflection_pb2_grpc.ServerReflectionStub(it.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_the_request_id_goes_through_and_an_unsafe_one_is_replaced():
    async with running() as it:
        for sent, kept in (("id-1", True), ("bad id with spaces", False)):
            call = it.stub.Encode(ONE, metadata=(("x-request-id", sent),))
            await call
            returned = dict(await call.trailing_metadata())["x-request-id"]
            assert (returned == sent) is kept
            assert returned


async def test_without_a_known_key_nothing_but_health_is_served(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-1  # first\n\n")
    async with running(keys=Keys.load(file, "secret-2")) as it:
        assert isinstance(await refusal(it.stub.Encode(ONE)), NotAuthenticated)
        for wrong in ("Bearer nope", "Basic secret-1", "Bearer ", "secret-1"):
            shown = it.stub.Encode(ONE, metadata=(("authorization", wrong),))
            assert isinstance(await refusal(shown), NotAuthenticated)
        for right in ("Bearer secret-1", "bearer secret-2"):
            assert await it.stub.Encode(ONE, metadata=(("authorization", right),))
        assert await health_of(it.channel) == SERVING
        assert it.servicer.started == 2


def test_keys_follow_their_file_and_one_that_cannot_be_read_or_holds_none_takes_none_away(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = Keys(["fixed"], file)
    file.write_text("not a key line\n")  # four words
    assert keys.identify("Bearer old")
    file.unlink()
    file.mkdir()
    assert keys.identify("Bearer old")
    file.rmdir()
    file.write_text("newer\n")
    assert keys.identify("Bearer newer")
    with pytest.raises(NotAuthenticated):
        keys.identify("Bearer old")
    renamed = tmp_path / "renamed"  # as long, and as old
    renamed.write_text("third\n")
    os.utime(renamed, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    renamed.rename(file)
    assert keys.identify("Bearer third")
    file.write_text("# none\n")
    for key in ("third", "fixed"):
        assert keys.identify(f"Bearer {key}")
    assert caplog.text.count(f"{file} holds no key") == 1, "said once, however often it is looked at"


def test_watched_files_are_read_once_for_each_change_and_later_where_that_failed(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    watched = WatchedFiles(file)

    def fail():
        raise UsageError("no right to read it")

    assert watched.read_again(file.read_text) is None
    file.write_text("newer")
    assert watched.read_again(fail) is None
    assert [watched.read_again(file.read_text) for _ in range(2)] == ["newer", None]


def test_a_key_is_named_by_its_line_or_by_its_hash_and_may_hold_the_sign_of_comments(tmp_path):
    text = "\ufeff# ours\nalice  s3cr#t-key # hers\t\r\nbob\tsecond\r\n  # none\nunnamed\n"
    (tmp_path / "keys").write_bytes(text.encode())
    keys = Keys.load(tmp_path / "keys", "third")
    assert [keys.identify(f"Bearer {key}") for key in ("s3cr#t-key", "second", "third")] == ["alice", "bob", "role"]
    assert keys.identify("Bearer unnamed").startswith("key-")
    assert "unnamed" not in keys.identify("Bearer unnamed")
    with pytest.raises(NotAuthenticated):
        keys.identify("Bearer s3cr")


@pytest.mark.parametrize("key", ["schlüssel", "a\u2028b", "a\rb", "a\x00b", "alice\u00a0secret", "a\x7f"])
def test_a_key_that_http_cannot_carry_is_refused_by_line_and_not_shown(tmp_path, key):
    (tmp_path / "keys").write_bytes(f"good\nalice {key}\n".encode())
    with pytest.raises(UsageError, match=r"keys: line 2 has (characters that HTTP cannot carry|3 words)") as refused:
        Keys.load(tmp_path / "keys")
    assert key not in str(refused.value)


def test_a_key_file_without_a_key_is_refused(tmp_path):
    (tmp_path / "keys").write_text("a b c\n")
    with pytest.raises(UsageError, match="line 1 has 3 words"):
        Keys.load(tmp_path / "keys")
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UsageError, match="holds no key"):
        Keys.load(tmp_path / "keys")
    with pytest.raises(UsageError, match="cannot read"):
        Keys.load(tmp_path / "absent")


async def test_one_call_too_many_is_refused_at_once_while_health_and_running_calls_continue():
    async with running(ServerSettings(max_calls=2)) as it:
        it.servicer.gate.clear()
        calls = [asyncio.ensure_future(it.stub.Encode(ONE)) for _ in range(2)]
        await eventually(lambda: it.servicer.started == 2)
        started = time.monotonic()
        error = await refusal(it.stub.Encode(ONE))
        assert isinstance(error, Overloaded)
        assert error.retry_after > 0
        assert time.monotonic() - started < 10
        assert await health_of(it.channel) == SERVING
        assert await it.stub.GetInfo(encoder_pb2.EncoderServiceGetInfoRequest())
        it.servicer.gate.set()
        await asyncio.gather(*calls)
        assert await it.stub.Encode(ONE)
        counted = [s for f in it.metrics.refused.collect() for s in f.samples if s.name.endswith("_total")]
        assert [(s.labels["stage"], s.value) for s in counted] == [("encoder", 1.0)]


async def test_bytes_that_are_no_message_do_no_harm():
    async with running() as it:
        raw = it.channel.unary_unary(f"/{SERVICE}/Encode")
        for junk in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f"):
            error = await refusal(raw(junk))
            assert (type(error), error.field) == (InvalidRequest, "request")
        assert (await failure(it.channel.unary_unary(f"/{SERVICE}/Nothing")(b""))).code() == StatusCode.UNIMPLEMENTED
        assert await it.stub.Encode(ONE)


async def test_a_taken_port_is_one_clear_error():
    async with running() as it:
        second = RpcServer(ServerSettings(port=it.port), Metrics())
        with pytest.raises(UsageError, match=f"127.0.0.1:{it.port}"):
            await second.start()


async def test_a_drain_turns_health_and_lets_running_calls_end():
    async with running(ServerSettings(drain_seconds=2)) as it:
        it.servicer.gate.clear()
        call = asyncio.ensure_future(it.stub.Encode(ONE))
        await eventually(lambda: it.servicer.started == 1)
        drain = asyncio.ensure_future(it.server.drain())
        while await health_of(it.channel) != NOT_SERVING:  # noqa: ASYNC110 - each look is a call
            await asyncio.sleep(0.01)
        while not await refuses_connections(it.port):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        assert not drain.done()
        it.servicer.gate.set()
        assert await call
        await asyncio.wait_for(drain, PATIENCE)


async def refuses_connections(port: int) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as late:
        try:
            await health_of(late)
        except grpc.aio.AioRpcError as error:
            return error.code() is StatusCode.UNAVAILABLE
    return False


async def test_a_drain_cuts_calls_that_outlive_the_grace():
    async with running(ServerSettings(drain_seconds=0, grace_seconds=0.2)) as it:
        it.servicer.gate.clear()
        call = asyncio.ensure_future(it.stub.Encode(ONE))
        await eventually(lambda: it.servicer.started == 1)
        await asyncio.wait_for(it.server.drain(), 5)
        assert (await failure(call)).code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)


def test_a_callers_words_cannot_forge_a_line_of_text_nor_command_the_terminal():
    record = logging.makeLogRecord({"msg": "request", "fields": {"user": "me\n12:00:00 info root\x1b[2J\u2028Zoë"}})
    assert logs.TextFormatter().format(record).endswith(r" user=me\n12:00:00 info root\x1b[2J\u2028Zoë")


async def test_calls_are_counted_timed_and_logged_without_their_content(capsys):
    stream = __import__("io").StringIO()
    previous = logging.getLogger().handlers[:]
    logs.configure(LogSettings(format="json"), "encoder", stream)
    try:
        async with running() as it:
            await it.stub.Encode(ONE, metadata=(("x-request-id", "seen"),))
            await refusal(it.stub.Encode(encoder_pb2.EncodeRequest()))
    finally:
        logging.getLogger().handlers[:] = previous
    value = it.metrics.registry.get_sample_value
    labels = {"service": "EncoderService", "method": "Encode"}
    assert value("colaserve_request_seconds_count", labels | {"code": "OK"}) == 1
    assert value("colaserve_request_seconds_count", labels | {"code": "INVALID_ARGUMENT"}) == 1
    assert value("colaserve_requests_in_progress", labels) == 0
    assert value("colaserve_transfer_bytes_total", {"direction": "in", "service": "EncoderService"}) == ONE.ByteSize()
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["request_id"], first["code"], first["method"]) == ("seen", "OK", "Encode")
    assert first["role"] == "encoder"
    assert second["code"] == "INVALID_ARGUMENT"


def secure(it_port, tls):
    return grpc.aio.secure_channel(f"127.0.0.1:{it_port}", channel_credentials(tls))


async def test_a_renewed_certificate_is_used_without_a_restart_and_a_broken_one_is_not(authority):
    cert, key = authority.issue("server", "first")
    async with running(ServerSettings(tls=Tls(cert, key))) as it:
        assert await shown_certificate(it.port, authority.ca) == "first"
        authority.issue("server", "second")
        assert await shown_certificate(it.port, authority.ca) == "second"
        cert.unlink()
        assert await shown_certificate(it.port, authority.ca) == "second"
        cert.write_bytes(authority.issue("other", "third")[0].read_bytes())  # without its key
        assert await shown_certificate(it.port, authority.ca) == "second"
        key.write_bytes((authority.folder / "other.key").read_bytes())
        assert await shown_certificate(it.port, authority.ca) == "third"
        async with secure(it.port, Tls(ca=authority.ca)) as channel:
            assert await encode(channel, wait_for_ready=False)


async def test_mutual_tls_refuses_clients_without_a_certificate_of_the_authority(authority):
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client", "client")
    settings = ServerSettings(tls=Tls(cert, key, ca=authority.ca))
    async with running(settings) as it:
        async with secure(it.port, Tls(mine, my_key, authority.ca)) as channel:
            assert await encode(channel, wait_for_ready=False)
        async with secure(it.port, Tls(ca=authority.ca)) as channel:
            await failure(encode(channel, wait_for_ready=False))
        await failure(it.stub.Encode(ONE, timeout=2))  # plain text


def test_certificates_that_do_not_fit_their_keys_are_one_clear_error(authority):
    cert, _ = authority.issue("one")
    _, key = authority.issue("other")
    with pytest.raises(UsageError, match=r"one\.pem, .*other\.key.*mismatch"):
        channel_credentials(Tls(cert, key, authority.ca))
    with pytest.raises(UsageError, match=r"one\.pem, .*other\.key.*mismatch"):
        server_credentials(Tls(cert, key))
    with pytest.raises(UsageError, match=r"other\.key"):
        channel_credentials(Tls(ca=key))  # holds no certificate


def test_a_missing_certificate_is_one_clear_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        channel_credentials(Tls(ca=tmp_path / "absent"))
    with pytest.raises(UsageError, match="both"):
        channel_credentials(Tls(cert=tmp_path / "cert"))
