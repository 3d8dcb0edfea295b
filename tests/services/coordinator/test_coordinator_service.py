"""The coordinator behind a real gRPC server, its stages behind another."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from colaserve.v1 import (
    decoder_pb2_grpc,
    encoder_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    latent_service_pb2,
    latent_service_pb2_grpc,
    prior_pb2_grpc,
    types_pb2,
)
from colaserve_services.coordinator import Coordinator, CoordinatorLimits, Stages
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.rpc import requests
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.call_limit import CallLimit
from colaserve_services.rpc.edge import Edge
from colaserve_services.rpc.errors import error_from_rpc
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.metrics import Metrics
from colaserve_services.rpc.server import RpcServer
from colaserve_services.rpc.settings import ServerSettings
from tests.services.coordinator.stage_fakes import FakeDecoder, FakeEncoder, FakePrior
from tests.waiting import eventually

REGISTER = {
    "encoder": encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
    "prior": prior_pb2_grpc.add_PriorServiceServicer_to_server,
    "decoder": decoder_pb2_grpc.add_DecoderServiceServicer_to_server,
}
STUBS = {
    "encoder": encoder_pb2_grpc.EncoderServiceStub,
    "prior": prior_pb2_grpc.PriorServiceStub,
    "decoder": decoder_pb2_grpc.DecoderServiceStub,
}


@pytest.fixture
async def served(tokenizer, tmp_path, request) -> AsyncIterator[Any]:
    """A coordinator on two ports, of which one is a Unix socket, over three fakes; `param`: more of its limits."""
    limits = {"max_running": 2, "max_waiting": 1, "retry_seconds": 0.001} | getattr(request, "param", {})
    fakes = {"encoder": FakeEncoder(), "prior": FakePrior(), "decoder": FakeDecoder()}
    stage_server, server = (grpc.aio.server(interceptors=[Edge(Metrics(), CallLimit())]) for _ in range(2))
    for name, fake in fakes.items():
        REGISTER[name](fake, stage_server)
    stage_port = stage_server.add_insecure_port("127.0.0.1:0")
    await stage_server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stage_port}") as stage_channel:
        stubs = {name: stub(stage_channel) for name, stub in STUBS.items()}
        coordinator = Coordinator(Stages(**stubs), tokenizer, limits=CoordinatorLimits(**limits))
        await coordinator.connect()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(coordinator), server)
        latent_service_pb2_grpc.add_LatentServiceServicer_to_server(LatentServicer(coordinator), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.add_insecure_port(socket := f"unix:{tmp_path / 'socket'}")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield SimpleNamespace(
                **fakes,
                coordinator=coordinator,
                socket=socket,
                stage_server=stage_server,
                generation=generation_pb2_grpc.GenerationServiceStub(channel),
                latents=latent_service_pb2_grpc.LatentServiceStub(channel),
            )
        await server.stop(None)
    await stage_server.stop(None)


def request(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(**{"prompt": "he looked", "ignore_end": True, **fields})


async def generate(served: Any, **fields: Any) -> list[generation_pb2.GenerateResponse]:
    return [response async for response in served.generation.Generate(request(**fields))]


async def test_a_broken_stream_is_resumed_over_the_wire(served):
    seed = types_pb2.NoiseSeed(base_seed=3)
    undisturbed = await generate(served, seed=seed)
    served.prior.faults[1] = (2, grpc.StatusCode.UNAVAILABLE)
    served.decoder.faults[1] = (3, grpc.StatusCode.INTERNAL)
    again = await generate(served, seed=seed)
    assert [r.token_ids for r in again] == [r.token_ids for r in undisturbed]
    assert (len(served.prior.calls), len(served.decoder.calls)) == (3, 3)


@pytest.mark.parametrize("latents", [False, True])
async def test_a_client_that_goes_away_frees_coordinator_and_stages(served, latents: bool):
    blocks = latent_service_pb2.SampleLatentsRequest(max_blocks=50)
    call = served.latents.SampleLatents(blocks) if latents else served.generation.Generate(request(max_new_tokens=200))
    await call.read()
    served.prior.gate.clear()
    call.cancel()
    await eventually(lambda: served.prior.running == served.decoder.running == 0)
    assert served.coordinator.services.admission.running == 0


@pytest.mark.parametrize("served", [{"max_per_key": 1}], indirect=True)
async def test_clients_without_a_key_are_counted_by_their_addresses(served):
    admission = served.coordinator.services.admission
    served.prior.gate.clear()
    async with grpc.aio.insecure_channel(served.socket) as channel:
        calls = [asyncio.create_task(generate(served))]
        await eventually(lambda: admission.running == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="1 calls of this client are under way"):
            await generate(served)
        elsewhere = SimpleNamespace(generation=generation_pb2_grpc.GenerationServiceStub(channel))
        calls.append(asyncio.create_task(generate(elsewhere)))
        await eventually(lambda: admission.running == 2)
        served.prior.gate.set()
        assert all(await asyncio.gather(*calls))


async def test_a_deadline_of_the_client_ends_all(served):
    assert await generate(served)  # connected
    served.prior.gate.clear()
    call = served.generation.Generate(request(), timeout=2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < served.prior.remaining[-1] <= 2.05
    await eventually(lambda: served.prior.running == served.decoder.running == 0)


async def test_overload_is_reported_at_once_with_a_hint_and_running_calls_continue(served):
    served.prior.gate.clear()
    running = [asyncio.create_task(generate(served)) for _ in range(3)]
    await eventually(lambda: served.coordinator.services.admission.waiting == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(served)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_from_rpc(caught.value).retry_after > 0
    served.prior.gate.set()
    assert all(responses[-1].finish_reason for responses in await asyncio.gather(*running))


async def test_stages_that_are_gone_are_unavailable_within_the_attempts(served):
    await served.stage_server.stop(None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(served)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_tokenize_and_detokenize_are_inverse(served, tokenizer):
    text = "he 😀<|im_end|>\0"
    answer = await served.generation.Tokenize(generation_pb2.TokenizeRequest(text=text))
    assert list(answer.token_ids) == tokenizer.encode(text)
    assert len(answer.tokens) == len(answer.token_ids)
    back = await served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=answer.token_ids))
    assert (back.text, back.tokens) == (text, answer.tokens)
    with pytest.raises(grpc.aio.AioRpcError, match="token_ids"):
        await served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[512]))


async def test_what_is_too_large_to_tokenize_or_detokenize_is_refused(served):
    with pytest.raises(grpc.aio.AioRpcError, match=r"text: has \d+ tokens or more, at most 256 fit"):
        await served.generation.Tokenize(generation_pb2.TokenizeRequest(text="a" * 1_000_000))
    with pytest.raises(grpc.aio.AioRpcError, match="token_ids: got 257 ids, at most 256 fit"):
        await served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[5] * 257))


async def test_tokenizing_shares_the_queue_of_generations(served):
    await generate(served)
    served.prior.gate.clear()
    running = [asyncio.create_task(generate(served)) for _ in range(3)]
    await eventually(lambda: served.coordinator.services.admission.waiting == 1)
    for call in (
        lambda: served.generation.Tokenize(generation_pb2.TokenizeRequest(text="he")),
        lambda: served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[5])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for task in running:
        task.cancel()
    served.prior.gate.set()
    await eventually(lambda: served.coordinator.services.admission.running == 0)
    assert (await served.generation.Tokenize(generation_pb2.TokenizeRequest(text="he"))).token_ids


def metadata(key: str, caller: str = "") -> tuple[tuple[str, str], ...]:
    found = ((requests.AUTHORIZATION, f"Bearer {key}"),)
    return (*found, (requests.CALLER, caller)) if caller else found


@pytest.mark.parametrize(
    ("shown", "salt"),
    [
        (metadata("k1"), "key:one"),
        (metadata("k1", "key:two"), "key:one"),  # only a role is believed
        (metadata("role-key", "key:two"), "key:two"),
        (metadata("role-key", "10.0.0.1"), ""),
    ],
)
async def test_prefixes_are_kept_for_the_verified_caller_unless_a_salt_is_asked_for(tmp_path, tokenizer, shown, salt):
    file = tmp_path / "keys"
    file.write_text("one k1\ntwo k2\n")
    fakes = {"encoder": FakeEncoder(), "prior": FakePrior(), "decoder": FakeDecoder()}
    coordinator = Coordinator(Stages(**{name: LocalStub(fake) for name, fake in fakes.items()}), tokenizer)
    await coordinator.connect()
    server = RpcServer(ServerSettings(role_key="role-key"), Metrics(), Keys.load(file, "role-key"))
    server.add(GenerationServicer(coordinator))
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for asked, expected in (("", salt), ("key:two", "salt:key:two")):
                request = generation_pb2.GenerateRequest(prompt="he looked", max_new_tokens=4, cache_salt=asked)
                assert [response async for response in stub.Generate(request, metadata=shown)]
                assert {fake.calls[-1].cache_salt for fake in fakes.values()} == {expected}
            too_long = generation_pb2.GenerateRequest(prompt="he", cache_salt="x" * 257)
            with pytest.raises(grpc.aio.AioRpcError, match="cache_salt: got 257 characters"):
                await stub.Generate(too_long, metadata=shown).read()
    finally:
        await server.stop()
