"""Several continuations of one prefix, which is encoded once, and whose KV the stages compute and hold once."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from google.protobuf.message import Message

from colaserve.v1 import generation_pb2, types_pb2
from colaserve.v1 import latent_service_pb2 as pb
from colaserve_services.coordinator import rows
from colaserve_services.coordinator.call import Call
from colaserve_services.coordinator.context import ServiceContext, add_timing
from colaserve_services.coordinator.defaults import resolve_seed
from colaserve_services.coordinator.generation import Response, are_previews, write
from colaserve_services.coordinator.latent_space import given_latents
from colaserve_services.coordinator.plan import Plan, check_stops, plan_behind
from colaserve_services.coordinator.read_ahead import merged
from colaserve_services.errors import InvalidRequest
from colaserve_services.rpc import arrays, steering

MOST_BRANCHES: Final = 128
AT_ONCE: Final = 16
_FIELD_BY_FIELD: Final = ("sampler", "sampling")


async def fork(
    services: ServiceContext, request: pb.ForkRequest, call: Call
) -> AsyncGenerator[list[pb.ForkResponse], None]:
    """LatentService.Fork. Each branch is a generation of its own; all go to the same replicas."""
    services.admission.check(call, "prior")
    call.use_salt(request.cache_salt)
    ids, latents = await _prefix(services, request)
    plans, timing = _plans(services, request, ids, latents), types_pb2.Timing()
    if latents is None:
        async with services.admission.slot(call):
            answer = await services.encode([ids], call)
        latents, timing = answer.encodings[0].latents, answer.timing
    call.near = {}
    calls = [replace(call, admitted=index > 0) for index in range(len(plans))]
    at_once = services.admission.left_to(call, AT_ONCE)

    def preempt(reading: asyncio.Future[None]) -> None:
        for each in calls:
            each.preempt(reading)

    call.preempt = preempt
    streams = [_branch(services, replace(plan, latents=latents), each) for plan, each in zip(plans, calls, strict=True)]
    written = [0] * len(plans)  # blocks of each
    async with aclosing(merged(streams, at_once, are_previews)) as found:
        async for branch, responses in found:
            if responses[-1].finish_reason:
                add_timing(responses[-1].timing, timing)
            every = [{field.name: value for field, value in response.ListFields()} for response in responses]
            yield [pb.ForkResponse(branch=branch, block_index=written[branch], **fields) for fields in every]
            written[branch] += not are_previews(responses)


async def _branch(services: ServiceContext, plan: Plan, call: Call) -> AsyncGenerator[list[Response], None]:
    """Write a branch. It is queued as if its call had just come, so it does not overtake calls that came before."""
    call.arrived = time.monotonic()
    async with aclosing(write(services, plan, call)) as responses:
        async for response in responses:
            yield response


async def _prefix(services: ServiceContext, request: pb.ForkRequest) -> tuple[Sequence[int], types_pb2.Latents | None]:
    """The ids of the prefix, and its latents as far as they need no encoding."""
    kind = request.WhichOneof("prefix")
    if kind == "latents":
        return (), given_latents(services, request.latents, "latents", least=0)
    ids = services.checked(request.ids.ids, "ids") if kind == "ids" else await services.tokenize(request.text, "text")
    return ids, None if ids else services.no_latents()


def _plans(
    services: ServiceContext, request: pb.ForkRequest, ids: Sequence[int], latents: types_pb2.Latents | None
) -> list[Plan]:
    """Of each branch. What all share is checked first, so that a branch's name stands before its own faults."""
    if not 1 <= len(request.branches) <= MOST_BRANCHES:
        raise InvalidRequest("branches", f"got {len(request.branches)} branches, expected 1 to {MOST_BRANCHES}")
    tokens = len(ids) if latents is None else rows.count(latents) * services.model.patch_size
    shared = generation_pb2.GenerateRequest(with_latents=True)
    _check_counts(request, "")
    _replace(shared, request)
    shared.seed.CopyFrom(resolve_seed(request, 1))
    names = {"prompt": str(request.WhichOneof("prefix"))}

    def planned(asked: generation_pb2.GenerateRequest, path: str) -> Plan:
        try:
            return plan_behind(services, asked, ids, tokens)
        except InvalidRequest as error:
            message = str(error).removeprefix(f"{error.field}: ")
            raise InvalidRequest(names.get(error.field) or path + error.field, message) from error

    planned(shared, "")
    plans = []
    for index, branch in enumerate(request.branches):
        own, path = generation_pb2.GenerateRequest(), f"branches[{index}]."
        _check_counts(branch, path)
        own.CopyFrom(shared)
        own.seed.sample_id += index
        _replace(own, branch)
        plans.append(_with_own(services, branch, planned(own, path), path))
    return plans


def _check_counts(given: pb.ForkRequest | pb.ForkBranch, path: str) -> None:
    """Of what is copied item by item, before it is."""
    check_stops(given.stop, f"{path}stop")
    steering.check_count(given.sampler.steering, f"{path}sampler.steering")


def _replace(message: Message, given: Message) -> None:
    """Take over what is set of the fields that both have; of a sampler and a sampling, field by field."""
    for field, value in given.ListFields():
        if field.name not in message.DESCRIPTOR.fields_by_name:
            continue
        if field.name in _FIELD_BY_FIELD:
            _replace(getattr(message, field.name), value)
            continue
        message.ClearField(field.name)
        message.MergeFrom(type(message)(**{field.name: value}))


def _with_own(services: ServiceContext, branch: pb.ForkBranch, plan: Plan, path: str) -> Plan:
    """With what the branch itself brings: noise, and blocks."""
    B, d, noise = services.model.block_size, services.model.latent_dim, None
    if branch.HasField("noise"):
        noise = rows.of(arrays.from_message(branch.noise, f"{path}noise", (plan.blocks, B, d)).tobytes(), d, "")
        if plan.sampler.resamples > 1:
            fault = f"not with sampler.resamples {plan.sampler.resamples}: above 1 needs a seed"
            raise InvalidRequest(f"{path}noise", fault)
    written = given_latents(services, branch.written, f"{path}written", least=0)
    count = rows.count(written)
    if count % B or count > plan.blocks * B:
        what = f"got {count} latents, expected whole blocks of {B}, at most the {plan.blocks} of max_new_tokens"
        raise InvalidRequest(f"{path}written", what)
    blocks = [rows.take(written, start, start + B) for start in range(0, count, B)]
    return replace(plan, noise=noise, written=blocks)
