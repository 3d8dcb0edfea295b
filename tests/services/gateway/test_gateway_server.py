"""The HTTP server itself: sockets, TLS, going down."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from colaserve_services.errors import UsageError
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.server import serve
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.rpc import network
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.settings import ServerTls
from tests.services.gateway.fake_generation import SAYS, FakeGeneration
from tests.services.gateway.running_gateway import Running
from tests.waiting import PATIENCE, eventually


def test_connections_are_served_without_nagles_delay():
    with network.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_where_it_cannot_listen_is_a_usage_error(gateway: Running):
    for host, port in (("127.0.0.1", gateway.server.port), ("no-such-host.invalid", 0)):
        with pytest.raises(UsageError, match=f"{host}:{port}"):
            await serve(create_app(LocalStub(FakeGeneration()), GatewaySettings()), host, port)


async def test_ipv6_is_served():
    server = await serve(create_app(LocalStub(FakeGeneration()), GatewaySettings()), "::1", 0)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://[::1]:{server.port}/health")).status_code == 200
    await server.stop()


async def test_a_server_that_stops_is_first_not_ready_and_its_streams_end_well(gateway: Running):
    gateway.fake.gate = asyncio.Event()
    running = asyncio.create_task(gateway.complete(stream=True, max_tokens=200))
    await eventually(lambda: gateway.fake.running == 1)
    stopping = asyncio.create_task(gateway.server.stop(grace=60, notice=2))
    await asyncio.sleep(0)
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "going down")
    assert ready.headers["connection"] == "close"  # the next request of this client finds another gateway
    assert (await gateway.http.get("/health")).status_code == 200  # still taken while it is only said
    await eventually(lambda: refuses_connections(gateway))
    gateway.fake.gate.set()
    assert "[DONE]" in (await running).text
    await asyncio.wait_for(stopping, PATIENCE)


def refuses_connections(gateway: Running) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", gateway.server.port)) == errno.ECONNREFUSED


async def test_what_outlives_the_grace_is_cancelled(gateway: Running):
    gateway.fake.gate = asyncio.Event()
    running = asyncio.create_task(gateway.complete(max_tokens=200))
    await eventually(lambda: gateway.fake.running == 1)
    started = time.monotonic()
    await gateway.server.stop(grace=0.2)
    assert time.monotonic() - started < 15
    assert gateway.fake.seen[0].cancelled
    response = await running
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


async def test_a_stream_that_outlives_the_grace_ends_with_an_error(gateway: Running):
    gateway.fake.says = "ever and " * 10_000
    async with gateway.http.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 90_000}
    ) as response:
        lines = response.aiter_lines()
        await anext(lines)
        gateway.fake.gate = asyncio.Event()
        await gateway.server.stop(grace=0.1)
        rest = [line async for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"


def test_impossible_bounds_are_refused_at_start():
    for name in vars(Bounds()):
        with pytest.raises(UsageError, match=name):
            Bounds(**{name: 0})


def certificate(folder: Path, name: str) -> ServerTls:
    """A self-signed certificate with this common name, in fixed files."""
    tls = ServerTls(folder / "cert.pem", folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(tls.key), "-out", str(tls.cert), "-subj", f"/CN={name}",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return tls


async def subject(port: int, ca: Path, host: str = "localhost") -> str:
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = host == "localhost"
    _, writer = await asyncio.open_connection(host, port, ssl=context, family=socket.AF_INET)
    shown = writer.get_extra_info("ssl_object").getpeercert()["subject"]
    writer.close()
    return str(shown[0][0][1])


@pytest.fixture
def renewals(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of the renewals of certificates."""
    caplog.set_level(logging.INFO)
    return caplog


async def test_a_certificate_is_read_again_when_its_files_change_and_are_a_pair(start, tmp_path: Path, renewals):
    gateway = await start(tls=certificate(tmp_path, "first"))
    old = tmp_path / "old.pem"
    old.write_bytes((tmp_path / "cert.pem").read_bytes())
    (tmp_path / "other").mkdir()
    new = certificate(tmp_path / "other", "second")
    (tmp_path / "cert.pem").write_bytes(new.cert.read_bytes())
    await eventually(lambda: "stays in use" in renewals.text)
    assert await subject(gateway.server.port, old) == "first"
    (tmp_path / "key.pem").write_bytes(new.key.read_bytes())
    await eventually(lambda: "read again" in renewals.text)
    for host in ("localhost", "127.0.0.1"):  # the latter names no server
        assert await subject(gateway.server.port, tmp_path / "cert.pem", host) == "second"


async def test_clients_of_an_authority_that_was_replaced_are_refused(start, tmp_path: Path, renewals):
    tls = certificate(tmp_path, "mutual")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(tls.cert.read_bytes())
    gateway = await start(tls=ServerTls(tls.cert, tls.key, client_ca=ca))
    context = ssl.create_default_context(cafile=str(tls.cert))
    context.load_cert_chain(tls.cert, tls.key)
    url = f"https://localhost:{gateway.server.port}/health"
    async with httpx.AsyncClient(verify=context) as http:
        assert (await http.get(url)).status_code == 200
    (tmp_path / "other").mkdir()
    ca.write_bytes(certificate(tmp_path / "other", "mutual").cert.read_bytes())
    await eventually(lambda: "read again" in renewals.text)
    async with httpx.AsyncClient(verify=context) as http:
        with pytest.raises(httpx.HTTPError):
            await http.get(url)


async def test_a_client_without_a_certificate_is_refused_where_one_is_asked_for(start, tmp_path: Path):
    tls = certificate(tmp_path, "mutual")
    gateway = await start(tls=ServerTls(tls.cert, tls.key, tls.cert))
    context = ssl.create_default_context(cafile=str(tls.cert))
    url = f"https://localhost:{gateway.server.port}"
    async with httpx.AsyncClient(verify=context) as http:
        with pytest.raises(httpx.HTTPError):
            await http.get(url + "/health")
    context.load_cert_chain(tls.cert, tls.key)
    async with httpx.AsyncClient(verify=context) as http:
        answer = await http.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 200})
        assert answer.json()["choices"][0]["text"] == SAYS


async def test_a_missing_certificate_is_a_usage_error(tmp_path: Path):
    app = create_app(LocalStub(FakeGeneration()), GatewaySettings())
    with pytest.raises(UsageError, match=r"none\.pem"):
        await serve(app, "127.0.0.1", 0, ServerTls(tmp_path / "none.pem", tmp_path / "none.key"))
