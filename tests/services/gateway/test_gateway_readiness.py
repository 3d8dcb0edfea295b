"""The coordinator and its stages come and go: what the gateway says of itself, and what requests get meanwhile."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from colaserve_services.errors import Unavailable
from colaserve_services.gateway.settings import GatewaySettings
from tests.services.gateway.running_gateway import Running


async def test_what_the_coordinator_is_is_asked_once_and_kept_while_it_is_away(start):
    gateway = await start(GatewaySettings(info_seconds=0.01))
    await asyncio.gather(*(gateway.http.get("/v1/models") for _ in range(5)))
    assert gateway.fake.infos < 5
    gateway.fake.info_failure = Unavailable("away")
    await asyncio.sleep(0.02)
    assert (await gateway.http.get("/v1/models")).status_code == 200


async def test_without_a_coordinator_requests_get_503(gateway: Running):
    gateway.fake.info_failure = Unavailable("away")
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert (await gateway.http.get("/health")).status_code == 200
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "not ready", "reason": "away"})


@pytest.mark.parametrize("met", [True, False])
async def test_while_no_coordinator_can_be_reached_requests_wait(gateway: Running, met: bool):
    """As long as `reach` does, whether or not the coordinator was met before; the answer is what the call gives."""
    backend, reached = gateway.server._gateway.backend, asyncio.Event()
    backend._reach = reached.wait
    if not met:
        backend._info = None
    waiting = [asyncio.create_task(call) for call in (gateway.chat(), gateway.complete(stream=True))]
    done, _ = await asyncio.wait(waiting, timeout=0.2)
    assert not done
    assert not gateway.fake.seen
    reached.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


async def test_a_stage_that_is_away_makes_the_gateway_not_ready(gateway: Running):
    assert (await gateway.http.get("/ready")).json() == {"status": "ok"}
    gateway.fake.serving = False
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "prior is not serving")
    assert isinstance(ready, httpx.Response)


async def test_a_probe_may_ask_for_the_head_alone(gateway: Running):
    gateway.fake.serving = False
    for path, status in (("/health", 200), ("/ready", 503)):
        response = await gateway.http.head(path)
        assert (response.status_code, response.content) == (status, b"")
