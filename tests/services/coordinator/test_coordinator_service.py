"""What the coordinator's services do themselves: ids and texts, and whom a call is counted for."""

import asyncio
import re

import grpc

from colaserve.v1 import generation_pb2 as pb
from colaserve.v1.generation_pb2_grpc import GenerationServiceStub
from colaserve_services.coordinator.service import GenerationServicer
from colaserve_services.errors import InvalidRequest, Overloaded
from colaserve_services.rpc import requests
from colaserve_services.rpc.auth import Keys
from colaserve_services.rpc.local import LocalStub
from colaserve_services.rpc.settings import ServerSettings
from tests.services.servers import refusal, served
from tests.waiting import eventually

LONG = pb.GenerateRequest(prompt="he looked", max_new_tokens=60, ignore_end=True)


async def test_tokenize_and_detokenize_are_inverse_and_bounded(world, tokenizer):
    stub, text = LocalStub(GenerationServicer(world.coordinator)), "he 😀<|im_end|>\0"
    answer = await stub.Tokenize(pb.TokenizeRequest(text=text))
    assert list(answer.token_ids) == tokenizer.encode(text)
    assert len(answer.tokens) == len(answer.token_ids)
    back = await stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids))
    assert (back.text, back.tokens) == (text, answer.tokens)
    for call, fault in (
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=[512])), r"token_ids: token id 512"),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=[5] * 257)), "token_ids: got 257 ids, at most 256 fit"),
        (stub.Tokenize(pb.TokenizeRequest(text="a" * 1_000_000)), r"text: has \d+ tokens or more, at most 256 fit"),
    ):
        assert re.search(fault, str(await refusal(call)))


async def test_tokenizing_shares_the_queue_of_generations(make_world):
    world = await make_world(max_running=2, max_waiting=1)
    await world.generate(prompt="he", max_new_tokens=4)  # so that it is known how long a call takes
    stub, admission = LocalStub(GenerationServicer(world.coordinator)), world.coordinator.services.admission
    world.prior.gate.clear()
    running = [asyncio.create_task(world.generate(prompt="he looked")) for _ in range(3)]
    await eventually(lambda: admission.waiting == 1)
    for call in (stub.Tokenize(pb.TokenizeRequest(text="he")), stub.Detokenize(pb.DetokenizeRequest(token_ids=[5]))):
        assert isinstance(await refusal(call), Overloaded)
    for task in running:
        task.cancel()
    world.prior.gate.set()
    await eventually(lambda: admission.running == 0)
    assert (await stub.Tokenize(pb.TokenizeRequest(text="he"))).token_ids


async def test_clients_without_a_key_are_counted_by_their_addresses(make_world):
    world = await make_world(max_per_key=1)
    world.prior.gate.clear()
    servicer, settings = GenerationServicer(world.coordinator), ServerSettings(host="::")
    async with served(servicer, settings=settings) as it, grpc.aio.insecure_channel(f"[::1]:{it.port}") as elsewhere:
        calls = [GenerationServiceStub(channel).Generate(LONG) for channel in (it.channel, elsewhere)]
        reading = [asyncio.create_task(call.read()) for call in calls]
        await eventually(lambda: world.coordinator.services.admission.running == 2)
        refused = await refusal(GenerationServiceStub(elsewhere).Generate(LONG).read())
        assert "1 calls of this client are under way" in str(refused)
        world.prior.gate.set()
        assert all(await asyncio.gather(*reading))


def metadata(key: str, caller: str = "") -> tuple[tuple[str, str], ...]:
    found = ((requests.AUTHORIZATION, f"Bearer {key}"),)
    return (*found, (requests.CALLER, caller)) if caller else found


async def test_prefixes_are_kept_for_the_verified_caller_unless_a_salt_is_asked_for(world, tmp_path):
    (tmp_path / "keys").write_text("one k1\ntwo k2\n")
    keys, settings = Keys.load(tmp_path / "keys", "role-key"), ServerSettings(role_key="role-key")
    async with served(GenerationServicer(world.coordinator), settings=settings, keys=keys) as it:
        stub = GenerationServiceStub(it.channel)
        for shown, salt in (
            (metadata("k1"), "key:one"),
            (metadata("k1", "key:two"), "key:one"),  # only a role is believed
            (metadata("role-key", "key:two"), "key:two"),
            (metadata("role-key", "10.0.0.1"), ""),
        ):
            for asked, expected in (("", salt), ("key:two", "salt:key:two")):
                request = pb.GenerateRequest(prompt="he looked", max_new_tokens=4, cache_salt=asked)
                assert [response async for response in stub.Generate(request, metadata=shown)]
                stages = world.encoder, world.prior, world.decoder
                assert {stage.calls[-1].cache_salt for stage in stages} == {expected}
        too_long = pb.GenerateRequest(prompt="he", cache_salt="x" * 257)
        refused = await refusal(stub.Generate(too_long, metadata=shown).read())
        assert isinstance(refused, InvalidRequest)
        assert "cache_salt: got 257 characters" in str(refused)
