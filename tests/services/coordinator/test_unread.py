"""A stream that nobody reads gives its slot to those that wait; one that nobody waits for keeps it. One that is read
keeps it for a while, the shorter the smaller it is."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import pytest

from colaserve.v1 import generation_pb2, generation_pb2_grpc, latent_service_pb2, latent_service_pb2_grpc
from colaserve_services.coordinator import Call, CoordinatorLimits
from colaserve_services.coordinator.admission import Admission, Ticket
from colaserve_services.coordinator.read_ahead import ReadAhead
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.errors import Cancelled, Unavailable
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.metrics import Metrics
from tests.services.coordinator.conftest import counted
from tests.services.servers import UNREAD, refusal, served
from tests.waiting import PATIENCE, eventually

LONG = generation_pb2.GenerateRequest(prompt="he looked", max_new_tokens=200, ignore_end=True)
SHORT = generation_pb2.GenerateRequest(prompt="he looked", max_new_tokens=4, ignore_end=True)
BRANCH = latent_service_pb2.ForkRequest(text="he looked", branches=[{}], max_new_tokens=200, ignore_end=True)
BLOCKS = latent_service_pb2.SampleLatentsRequest(max_blocks=40)


def streams(world: Any) -> dict[str, Callable[[], Any]]:
    generation = LocalStub(GenerationServicer(world.coordinator))
    latents = LocalStub(LatentServicer(world.coordinator))
    return {
        "Generate": lambda: generation.Generate(LONG),
        "SampleLatents": lambda: latents.SampleLatents(BLOCKS),
        "Fork": lambda: latents.Fork(BRANCH),
    }


async def drained(call: Any) -> int:
    count = 0
    while await call.read() is not grpc.aio.EOF:
        count += 1
    return count


@pytest.mark.parametrize("method", ["Generate", "SampleLatents"])
async def test_a_stream_that_nobody_reads_ends_while_others_wait(make_world, method: str):
    world = await make_world(max_running=1, idle_seconds=0.1)
    call = streams(world)[method]()
    await eventually(lambda: world.coordinator.services.admission.running == 1)
    answer = await asyncio.wait_for(world.generate(prompt="he", max_new_tokens=4), 10)
    assert answer[-1].finish_reason
    refused = await refusal(drained(call))
    assert (type(refused), str(refused)) == (Unavailable, "not read for 0.1 s while others waited")
    assert world.counted("refused_total") == {("coordinator", "idle"): 1}
    await eventually(lambda: world.prior.running == world.decoder.running == 0)


@pytest.mark.parametrize("method", ["Generate", "Fork"])
async def test_a_stream_that_nobody_reads_gives_way_though_its_blocks_come_slowly(make_world, method: str):
    world = await make_world(max_running=1, idle_seconds=60)
    world.prior.turns = asyncio.Semaphore(0)
    call = streams(world)[method]()
    await eventually(lambda: world.prior.running == 1)
    waiting = asyncio.create_task(world.generate(prompt="he", max_new_tokens=4))
    async with asyncio.timeout(10):
        while not waiting.done():
            world.prior.turns.release()
            await asyncio.wait([waiting], timeout=0.3)  # longer than between two looks whether the stream is read
    assert waiting.result()[-1].finish_reason
    call.cancel()
    await eventually(lambda: world.prior.running == world.decoder.running == 0)


async def test_a_stream_that_nobody_waits_for_keeps_its_slot(make_world):
    world = await make_world(max_running=1, idle_seconds=0.05)
    call = streams(world)["Generate"]()
    await eventually(lambda: world.coordinator.services.admission.running == 1)
    await asyncio.sleep(0.3)
    assert await drained(call) == 51
    assert world.counted("refused_total") == {}


async def test_a_stream_that_is_read_now_and_then_continues_while_others_wait(make_world):
    world = await make_world(max_running=1, idle_seconds=0.2)
    call = LocalStub(GenerationServicer(world.coordinator)).Generate(LONG)
    assert await call.read() is not grpc.aio.EOF
    waiting = asyncio.create_task(world.generate(prompt="he", max_new_tokens=4))
    for _ in range(8):
        await asyncio.sleep(0.05)
        assert await call.read() is not grpc.aio.EOF
    assert not waiting.done()
    await drained(call)
    assert await waiting


async def test_over_the_wire_the_call_ends_and_nothing_is_kept_for_it(make_world):
    world = await make_world(max_running=1, idle_seconds=0.1, max_context=65_536)
    for fake in (world.encoder, world.prior, world.decoder):
        fake.max_context = 65_536
    await world.coordinator.look()
    servicers = GenerationServicer(world.coordinator), LatentServicer(world.coordinator)
    async with served(*servicers, options=UNREAD) as it:
        request = latent_service_pb2.SampleLatentsRequest(max_blocks=16_000)
        call = latent_service_pb2_grpc.LatentServiceStub(it.channel).SampleLatents(request)
        await eventually(lambda: world.coordinator.services.admission.running == 1)
        stub = generation_pb2_grpc.GenerationServiceStub(it.channel)
        assert [response async for response in stub.Generate(SHORT, timeout=20)]
        await eventually(lambda: counted(it.metrics, "requests_in_progress") == {})
        refused = await refusal(drained(call))
        assert isinstance(refused, Unavailable)
        assert "not read for" in str(refused)
        assert counted(it.metrics, "request_seconds_count")["LatentService", "SampleLatents", "UNAVAILABLE"] == 1


@pytest.mark.parametrize("read", [False, True])
async def test_a_run_gives_way_after_its_block_only_if_nobody_reads_by_then(make_world, read: bool):
    world, call, reading = await make_world(), Call(), asyncio.get_running_loop().create_future()
    world.prior.turns = asyncio.Semaphore(0)
    writing = asyncio.create_task(world.generate(call, prompt="he looked", max_new_tokens=12, ignore_end=True))
    await eventually(lambda: world.prior.running == 1)
    call.preempt(reading)
    if read:
        reading.set_result(None)
    for _ in range(10):
        world.prior.turns.release()
    if not read:
        await eventually(lambda: world.prior.running == 0)
        assert (await world.generate(prompt="he", max_new_tokens=4))[-1].finish_reason
        assert len(world.prior.calls) == 2  # it is not queued before its reader is back
        reading.set_result(None)
    assert (await writing)[-1].finish_reason
    assert len(world.prior.calls) == (1 if read else 3)


async def test_a_run_of_few_latents_keeps_its_slot_for_less_time_than_one_of_many():
    gate = Admission(CoordinatorLimits(slice_seconds=PATIENCE), Metrics())
    gate.follow({"prior": 2})
    async with gate.slot(Call(), "prior", 64) as few, gate.slot(Call(), "prior", 1024) as many:
        few.launched = many.launched = few.launched - PATIENCE / 8
        smaller = asyncio.create_task(gate.enter(Ticket(Call(), "prior", 4)))
        await eventually(lambda: gate.waiting)
        assert (gate.outlasts(few), gate.outlasts(many)) == (True, False)
    await smaller


async def test_a_cancellation_that_nobody_asked_for_is_an_error_too():
    async def stream() -> AsyncGenerator[int, None]:
        yield 0
        raise asyncio.CancelledError  # as grpc.aio does when a call is cancelled on this side

    async with ReadAhead(stream()) as ahead:
        assert await ahead.next() == 0
        with pytest.raises(Cancelled):
            await asyncio.wait_for(ahead.next(), 5)


async def test_who_is_cancelled_while_the_stream_closes_hears_of_it():
    closing = asyncio.Event()

    async def stream() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            closing.set()
            await asyncio.Event().wait()

    async def leave() -> None:
        async with ReadAhead(stream()) as ahead:
            await ahead.next()

    leaving = asyncio.create_task(leave())
    await closing.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_passing_items_give_way_to_the_next_and_are_left_out_where_another_waits():
    sent = []

    async def stream():
        for item in ("p1", "p2", "A", "p3", "B"):
            sent.append(item)
            yield item

    async with ReadAhead(stream(), passing=lambda item: item.startswith("p")) as ahead:
        await eventually(lambda: len(sent) == 5)
        assert [await ahead.next(), await ahead.next(), ahead.received] == ["A", "B", 2]
