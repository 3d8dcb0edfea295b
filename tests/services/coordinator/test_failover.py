"""When a replica breaks the caller notices nothing: the same ids as undisturbed, nothing asked twice."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colaserve.v1 import latent_service_pb2, types_pb2
from colaserve_services.coordinator import Call, CoordinatorLimits
from colaserve_services.coordinator.admission import Ticket
from colaserve_services.coordinator.failures import Attempts
from colaserve_services.coordinator.infill import infill
from colaserve_services.coordinator.latent_space import decode_latents
from colaserve_services.errors import ColaserveError, DeadlineExceeded, Overloaded, Unavailable
from tests.waiting import eventually

PROMPT = "He looked at the river and then he said nothing"  # its tail is decoded again
SEED = types_pb2.NoiseSeed(base_seed=11, sample_id=2)
REQUEST = {"prompt": PROMPT, "max_new_tokens": 18, "seed": SEED, "ignore_end": True, "with_latents": True}
FULL = StatusCode.RESOURCE_EXHAUSTED
BROKEN = [StatusCode.UNAVAILABLE, StatusCode.INTERNAL, StatusCode.CANCELLED, StatusCode.UNKNOWN]


def reported(responses: list[Any]) -> list[Any]:
    return [(r.text, list(r.token_ids), r.latents, r.finish_reason, r.usage.completion_tokens) for r in responses]


@pytest.mark.parametrize("code", BROKEN, ids=lambda code: code.name)
@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("stage", ["prior", "decoder"])
async def test_a_stream_that_breaks_continues_elsewhere_with_the_same_tokens(world, stage: str, after: int, code):
    undisturbed = reported(await world.generate(**REQUEST))
    fake = getattr(world, stage)
    fake.faults[1] = (after, code)
    assert reported(await world.generate(**REQUEST)) == undisturbed
    assert len(fake.calls) == 3
    assert world.counted("failovers_total") == {(stage, "resumed"): 1}


async def test_streams_that_break_again_and_again_still_end_the_same(world):
    undisturbed = reported(await world.generate(**REQUEST))
    broken = {call: (call % 2, StatusCode.UNAVAILABLE) for call in range(1, 12)}
    world.prior.faults, world.decoder.faults = broken, broken
    world.encoder.faults = dict.fromkeys(range(1, 4), (0, StatusCode.UNAVAILABLE))
    assert reported(await world.generate(**REQUEST)) == undisturbed


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_attempts_are_bounded(make_world, stage: str):
    world = await make_world(attempts=4)
    getattr(world, stage).faults = dict.fromkeys(range(100), (0, StatusCode.UNAVAILABLE))
    with pytest.raises(Unavailable, match=stage):
        await world.generate(**REQUEST)
    assert len(getattr(world, stage).calls) == 4
    assert world.counted("failovers_total") == {(stage, "failed"): 1}
    await eventually(lambda: (world.prior.running, world.decoder.running) == (0, 0))


async def test_attempts_end_with_the_deadline(make_world):
    world = await make_world(retry_seconds=60)
    world.prior.faults = dict.fromkeys(range(100), (0, StatusCode.UNAVAILABLE))
    started = time.monotonic()
    with pytest.raises(ColaserveError):
        await world.generate(**REQUEST, call=Call(deadline=started + 20))
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("bugs", [2, 3])
async def test_replicas_that_died_do_not_count_as_bugs(world, bugs: int):
    """Three failures that may be bugs end a call, however many replicas died before them."""
    codes = [StatusCode.UNAVAILABLE] * 3 + [StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.INTERNAL][:bugs]
    world.prior.faults = {number: (0, code) for number, code in enumerate(codes)}
    if bugs == 2:
        assert await world.generate(**REQUEST)
    else:
        with pytest.raises(ColaserveError):
            await world.generate(**REQUEST)
    assert len(world.prior.calls) == 6


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_call_waits_for_a_full_stage_as_long_as_calls_may_be_queued(make_world, stage: str):
    world = await make_world(queue_seconds=0.3)
    fake = getattr(world, stage)
    fake.faults = {0: (0, FULL), 1: (0, FULL)}
    undisturbed = reported(await world.generate(**REQUEST))
    assert len(fake.calls) == 3
    fake.faults = dict.fromkeys(range(3, 1000), (0, FULL))
    with pytest.raises(Overloaded, match=stage) as caught:
        await world.generate(**REQUEST)
    assert len(fake.calls) > 5
    assert caught.value.retry_after > 0
    fake.faults = {}
    assert reported(await world.generate(**REQUEST)) == undisturbed
    assert world.counted("failovers_total") == world.counted("engine_queue_depth") == {}


async def test_a_run_in_its_middle_waits_for_an_overloaded_replica(world):
    undisturbed = reported(await world.generate(**REQUEST))
    full = dict.fromkeys(range(2, 6), (0, StatusCode.RESOURCE_EXHAUSTED))
    world.decoder.faults = {1: (2, StatusCode.UNAVAILABLE), **full}
    assert reported(await world.generate(**REQUEST)) == undisturbed


async def test_a_run_in_its_middle_waits_for_a_full_stage_until_its_deadline(world):
    world.decoder.faults = {0: (1, StatusCode.UNAVAILABLE), **dict.fromkeys(range(1, 10_000), (0, FULL))}
    started = time.monotonic()
    with pytest.raises((Overloaded, DeadlineExceeded)):
        await world.generate(**REQUEST, call=Call(deadline=started + 0.5))
    assert time.monotonic() - started > 0.4
    assert len(world.decoder.calls) > 2


async def test_no_decoder_is_held_before_the_prior_has_written(world):
    """Else calls that hold all decoders could wait for priors which other calls hold that wait for decoders."""
    world.prior.gate.clear()
    generating = asyncio.create_task(world.generate(**REQUEST))
    await eventually(lambda: world.prior.running == 1)
    await asyncio.sleep(0.05)
    assert world.decoder.calls == []
    world.prior.gate.set()
    await generating


async def test_no_decoder_is_held_while_a_broken_prior_is_carried_on(world):
    undisturbed, begin = reported(await world.generate(**REQUEST)), world.prior.begin

    def begin_and_wait(request: Any, context: Any) -> Any:
        if len(world.prior.calls) == 2:
            world.prior.gate.clear()
        return begin(request, context)

    world.prior.begin, world.prior.faults = begin_and_wait, {1: (2, StatusCode.UNAVAILABLE)}
    generating = asyncio.create_task(world.generate(**REQUEST))
    await eventually(lambda: len(world.prior.calls) == 3 and len(world.decoder.calls) == 3)
    await eventually(lambda: world.decoder.running == 0)  # it had opened one a block, for the two that were written
    world.prior.gate.set()
    assert reported(await generating) == undisturbed
    assert len(world.decoder.calls) == 4


@pytest.mark.parametrize("after", range(3))
async def test_decoded_latents_keep_their_target_logprobs(world, after: int):
    values = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=(10, 2), data=bytes(80))
    fields = {"latents": types_pb2.Latents(values=values), "token_count": 10}
    plain = await world.ask(decode_latents, latent_service_pb2.DecodeLatentsRequest(**fields))
    targets = [id_ + (index % 2) for index, id_ in enumerate(plain.token_ids)]
    world.decoder.faults[1] = (after, StatusCode.UNAVAILABLE)
    request = latent_service_pb2.DecodeLatentsRequest(**fields, target_ids=targets)
    again = await world.ask(decode_latents, request)
    assert again.token_ids == plain.token_ids
    assert list(again.target_logprobs) == [-1.0, -3.0] * 5


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(0, 19), st.integers(1, 9)), min_size=1, max_size=4),
    after=st.integers(0, 6),
    stage=st.sampled_from(["prior", "decoder"]),
)
async def test_an_infill_continues_over_known_blocks_whatever_its_holes(world, parts: Any, after: int, stage: str):
    """A prior that is asked for other blocks than the rest of them writes others."""
    request = latent_service_pb2.InfillRequest(seed=SEED)
    for kept, hole in parts:
        if kept:
            request.segments.add(text="abcdefghijklmnopqrs"[:kept])
        request.segments.add(token_count=hole)
    undisturbed = await world.ask(infill, request)
    fake = getattr(world, stage)
    fake.faults = {len(fake.calls): (after, StatusCode.UNAVAILABLE)}
    again = await world.ask(infill, request)
    assert (again.text, again.token_ids, again.usage) == (undisturbed.text, undisturbed.token_ids, undisturbed.usage)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (StatusCode.INTERNAL, "Internal error from Core"),
        (StatusCode.UNKNOWN, "Stream removed (Unwrap failed (TSI_DATA_CORRUPTED))"),
    ],
)
async def test_a_stream_whose_connection_was_lost_counts_as_one_that_broke(world, code, details):
    nothing = grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(code, nothing, nothing, details)
    limits = CoordinatorLimits(attempts=5, retry_seconds=0.001)
    attempts = Attempts(replace(world.coordinator.services, limits=limits), Ticket(Call(), "decoder"))
    for _ in range(4):  # a fault of the stage's own gets fewer
        await attempts.failed(lost)
    with pytest.raises(Unavailable, match="the decoder is not available"):
        await attempts.failed(lost)
