"""Previews and probes beside a generation: they change nothing of it, and are left out where they would delay it."""

import asyncio
import struct
from typing import Any

import pytest
from grpc import StatusCode

from colaserve.v1 import generation_pb2, latent_service_pb2, types_pb2
from colaserve_services.coordinator.generation import generate
from colaserve_services.coordinator.latent_space import sample_latents
from colaserve_services.coordinator.service import GenerationServicer, LatentServicer
from colaserve_services.rpc.local import LocalStub
from tests.services.coordinator.test_failover import REQUEST, reported
from tests.waiting import eventually

LOOKS = {"preview_every": 2, "with_probes": True}


async def in_turns(world: Any, work: Any, request: Any) -> list[Any]:
    """All responses; the prior sends each answer when what came of the one before is here."""
    world.prior.turns, responses = asyncio.Semaphore(1), []
    async for response in world.ask(work, request):
        responses.append(response)
        world.prior.turns.release()
    return responses


def looks(responses: list[Any]) -> list[Any]:
    return [response for response in responses if response.HasField("preview")]


def blocks(responses: list[Any]) -> list[Any]:
    return [response for response in responses if not response.HasField("preview")]


async def test_previews_come_between_blocks_with_their_text_and_change_nothing(world):
    plain = await world.generate(**REQUEST)
    watched = await in_turns(world, generate, generation_pb2.GenerateRequest(**REQUEST, **LOOKS))
    assert reported(blocks(watched)) == reported(plain)
    assert [b.usage.blocks for b in blocks(watched)] == [b.usage.blocks for b in plain]
    steps = [(look.preview.block_index, look.preview.step) for look in looks(watched)]
    assert steps == [(block, step) for block in range(len(plain)) for step in (2, 4)]
    for look, block in zip(looks(watched)[1::2], blocks(watched), strict=True):  # the latents are the block's own
        assert look.preview.latents == block.latents
        assert look.preview.text.startswith(block.text)
        assert {field.name for field, _ in look.ListFields()} == {"preview", "probes"}
    assert len({look.preview.text for look in looks(watched)}) == 2 * len(plain)


async def test_previews_that_come_close_together_are_decoded_together_and_all_shown(world):
    world.prior.turns, found = asyncio.Semaphore(3), []
    async for response in world.ask(generate, generation_pb2.GenerateRequest(**REQUEST, preview_every=2)):
        found.append(response)
        if not response.HasField("preview"):  # then both previews of the next block come, and that block
            [world.prior.turns.release() for _ in range(3)]
    steps = [look.preview.step for look in looks(found)]
    assert steps == [2, 4] * len(blocks(found))
    assert world.decoder.requests == ["preview 2", "block 1"] * len(blocks(found))


async def test_probes_of_both_stages_come_together_and_are_counted(world):
    plain = await world.generate(**REQUEST)
    assert not any(response.HasField("probes") for response in plain)
    watched = await in_turns(world, generate, generation_pb2.GenerateRequest(**REQUEST, **LOOKS))
    both = [types_pb2.Probes(norm=i + 0.5, drift=0, entropy=1.5, end_probability=0.25) for i in range(len(plain))]
    assert [block.probes for block in blocks(watched)] == both
    assert {(look.probes.entropy, look.probes.HasField("norm")) for look in looks(watched)} == {(1.5, False)}
    names = ("norm", "drift", "entropy", "end_probability")
    assert world.counted("probe_count") == {(name,): len(plain) for name in names}
    assert world.counted("probe_sum")["norm",] == sum(i + 0.5 for i in range(len(plain)))


async def test_sampled_latents_have_previews_and_the_priors_probes(world):
    request = {"max_blocks": 3, "seed": {"base_seed": 5}}
    plain = [r async for r in world.ask(sample_latents, latent_service_pb2.SampleLatentsRequest(**request))]
    watched = await in_turns(world, sample_latents, latent_service_pb2.SampleLatentsRequest(**request, **LOOKS))
    found = [(each.block_index, each.step, each.provisional) for each in watched]
    assert found == [(block, *step) for block in range(3) for step in ((2, True), (4, True), (4, False))]
    assert [each.latents for each in watched[2::3]] == [each.latents for each in plain]
    assert [each.probes.norm for each in watched[2::3]] == [0.5, 1.5, 2.5]
    assert all(each.seed.base_seed == 5 for each in watched)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
@pytest.mark.parametrize("after", range(4))
async def test_a_replica_that_breaks_may_cost_previews_and_no_block(world, stage: str, after: int):
    undisturbed = reported(await world.generate(**REQUEST))
    getattr(world, stage).faults[1] = (after, StatusCode.UNAVAILABLE)
    assert reported(blocks(await world.generate(**REQUEST, **LOOKS))) == undisturbed
    assert len(getattr(world, stage).calls) == 3


async def test_a_decoder_that_knows_no_previews_decodes_all_blocks(world):
    undisturbed = reported(await world.generate(**REQUEST))

    def as_a_block(response: Any) -> None:
        response.provisional = False

    world.decoder.spoils = dict.fromkeys(range(1, 99), as_a_block)
    watched = await world.generate(**REQUEST, **LOOKS)
    assert reported(watched) == undisturbed


async def test_a_malformed_preview_is_counted_and_left_out(world):
    undisturbed = reported(await world.generate(**REQUEST))

    def spoil(response: Any) -> None:
        if response.provisional:
            values = response.latents.values
            values.data = values.data[:-4] + struct.pack("<f", float("nan"))

    world.prior.spoils[1] = spoil
    assert reported(await world.generate(**REQUEST, **LOOKS)) == undisturbed
    assert world.counted("stage_faults_total") == {("prior", "not_finite"): 2 * len(undisturbed)}
    assert len(world.prior.calls) == 2


@pytest.mark.parametrize("method", ["Generate", "SampleLatents"])
async def test_a_slow_reader_gets_all_blocks_and_few_previews(world, method: str):
    wanted = {
        "Generate": generation_pb2.GenerateRequest(prompt="he", max_new_tokens=160, ignore_end=True, preview_every=1),
        "SampleLatents": latent_service_pb2.SampleLatentsRequest(max_blocks=40, preview_every=1),
    }[method]
    servicer = {"Generate": GenerationServicer, "SampleLatents": LatentServicer}[method]
    call = getattr(LocalStub(servicer(world.coordinator)), method)(wanted)
    await eventually(lambda: world.prior.running > 0)
    responses = []
    async for response in call:
        responses.append(response)
        for _ in range(50):  # turns of the event loop, in which the stages go on
            await asyncio.sleep(0)
    previews = [r for r in responses if (r.HasField("preview") if method == "Generate" else r.provisional)]
    assert len(responses) - len(previews) in (40, 41)
    assert len(previews) < 2 * 40  # of 160


async def test_the_text_of_a_preview_ends_at_the_end_token(world, tokenizer):
    ids = tokenizer.encode("one two three four")
    world.decoder.script = [*ids[:6], tokenizer.special.end_of_text, *ids[6:]]
    request = generation_pb2.GenerateRequest(max_new_tokens=30, preview_every=4)
    shown = [look.preview.text for look in looks(await in_turns(world, generate, request))]
    assert shown == [tokenizer.decode(ids[:4]), tokenizer.decode(ids[4:6])]


async def test_the_text_of_a_preview_continues_what_was_sent_within_the_budget(world, tokenizer):
    prompt, ids = "he said", tokenizer.encode(" one two three four")
    redecoded = len(tokenizer.encode(prompt)) % 4
    world.decoder.script = [3] * redecoded + ids
    held = tokenizer.decode(ids[: 4 - redecoded])[-1] + "never"  # the first block ends as this begins
    request = generation_pb2.GenerateRequest(prompt=prompt, preview_every=4, max_new_tokens=7, stop=[held])
    sent = ""
    for response in await in_turns(world, generate, request):
        if response.HasField("preview"):
            tokens = min(4 * (response.preview.block_index + 1) - redecoded, 7)
            assert sent + response.preview.text == tokenizer.decode(ids[:tokens])
        sent += response.text
    assert sent == tokenizer.decode(ids[:7])
