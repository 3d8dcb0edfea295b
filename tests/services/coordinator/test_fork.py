"""A branch is what a generation alone would be, at whatever block it is taken up; the prefix is encoded once."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
from grpc import StatusCode

from colaserve.v1 import generation_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.coordinator import Call
from colaserve_services.coordinator.fork import AT_ONCE, MOST_BRANCHES, fork
from colaserve_services.coordinator.generation import generate
from colaserve_services.errors import InvalidRequest
from colaserve_services.text import Tokenizer
from tests.services.coordinator.stage_fakes import FakeDecoder
from tests.services.coordinator.test_replicas import Fleet
from tests.waiting import eventually

PROMPT = "He looked at the river and then he said nothing"
SHARED: dict[str, Any] = {
    "sampler": {"steps": 5}, "sampling": {"temperature": 0.5, "top_k": 3}, "seed": {"base_seed": 11, "sample_id": 2},
    "max_new_tokens": 18, "stop": ["zz"], "ignore_end": True, "print_special": True, "top_logprobs": 1,
}  # fmt: skip
OWN: list[dict[str, Any]] = [
    {},
    {"seed": {"base_seed": 5}, "sampler": {"solver": types_pb2.SOLVER_HEUN}},
    {"sampling": {"top_k": 9, "seed": 4}, "max_new_tokens": 7, "stop": ["e", "a"]},
]
SAME = ("text", "token_ids", "tokens", "text_offsets", "logprobs", "top_logprobs", "latents", "finish_reason",
        "stop_string", "usage", "seed")  # fmt: skip


def alone(index: int) -> generation_pb2.GenerateRequest:
    """What a branch amounts to."""
    request = generation_pb2.GenerateRequest(prompt=PROMPT, with_latents=True, **SHARED)
    request.seed.sample_id += index
    own = OWN[index]
    if "seed" in own:
        request.ClearField("seed")
    if "stop" in own:
        request.ClearField("stop")
    request.MergeFrom(generation_pb2.GenerateRequest(**own))
    return request


async def answers(services: Any, request: pb.ForkRequest) -> list[list[pb.ForkResponse]]:
    """Those of each branch."""
    found: list[list[pb.ForkResponse]] = [[] for _ in request.branches]
    async for [response] in fork(services, request, Call()):
        found[response.branch].append(response)
    for branch in found:
        assert [response.block_index for response in branch] == list(range(len(branch)))
    return found


def reported(responses: Any) -> list[Any]:
    return [[getattr(response, name) for name in SAME] for response in responses]


async def test_each_branch_is_what_a_generation_alone_is_and_the_prefix_is_encoded_once(world):
    expected = [[each async for each in world.ask(generate, alone(index))] for index in range(3)]
    encoded = len(world.encoder.calls)
    found = await answers(world.coordinator.services, pb.ForkRequest(text=PROMPT, branches=OWN, **SHARED))
    assert list(map(reported, found)) == list(map(reported, expected))
    assert len(world.encoder.calls) == encoded + 1
    assert world.running == (0, 0)
    ids = types_pb2.TokenIds(ids=world.tokenizer.encode(PROMPT))
    again = await answers(world.coordinator.services, pb.ForkRequest(ids=ids, branches=OWN, **SHARED))
    assert list(map(reported, again)) == list(map(reported, expected))


async def test_latents_are_a_prefix_too(world):
    """Its tokens are those of all positions: here P is 1."""
    services, ids = world.coordinator.services, world.tokenizer.encode(PROMPT)
    latents = types_pb2.Latents(
        values=types_pb2.Tensor(dtype=1, shape=[len(ids), 2], data=world.encoder.encode(ids).tobytes())
    )
    by_ids = await answers(services, pb.ForkRequest(ids={"ids": ids}, branches=OWN, **SHARED))
    by_latents = await answers(services, pb.ForkRequest(latents=latents, branches=OWN, **SHARED))
    for one, other in zip(by_ids, by_latents, strict=True):
        assert [(each.token_ids, each.latents, each.usage) for each in one] == [
            (each.token_ids, each.latents, each.usage) for each in other
        ]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
async def test_branches_that_break_go_on_elsewhere_with_the_same_tokens(world, stage: str):
    request = pb.ForkRequest(text=PROMPT, branches=OWN, **SHARED)
    undisturbed = await answers(world.coordinator.services, request)
    fake = getattr(world, stage)
    fake.faults = {call: (call % 3, StatusCode.UNAVAILABLE) for call in range(len(fake.calls), len(fake.calls) + 4)}
    found = await answers(world.coordinator.services, request)
    assert list(map(reported, found)) == list(map(reported, undisturbed))


async def test_all_branches_go_to_one_replica_and_to_another_when_that_ends(tokenizer: Tokenizer):
    fleet = Fleet(tokenizer, count=3)
    await fleet.coordinator.connect()
    request = pb.ForkRequest(text=PROMPT, branches=[{}] * 8, **SHARED)
    undisturbed = await answers(fleet.coordinator.services, request)
    for stage in ("prior", "decoder"):
        assert sorted(fleet.calls(stage)) == [0, 0, 8]
        for replica in fleet.replicas[stage]:
            if replica.fake.calls:
                replica.serving, replica.fake.faults = False, dict.fromkeys(range(99), (0, StatusCode.UNAVAILABLE))
    found = await answers(fleet.coordinator.services, request)
    assert list(map(reported, found)) == list(map(reported, undisturbed))
    for stage in ("prior", "decoder"):
        assert sorted(fleet.calls(stage)) == [0, 8, 8]


async def test_branches_run_side_by_side_and_leaving_frees_them_all(world):
    world.decoder.gate.clear()
    responses = world.ask(fork, pb.ForkRequest(branches=[{}] * MOST_BRANCHES, **SHARED))
    async with aclosing(responses):
        first = asyncio.ensure_future(anext(responses))
        await eventually(lambda: world.decoder.running == AT_ONCE)
        assert world.prior.running == AT_ONCE
        world.decoder.gate.set()
        await first
    await eventually(lambda: world.running == (0, 0))
    found = await answers(world.coordinator.services, pb.ForkRequest(branches=[{}] * MOST_BRANCHES, **SHARED))
    assert all(branch[-1].finish_reason for branch in found)
    assert [branch[-1].seed.sample_id for branch in found] == [2 + index for index in range(MOST_BRANCHES)]


async def test_a_branch_that_fails_ends_the_call(make_world):
    world = await make_world(FakeDecoder(faults={1: (1, StatusCode.INVALID_ARGUMENT)}))
    world.decoder.faults |= dict.fromkeys(range(2, 99), (0, StatusCode.INVALID_ARGUMENT))
    with pytest.raises(Exception, match="decoder"):
        await answers(world.coordinator.services, pb.ForkRequest(branches=[{}] * 3, **SHARED))
    await eventually(lambda: world.running == (0, 0))


@pytest.mark.parametrize("of_all", [True, False])
async def test_very_many_probes_are_refused_before_they_are_copied(world, of_all: bool):
    sampler = types_pb2.Sampler.FromString(b"\x4a\x00" * 500_000)  # steering, each empty
    request = (
        pb.ForkRequest(branches=[{}], sampler=sampler) if of_all else pb.ForkRequest(branches=[{"sampler": sampler}])
    )
    begun = time.process_time()
    with pytest.raises(InvalidRequest, match=r"sampler\.steering: got 500000 probes"):
        await answers(world.coordinator.services, request)
    assert time.process_time() - begun < 0.1


async def test_branches_that_begin_late_do_not_pass_calls_that_came_before(make_world):
    world = await make_world(max_running=1)
    await world.generate(prompt="a", max_new_tokens=4)  # so that it is known how long a call takes
    world.prior.gate.clear()
    request = pb.ForkRequest(branches=[{}] * 2 * AT_ONCE, **SHARED)
    forked = asyncio.create_task(answers(world.coordinator.services, request))
    await eventually(lambda: world.coordinator.services.admission.waiting == AT_ONCE - 1)
    other = asyncio.create_task(world.generate(prompt="a", max_new_tokens=4))
    await eventually(lambda: world.coordinator.services.admission.waiting == AT_ONCE)
    world.prior.gate.set()
    await other
    assert len(world.prior.calls) <= AT_ONCE + 3
    await forked


@pytest.mark.parametrize("limits", [{"max_running": 1}, {"max_per_key": 3}, {"max_running": 1, "queue_seconds": 1e-6}])
async def test_no_branch_is_refused_once_the_first_one_is_taken(make_world, limits: dict[str, Any]):
    world = await make_world(**limits)
    request = pb.ForkRequest(branches=[{}] * 2 * AT_ONCE, **SHARED)
    found = await answers(world.coordinator.services, request)
    assert all(branch[-1].finish_reason for branch in found)


async def test_a_caller_forks_as_far_as_its_other_calls_leave_room(make_world):
    world = await make_world(max_per_key=4)
    world.prior.gate.clear()
    async with world.coordinator.services.admission.slot(Call()):
        request = pb.ForkRequest(branches=[{}] * 9, **SHARED)
        forked = asyncio.create_task(answers(world.coordinator.services, request))
        await eventually(lambda: world.prior.running >= 3)
        for _ in range(50):
            await asyncio.sleep(0)
        assert world.prior.running == 3
        world.prior.gate.set()
        await forked
