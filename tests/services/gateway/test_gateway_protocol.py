"""HTTP itself: what is malformed, what does not come, what a client that left by half gets."""

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from colaserve_services.gateway.protocol import LONGEST_HEAD
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import Running
from tests.waiting import PATIENCE, eventually

BODY = b'{"prompt": "x", "max_tokens": 200}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
ASKING = POST % (len(BODY), BODY)


async def said(gateway: Running, *pieces: bytes, end: bool = False) -> bytes:
    """All that is answered until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    for piece in pieces:
        writer.write(piece)
    if end:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()


@pytest.fixture
async def hurried(start) -> Running:
    return await start(GatewaySettings(bounds=Bounds(head_seconds=0.2)))


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "invalid_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),  # TLS, to a port without it
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501, "not_implemented"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * LONGEST_HEAD, 431, "head_too_large"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_http"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_malformed_http_is_answered_in_the_documented_shape(gateway, request_bytes, status, code):
    head, _, body = (await said(gateway, request_bytes)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id: " in head.lower()
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, None)
    assert "bytearray" not in error["message"]
    assert (await gateway.http.get("/health")).status_code == 200


async def test_a_body_that_turns_malformed_after_the_answer_began_ends_the_connection_quietly(gateway: Running, caplog):
    head = b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(head)
    assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE)
    writer.write(b"zz\r\n")
    assert b'"ok"' in await asyncio.wait_for(reader.read(), PATIENCE)
    assert "Traceback" not in caplog.text


async def test_a_head_that_does_not_come_is_not_waited_for(hurried: Running):
    assert await said(hurried) == b""
    for pieces in ((b"GET /health HTT",), (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /hea")):
        *_, answer = (await said(hurried, *pieces)).split(b"HTTP/1.1 ")
        assert answer.startswith(b"408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_timeout"


async def test_a_body_that_nobody_asked_for_holds_its_connection_no_longer(hurried: Running):
    answer = await said(hurried, b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_answers_and_idle_connections_may_take_longer_than_a_head(hurried: Running):
    hurried.fake.gate = asyncio.Event()
    asking = asyncio.create_task(hurried.complete(max_tokens=200))
    await eventually(lambda: hurried.fake.running == 1)
    assert await said(hurried) == b""  # a silent connection, which a head's time ends
    hurried.fake.gate.set()
    assert (await asking).json()["choices"][0]["text"] == SAYS
    assert hurried.server.connections == 1
    assert await said(hurried) == b""  # a silent connection, which a head's time ends
    assert (await hurried.http.get("/health")).status_code == 200
    assert hurried.server.connections == 1


async def test_a_client_that_shuts_down_its_sending_side_gets_its_answer(gateway: Running):
    gateway.fake.gate = asyncio.Event()
    asking = asyncio.create_task(said(gateway, ASKING, end=True))
    await eventually(lambda: gateway.fake.running == 1)
    await asyncio.sleep(0.2)
    gateway.fake.gate.set()
    answer = await asking
    assert b"HTTP/1.1 200 " in answer
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["choices"][0]["text"] == SAYS


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])  # nginx speaks 1.0 to what is behind it
async def test_a_client_that_has_left_is_distinguished_from_one_that_listens(gateway: Running, version: bytes):
    gateway.fake.gate = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(ASKING.replace(b"1.1", version))
    await eventually(lambda: gateway.fake.running == 1)
    writer.close()
    await eventually(lambda: gateway.fake.running == 0)
    assert gateway.fake.seen[0].cancelled


class AfterFirst:
    """Lets one block through, and the others once it is opened."""

    def __init__(self) -> None:
        self.first, self.opened = True, asyncio.Event()

    async def wait(self) -> None:
        if not self.first:
            await self.opened.wait()
        self.first = False


@pytest.mark.parametrize("leaves", [True, False])
async def test_so_it_is_in_a_stream_that_has_begun_and_says_nothing(gateway: Running, leaves: bool):
    gateway.fake.gate = gate = AfterFirst()
    body = BODY[:-1] + b', "stream": true}'
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(POST % (len(body), body))
    await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
    if leaves:
        writer.close()
        await eventually(lambda: gateway.fake.running == 0)
        assert gateway.fake.seen[0].cancelled
    else:
        writer.write_eof()
        assert b":\n\n" in await asyncio.wait_for(reader.readuntil(b"\r\n:\n\n"), PATIENCE)
        gate.opened.set()
        assert b"data: [DONE]" in await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()


async def test_a_request_cut_off_in_its_body_gets_nothing(gateway: Running):
    assert await said(gateway, POST % (1000, b"{"), end=True) == b""
    assert not gateway.fake.seen


async def test_forwarded_addresses_are_not_believed(gateway: Running, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    pretending = {"x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "https", "forwarded": "for=192.0.2.1"}
    await gateway.http.post("/v1/completions", json={"prompt": "x"}, headers=pretending)
    assert {record.fields["client"] for record in caplog.records if hasattr(record, "fields")} == {"127.0.0.1"}


async def test_answers_name_no_software_and_upgrades_are_not_taken(gateway: Running):
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eA==",
    }
    for headers in ({}, upgrade, {"host": "made.up"}):
        answer = await gateway.http.get("/health", headers=headers)
        assert answer.status_code == 200
        assert "server" not in answer.headers
        assert "made.up" not in f"{answer.headers}"


async def test_a_connection_too_many_is_cut_off_and_the_others_are_served(start):
    gateway = await start(GatewaySettings(bounds=Bounds(connections=2)))
    assert (await gateway.http.get("/health")).status_code == 200
    _, silent = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    await eventually(lambda: gateway.server.connections == 2)
    with suppress(ConnectionResetError):
        assert await said(gateway, ASKING) == b""
    assert (await gateway.http.get("/health")).status_code == 200
    silent.close()
    await eventually(lambda: gateway.server.connections == 1)
    assert b" 200 " in await said(gateway, ASKING, end=True)


@contextmanager
def unread(gateway: Running, request: bytes) -> Iterator[socket.socket]:
    """A client that has asked and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", gateway.server.port))
        client.sendall(request)
        yield client


LONG = b'{"prompt": "x", "max_tokens": 900000, "stream": true}'
HASTY = GatewaySettings(bounds=Bounds(unread_seconds=0.1, last_word_seconds=0.1, answer_seconds=0.3))


def all_of(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


async def test_a_client_that_reads_nothing_loses_its_connection_with_its_stream(start):
    gateway = await start(HASTY)
    gateway.fake.says, gateway.fake.waiting = "ever and " * 100_000, 1
    gateway.fake.model_name = "long" * 2500  # so are the events, which bear it
    with unread(gateway, POST % (len(LONG), LONG)) as client:
        await eventually(lambda: gateway.fake.running == 1)
        await eventually(lambda: gateway.fake.running == 0 and gateway.server.connections == 0)
        with pytest.raises(ConnectionResetError):
            all_of(client)


async def test_a_client_that_reads_no_whole_answer_loses_its_connection(start):
    gateway = await start(HASTY)
    for last in (b"", b"connection: close\r\n"):
        request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n"
        with unread(gateway, (request + b"\r\n") * 200 + request + last + b"\r\n"):
            await eventually(lambda: gateway.server.connections == 1)
            await eventually(lambda: gateway.server.connections == 0)
    assert (await gateway.http.get("/health")).status_code == 200


async def test_a_closed_connection_that_is_read_on_gets_all_of_its_answers(start):
    gateway = await start(HASTY)
    request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n"
    with unread(gateway, (request + b"\r\n") * 20 + request + b"connection: close\r\n\r\n") as client:
        said = await asyncio.to_thread(all_of, client)
    assert said.count(b"HTTP/1.1 200 ") == 21
    assert said.endswith(b"}")
