"""The HTTP server itself: sockets, TLS, going down; and what is said and answered while the coordinator and its stages
come and go."""

import asyncio
import errno
import gc
import json
import logging
import socket
import ssl
import time

import httpx
import pytest

from colaserve_services.errors import Unavailable, UsageError
from colaserve_services.gateway.app import create_app
from colaserve_services.gateway.server import serve
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.rpc import network
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.settings import Tls
from tests.services.gateway.fake_generation import SAYS, FakeGeneration
from tests.services.gateway.running_gateway import Running, running
from tests.services.rpc.conftest import make_authority, shown_certificate
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


async def test_a_certificate_is_read_again_when_its_files_change_and_are_a_pair(start, authority, caplog):
    caplog.set_level(logging.INFO)
    cert, key = authority.issue("server", "first")
    gateway = await start(tls=Tls(cert, key))
    new, new_key = authority.issue("other", "second")
    cert.write_bytes(new.read_bytes())
    await eventually(lambda: "stays in use" in caplog.text)
    assert await shown_certificate(gateway.server.port, authority.ca) == "first"
    key.write_bytes(new_key.read_bytes())
    await eventually(lambda: "read again" in caplog.text)
    for host in ("localhost", "127.0.0.1"):  # the latter names no server
        assert await shown_certificate(gateway.server.port, authority.ca, host) == "second"


async def test_only_clients_of_the_authority_are_served_and_none_once_it_is_replaced(start, authority, caplog):
    caplog.set_level(logging.INFO)
    cert, key = authority.issue("server")
    trusted = authority.folder / "trusted.pem"
    trusted.write_bytes(authority.ca.read_bytes())
    gateway = await start(tls=Tls(cert, key, ca=trusted))
    context = ssl.create_default_context(cafile=str(authority.ca))

    async def ask() -> str:
        async with httpx.AsyncClient(verify=context, base_url=f"https://localhost:{gateway.server.port}") as http:
            answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 200})
            return str(answer.json()["choices"][0]["text"])

    with pytest.raises(httpx.HTTPError):
        await ask()
    context.load_cert_chain(*authority.issue("client"))
    assert await ask() == SAYS
    trusted.write_bytes(make_authority(authority.folder / "other").ca.read_bytes())
    await eventually(lambda: "read again" in caplog.text)
    with pytest.raises(httpx.HTTPError):
        await ask()


async def test_requests_that_come_together_ask_once_what_the_coordinator_is(gateway: Running):
    gateway.fake.info_gate = asyncio.Event()
    asking = [asyncio.create_task(gateway.http.get("/v1/models")) for _ in range(5)]
    await eventually(lambda: gateway.counted("requests_in_progress", method="http") == 5)
    gateway.fake.info_gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 5
    assert gateway.fake.infos == 1


async def test_what_the_coordinator_is_is_kept_while_it_is_away(start, caplog):
    gateway = await start(GatewaySettings(info_seconds=0))
    assert (await gateway.http.get("/v1/models")).status_code == 200
    gateway.fake.info_failure = Unavailable("away")
    for _ in range(3):
        assert (await gateway.http.get("/v1/models")).status_code == 200
    await eventually(lambda: gateway.fake.infos > 1 and gateway.fake.asking == 0)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_while_a_new_answer_is_asked_for_requests_get_the_old_one(start):
    gateway = await start(GatewaySettings(info_seconds=0))

    async def served() -> str:
        return (await gateway.http.get("/v1/models")).json()["data"][0]["id"]

    assert await served() == "fake/cola"
    gateway.fake.info_gate = asyncio.Event()
    gateway.fake.model_name = "new"
    assert await served() == await served() == "fake/cola"
    assert (gateway.fake.infos, gateway.fake.asking) == (2, 1)
    gateway.fake.info_gate.set()
    await eventually(lambda: gateway.fake.asking == 0)
    assert await served() == "new"


async def test_probes_of_one_second_share_a_look_and_bring_a_new_answer(gateway: Running):
    assert (await gateway.http.get("/ready")).status_code == 200
    assert (await gateway.http.get("/v1/models")).status_code == 200
    assert gateway.fake.infos == 1
    for _ in range(20):
        assert (await gateway.http.get("/ready")).status_code == 200
    assert gateway.fake.infos <= 3  # on a machine that needs seconds for them; 20 without


async def test_without_a_coordinator_requests_get_503(gateway: Running):
    gateway.fake.info_failure = Unavailable("away")
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert (await gateway.http.get("/health")).status_code == 200
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "not ready", "reason": "away"})


@pytest.mark.parametrize("met", [True, False])
async def test_while_no_coordinator_can_be_reached_requests_wait(fake: FakeGeneration, met: bool):
    """As long as `reach` does, whether or not the coordinator was met before; the answer is what the call gives."""
    reached = asyncio.Event()
    reached.set()
    async with running(fake, reach=reached.wait) as gateway:
        if met:
            await gateway.http.get("/v1/models")
        reached.clear()
        waiting = [asyncio.create_task(call) for call in (gateway.chat(), gateway.complete(stream=True))]
        done, _ = await asyncio.wait(waiting, timeout=0.2)
        assert not done
        assert not fake.seen
        reached.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


async def test_a_stage_that_is_away_makes_the_gateway_not_ready_also_to_who_asks_for_the_head_alone(start):
    gateway = await start(GatewaySettings(ready_seconds=0))
    assert (await gateway.http.get("/ready")).json() == {"status": "ok"}
    gateway.fake.serving = False
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "prior is not serving")
    for path, status in (("/health", 200), ("/ready", 503)):
        response = await gateway.http.head(path)
        assert (response.status_code, response.content) == (status, b"")


async def test_readiness_is_asked_again_where_one_coordinator_is_silent(gateway: Running):
    gateway.fake.info_gate = asyncio.Event()
    asking = asyncio.create_task(gateway.http.get("/ready"))
    await eventually(lambda: gateway.fake.infos == 2)
    gateway.fake.info_gate.set()
    assert (await asking).status_code == 200
