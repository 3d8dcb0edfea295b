"""The coordinator and its stages come and go: what the gateway says of itself, and what requests get meanwhile."""

import asyncio
import gc

import httpx
import pytest

from colaserve_services.errors import Unavailable
from colaserve_services.gateway.settings import GatewaySettings
from tests.services.gateway.fake_generation import FakeGeneration
from tests.services.gateway.running_gateway import Running, running
from tests.waiting import eventually


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


async def test_a_probe_of_readiness_brings_a_new_answer(gateway: Running):
    assert (await gateway.http.get("/ready")).status_code == 200
    assert (await gateway.http.get("/v1/models")).status_code == 200
    assert gateway.fake.infos == 1


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


async def test_a_stage_that_is_away_makes_the_gateway_not_ready(start):
    gateway = await start(GatewaySettings(ready_seconds=0))
    assert (await gateway.http.get("/ready")).json() == {"status": "ok"}
    gateway.fake.serving = False
    ready = await gateway.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "prior is not serving")
    assert isinstance(ready, httpx.Response)


async def test_probes_of_one_second_share_a_look(gateway: Running):
    for _ in range(20):
        assert (await gateway.http.get("/ready")).status_code == 200
    assert gateway.fake.infos <= 3  # on a machine that needs seconds for them; 20 without


async def test_readiness_is_asked_again_where_one_coordinator_is_silent(gateway: Running):
    gateway.fake.info_gate = asyncio.Event()
    asking = asyncio.create_task(gateway.http.get("/ready"))
    await eventually(lambda: gateway.fake.infos == 2)
    gateway.fake.info_gate.set()
    assert (await asking).status_code == 200


async def test_a_probe_may_ask_for_the_head_alone(gateway: Running):
    gateway.fake.serving = False
    for path, status in (("/health", 200), ("/ready", 503)):
        response = await gateway.http.head(path)
        assert (response.status_code, response.content) == (status, b"")
