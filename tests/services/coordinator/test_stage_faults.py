"""A stage that answers wrongly is left for another and counted; the caller gets what was asked for."""

import struct
import time
from typing import Any

import pytest
from grpc import StatusCode

from colaserve.v1 import latent_service_pb2, types_pb2
from colaserve_services.coordinator import Call
from colaserve_services.coordinator.checks import KINDS
from colaserve_services.coordinator.latent_space import encode_text, sample_latents
from colaserve_services.errors import DeadlineExceeded, StepFailed, Unavailable
from colaserve_services.rpc.errors import http_status
from tests.services.coordinator.test_failover import REQUEST, reported

NAN = struct.pack("<f", float("nan"))


def latents_of(response: Any) -> types_pb2.Latents:
    return response.encodings[0].latents if hasattr(response, "encodings") else response.latents


def ending_in(last: bytes) -> Any:
    """Other bytes in place of the last number."""

    def spoil(response: Any) -> None:
        values = latents_of(response).values
        values.data = values.data[:-4] + last

    return spoil


def absurd_timing(response: Any) -> None:
    response.timing.compute_us = 2**64 - 1


def skips_a_block(response: Any) -> None:
    response.block_index += 1


LATENTS = {
    ending_in(NAN): "not_finite",
    ending_in(struct.pack("<f", 10_001)): "not_finite",
    ending_in(b""): "shape",
    lambda r: latents_of(r).values.shape.pop(): "shape",
    lambda r: setattr(latents_of(r).values, "dtype", types_pb2.DATA_TYPE_FLOAT16): "shape",
    lambda r: setattr(latents_of(r), "space", "f" * 16): "space",
    absurd_timing: "timing",
}
WRONG = {
    "encoder": {
        **LATENTS,
        lambda r: r.encodings.add(latents=r.encodings[0].latents): "count",
        lambda r: r.ClearField("encodings"): "count",
        lambda r: r.encodings[0].log_variance.CopyFrom(r.encodings[0].latents.values): "shape",
    },
    "prior": {**LATENTS, skips_a_block: "count"},
    "decoder": {
        absurd_timing: "timing",
        skips_a_block: "count",
        lambda r: r.token_ids.append(3): "count",
        lambda r: r.token_ids.pop(): "count",
        lambda r: r.token_ids.__setitem__(0, 512): "ids",
        lambda r: r.logprobs.pop(): "count",
        lambda r: r.logprobs.__setitem__(0, float("-inf")): "not_finite",
        lambda r: r.target_logprobs.append(-1.0): "count",
        lambda r: r.top_logprobs.pop(): "count",
        lambda r: r.top_logprobs[1].token_ids.pop(): "count",
        lambda r: r.top_logprobs[1].logprobs.append(0.0): "count",
        lambda r: r.top_logprobs[1].token_ids.__setitem__(0, 512): "ids",
        lambda r: r.top_logprobs[1].logprobs.__setitem__(0, float("nan")): "not_finite",
    },
}
ALL = [(stage, spoil, kind) for stage, spoils in WRONG.items() for spoil, kind in spoils.items()]


@pytest.mark.parametrize(("stage", "spoil", "kind"), ALL)
async def test_a_wrong_answer_is_not_used_and_the_call_continues_elsewhere(world, stage: str, spoil: Any, kind: str):
    request = {**REQUEST, "top_logprobs": 2}
    undisturbed = reported(await world.generate(**request))
    fake = getattr(world, stage)
    fake.spoils[1] = spoil
    assert reported(await world.generate(**request)) == undisturbed
    assert world.counted("stage_faults_total") == {(stage, kind): 1}
    assert kind in KINDS


@pytest.mark.parametrize(
    "code",
    [
        StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION, StatusCode.UNAUTHENTICATED,
        StatusCode.PERMISSION_DENIED, StatusCode.UNIMPLEMENTED, StatusCode.DEADLINE_EXCEEDED,
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_refusal_of_what_was_checked_is_the_stages_fault(world, stage: str, code: StatusCode):
    undisturbed = reported(await world.generate(**REQUEST))
    getattr(world, stage).faults[1] = (1, code)
    assert reported(await world.generate(**REQUEST)) == undisturbed
    assert world.counted("stage_faults_total") == {(stage, "refused"): 1}


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_stage_that_gives_up_close_to_the_deadline_is_not_at_fault(world, stage: str):
    getattr(world, stage).faults[0] = (0, StatusCode.DEADLINE_EXCEEDED)
    with pytest.raises(DeadlineExceeded):
        await world.generate(**REQUEST, call=Call(deadline=time.monotonic() + 0.9))
    assert world.counted("stage_faults_total") == {}


@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_stage_that_is_wrong_everywhere_is_not_available(make_world, stage: str):
    world = await make_world(attempts=2)
    getattr(world, stage).spoils = dict.fromkeys(range(10), absurd_timing)
    with pytest.raises(Unavailable, match=stage) as caught:
        await world.generate(**REQUEST)
    assert http_status(caught.value) == 503
    assert world.counted("stage_faults_total") == {(stage, "timing"): 2}


@pytest.mark.parametrize(("number", "counted"), [("nan", {("encoder", "not_finite"): 1}), ("-20000", {})])
async def test_a_variance_that_is_not_finite_is_the_encoders_fault_and_one_of_any_size_is_none(world, number, counted):
    def spoil(response: Any) -> None:
        variance = response.encodings[0].log_variance
        variance.data = struct.pack("<f", float(number)) * (len(variance.data) // 4)

    request = latent_service_pb2.EncodeTextRequest(texts=["he looked"], with_variance=True)
    undisturbed = await world.ask(encode_text, request)
    world.encoder.spoils[1] = spoil
    assert (await world.ask(encode_text, request) == undisturbed) is bool(counted)
    assert world.counted("stage_faults_total") == counted


async def test_a_block_too_many_does_not_reach_the_caller(world):
    world.prior.extra = 1
    request = latent_service_pb2.SampleLatentsRequest(max_blocks=3)
    found = [response.block_index async for response in world.ask(sample_latents, request)]
    assert found == [0, 1, 2]
    assert world.counted("stage_faults_total") == {("prior", "count"): 1}


async def test_a_decoder_that_names_no_index_is_trusted(world):
    undisturbed = reported(await world.generate(**REQUEST))
    world.decoder.index = lambda ids: None
    assert reported(await world.generate(**REQUEST)) == undisturbed
    assert world.counted("stage_faults_total") == {}


@pytest.mark.parametrize("after", range(2))
@pytest.mark.parametrize("stage", ["encoder", "prior", "decoder"])
async def test_a_failed_step_is_never_tried_again(world, stage: str, after: int):
    fake = getattr(world, stage)
    fake.faults = dict.fromkeys(range(9), (after if stage != "encoder" else 0, StepFailed("it cannot be computed")))
    with pytest.raises(StepFailed) as caught:
        await world.generate(**REQUEST)
    assert len(fake.calls) == 1
    assert http_status(caught.value) == 500
