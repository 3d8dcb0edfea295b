"""Failed steps through the services: the status tells whose fault it was, and health and metrics follow."""

import asyncio
import contextlib
import logging

import grpc
import pytest

from colaserve.v1 import decoder_pb2, encoder_pb2, latent_service_pb2, prior_pb2
from colaserve_services.coordinator import Call, Coordinator, Stages
from colaserve_services.coordinator.latent_space import sample_latents
from colaserve_services.coordinator.stages import Local
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import AT_FAULT, StepFailed, Unavailable
from colaserve_services.rpc.requests import REQUEST_ID, current_request_id
from colaserve_services.text import Tokenizer
from tests.services.engines import faults
from tests.services.engines.faults import MARK_LATENT, MARK_TOKEN, Network
from tests.services.servers import refusal
from tests.services.stages.serving import serving
from tests.waiting import eventually

STAGES = ("encoder", "prior", "decoder")
LIMITS = EngineLimits(max_context=256, max_running=4, look_again_seconds=0.05)


async def encode(served, marked):
    await served.encoder.Encode(encoder_pb2.EncodeRequest(sequences=[{"ids": [MARK_TOKEN if marked else 5] * 3}]))


async def sample(served, marked):
    async for _ in served.prior.Sample(served.run(known=5, value=MARK_LATENT if marked else 1.0)):
        pass


async def decode(served, marked):
    call = served.decoder.Decode()
    await call.write(decoder_pb2.DecodeRequest(open={"max_latents": 64}))
    block = served.latents(served.shape.block_size, value=MARK_LATENT if marked else 1.0)
    await call.write(decoder_pb2.DecodeRequest(block=block))
    await call.done_writing()
    async for _ in call:
        pass


ASK = {"encoder": encode, "prior": sample, "decoder": decode}


@pytest.mark.parametrize("fault", [faults.raises, faults.not_finite])
async def test_a_step_that_fails_with_one_session_is_reported_counted_and_no_reason_to_be_unready(tiny, fault):
    reported, failures = [], dict.fromkeys(STAGES, 0)
    marks = {MARK_LATENT: fault, MARK_TOKEN: fault}
    async with serving(
        tiny, LIMITS, network=lambda x: Network(x, marks), failing=lambda *x: reported.append(x)
    ) as served:
        for stage in STAGES:
            error, _ = await asyncio.gather(refusal(ASK[stage](served, True)), ASK[stage](served, False))
            assert isinstance(error, StepFailed)
            failures[stage] = 1
            value = served.metrics.registry.get_sample_value
            assert {each: value("colaserve_step_failures_total", {"stage": each}) for each in STAGES} == failures
        assert reported == []


async def test_a_failed_step_is_logged_under_the_request_id_of_its_call(tiny):
    seen = []

    class Lines(logging.Handler):
        def emit(self, record):
            seen.append((record.getMessage(), current_request_id()))

    handler = Lines(logging.ERROR)
    logging.getLogger("colaserve_services.engine").addHandler(handler)
    try:
        async with serving(tiny, LIMITS, network=lambda x: Network(x, {MARK_LATENT: faults.raises})) as served:
            call = served.prior.Sample(served.run(known=5, value=MARK_LATENT), metadata=((REQUEST_ID, "call-7"),))
            assert isinstance(await refusal(call.read()), StepFailed)
    finally:
        logging.getLogger("colaserve_services.engine").removeHandler(handler)
    assert seen == [("a step failed with one session alone: Broken", "call-7")]


async def test_an_engine_at_fault_is_reported_and_so_is_its_recovery(tiny):
    reported, everything = [], {}
    async with serving(
        tiny, LIMITS, network=lambda x: Network(x, everything), failing=lambda *x: reported.append(x)
    ) as served:
        everything[None] = faults.raises
        assert isinstance(await refusal(sample(served, False)), Unavailable)
        assert reported == [("prior", True)]
        assert isinstance(await refusal(served.prior.GetInfo(prior_pb2.PriorServiceGetInfoRequest())), Unavailable)
        assert str(await refusal(sample(served, False))) == AT_FAULT
        everything.clear()
        await eventually(lambda: reported == [("prior", True), ("prior", False)])
        await sample(served, False)


async def test_a_run_that_breaks_one_device_after_another_ends_with_the_second(tiny):
    """Each device is lost for good once it has computed what breaks it, as a GPU's context is."""

    class Lost(Network):
        def _failing(self, rows, values):
            if (values == MARK_LATENT).any():
                self.faults[None] = faults.raises
            return super()._failing(rows, values)

    async with contextlib.AsyncExitStack() as stack:
        made = [serving(tiny, EngineLimits(max_context=256), network=lambda x: Lost(x, {})) for _ in range(3)]
        fleet = [await stack.enter_async_context(each) for each in made]
        first, tokenizer = fleet[0], Tokenizer.open(tiny.directory / "tokenizer.json", fleet[0].shape.vocab_size)
        priors = [Local(each.prior, each.target) for each in fleet]
        coordinator = Coordinator(Stages(first.encoder, priors, first.decoder), tokenizer)
        await coordinator.connect()
        request = latent_service_pb2.SampleLatentsRequest(prefix=first.latents(5, value=MARK_LATENT), max_blocks=1)
        with pytest.raises(StepFailed, match="two replicas of the prior failed or ended"):
            await anext(sample_latents(coordinator.services, request, Call()))
        at_fault = [await _at_fault(each) for each in fleet]
        assert sorted(at_fault) == [False, True, True]
        request.prefix.CopyFrom(first.latents(5))
        [written] = await anext(sample_latents(coordinator.services, request, Call()))
        assert written.block_index == 0


async def _at_fault(served):
    try:
        await served.prior.GetInfo(prior_pb2.PriorServiceGetInfoRequest())
    except grpc.aio.AioRpcError:
        return True
    return False
