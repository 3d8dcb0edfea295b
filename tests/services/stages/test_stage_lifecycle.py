"""A stream owns what it holds: it is freed however the stream ends, and what does not fit is refused at once."""

import asyncio
import time

import grpc
import pytest

from colaserve.v1 import decoder_pb2, encoder_pb2, prior_pb2, prior_pb2_grpc
from colaserve_services.engine.limits import EngineLimits
from colaserve_services.errors import Overloaded, Unavailable
from colaserve_services.model.weights import WeightFolder
from colaserve_services.rpc.channels import open_channel
from colaserve_services.rpc.errors import error_from_rpc
from colaserve_services.rpc.settings import ChannelSettings
from tests.services.engines.runs import patiently
from tests.services.servers import UNREAD, refusal
from tests.services.stages.serving import serving
from tests.waiting import eventually

LONG = {"blocks": 60, "steps": 1000}  # minutes of work


async def sampling(served):
    call = served.prior.Sample(served.run(**LONG))
    await eventually(lambda: served.kv_bytes("prior") > 0)
    return call


async def decoding(served):
    call = served.decoder.Decode()
    await call.write(decoder_pb2.DecodeRequest(open={"max_latents": 64}))
    await call.write(decoder_pb2.DecodeRequest(block=served.latents(served.shape.block_size)))
    await call.read()
    return call


STREAMS = {"prior": sampling, "decoder": decoding}


@pytest.mark.parametrize("stage", STREAMS)
async def test_a_broken_connection_frees_the_kv(tiny, stage):
    async with serving(tiny) as served:
        await STREAMS[stage](served)
        assert served.kv_bytes(stage) > 0
        await served.channel.close()
        await eventually(lambda: served.kv_bytes(stage) == 0)


async def test_one_session_too_many_is_refused_at_once_with_a_hint_and_harms_nobody(tiny):
    limits, long = EngineLimits(max_context=512, max_running=1), {"blocks": 60, "steps": 50}
    reported = []
    async with serving(tiny, limits, failing=lambda *said: reported.append(said)) as served:
        engine = served.stages.engines["prior"]
        undisturbed = await _two_blocks(served.prior.Sample(served.run(**long)))
        await eventually(lambda: engine.load().running == 0)
        running = served.prior.Sample(served.run(**long))
        await eventually(lambda: engine.load().running == 1)
        started = time.monotonic()
        error = await refusal(served.prior.Sample(served.run(blocks=1)).read())
        assert isinstance(error, Overloaded)
        assert reported == [], "an engine that is busy is not at fault"
        assert str(error) == "1 sessions run, and there is no slot for another one"
        assert 0 < error.retry_after <= 60
        assert time.monotonic() - started < 15
        info = await served.prior.GetInfo(_info_request("prior"))
        assert (info.limits.max_running, info.limits.max_waiting, info.server.waiting) == (1, 0, 0)
        assert await _two_blocks(running) == undisturbed
        refusals = {"stage": "prior", "reason": "slots"}
        assert served.metrics.registry.get_sample_value("colaserve_refused_total", refusals) == 1


async def _two_blocks(call):
    blocks = [(await call.read()).latents for _ in range(2)]
    call.cancel()
    return blocks


async def test_an_unread_stream_does_not_run_away_and_continues_when_read(tiny):
    async with serving(tiny, EngineLimits(max_context=2048, run_ahead=2)) as served:
        channel = open_channel(served.target, ChannelSettings(), "colaserve.v1.PriorService")
        try:
            call = prior_pb2_grpc.PriorServiceStub(channel).Sample(served.run(blocks=100, steps=1), wait_for_ready=True)
            assert (await call.read()).block_index == 0
            await asyncio.sleep(0.5)
            assert served.blocks_written() <= 6  # one read, two wait, and a few are on their way
            assert [(await call.read()).block_index for _ in range(99)] == list(range(1, 100))
            assert served.blocks_written() == 100
        finally:
            await channel.close()


async def test_get_info_reports_model_limits_and_load(tiny):
    async with serving(tiny) as served:
        call = await sampling(served)
        prior_folder = WeightFolder(tiny.directory / "cola_dlm" / "cola_dit")
        weights = {"encoder": served.space, "prior": prior_folder.fingerprint(), "decoder": served.space}
        for stage, stub in (("encoder", served.encoder), ("prior", served.prior), ("decoder", served.decoder)):
            info = await stub.GetInfo(_info_request(stage))
            assert info.space == served.space
            assert info.weights == weights[stage]
            assert (info.model.latent_dim, info.model.block_size) == (served.shape.latent_dim, served.shape.block_size)
            assert info.model.parameters > 0
            assert info.limits.max_context == served.limits.max_context
            assert info.limits.max_message_bytes == 64 << 20
            assert (info.server.device, info.server.dtype) == ("cpu", "float32")
            assert info.server.backend.split(":")[0] in ("cpu", "reference")
            assert info.server.running == (1 if stage == "prior" else 0)
        call.cancel()


def _info_request(stage):
    module = {"encoder": encoder_pb2, "prior": prior_pb2, "decoder": decoder_pb2}[stage]
    return getattr(module, f"{stage.title()}ServiceGetInfoRequest")()


async def unread(served, channel):
    call = prior_pb2_grpc.PriorServiceStub(channel).Sample(served.run(blocks=2000, steps=1))
    await call.initial_metadata()
    return call


async def ended(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def newcomer(served, stage):
    """A call that takes the slot of an idle one, as a coordinator would send it."""
    try:
        if stage == "decoder":
            (await decoding(served)).cancel()
        else:
            await ended(served.prior.Sample(served.run(blocks=1)))
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


@pytest.mark.parametrize(("stage", "method"), [("prior", "Sample"), ("decoder", "Decode")])
async def test_a_stream_that_is_evicted_ends_though_it_neither_sends_nor_reads(tiny, stage, method):
    limits = EngineLimits(max_running=1, idle_seconds=0.2)
    async with serving(tiny, limits) as served, grpc.aio.insecure_channel(served.target, UNREAD) as channel:
        silent = await (decoding(served) if stage == "decoder" else unread(served, channel))
        await eventually(lambda: served.stages.engines[stage].load().running == 1)
        await patiently(lambda: newcomer(served, stage))
        held = served.metrics.requests_in_progress.labels(f"{stage.title()}Service", method)
        await eventually(lambda: held._value.get() == 0)
        evicted = await refusal(ended(silent))
        assert isinstance(evicted, Unavailable)
        assert "nothing to compute for" in str(evicted)
