"""Every field of the LatentService's requests has its effect, through real stages behind real sockets."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from colaserve.v1 import latent_service_pb2 as pb
from colaserve.v1 import types_pb2
from tests.conftest import load_golden
from tests.services.systems import System, system

ONE, OTHER = "He looked at the river and then he said", "A guardian angel walked in and sat down by the fire"
SAMPLER = {"steps": 4, "guidance_scale": 3}
SAMPLING = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 1}
SEED = {"base_seed": 5}
WHOLE = {"Latents", "TokenIds"}  # messages that are one value

OF_SAMPLER = {
    "sampler.steps": {"sampler": {"steps": 3}},
    "sampler.guidance_scale": {"sampler": {"guidance_scale": 1.5}},
    "sampler.solver": {"sampler": {"solver": types_pb2.SOLVER_HEUN}},
    "sampler.guidance_start": {"sampler": {"guidance_start": 0.5}},
    "sampler.guidance_end": {"sampler": {"guidance_end": 0.5}},
    "sampler.resamples": {"sampler": {"resamples": 2}},
}
OF_SAMPLING = {
    "sampling.temperature": {"sampling": {"temperature": 0}},
    "sampling.top_k": {"sampling": {"top_k": 1}},
    "sampling.top_p": {"sampling": {"top_p": 0.01}},
    "sampling.repetition_penalty": {"sampling": {"repetition_penalty": 50}},
    "sampling.seed": {"sampling": {"seed": 4}},
}
OF_SEED = {"seed.base_seed": {"seed": {"base_seed": 6}}, "seed.sample_id": {"seed": {"sample_id": 3}}}

Fields = dict[str, Any]


def walks(latents: types_pb2.Latents, others: types_pb2.Latents) -> dict[str, tuple[type, Fields, dict[str, Fields]]]:
    """Method -> its request, a base, and for each field path a change to the base."""
    holes = [{"text": ONE}, {"token_count": 12}, {"text": OTHER}]
    return {
        "EncodeText": (
            pb.EncodeTextRequest,
            {"texts": [ONE]},
            {"texts": {"texts": [OTHER]}, "with_variance": {"with_variance": True}},
        ),
        "DecodeLatents": (
            pb.DecodeLatentsRequest,
            {"latents": latents, "sampling": SAMPLING},
            {
                "latents": {"latents": others},
                **OF_SAMPLING,
                "top_logprobs": {"top_logprobs": 2},
                "target_ids": {"target_ids": [7, 8]},
                "token_count": {"token_count": 3},
            },
        ),
        "SampleLatents": (
            pb.SampleLatentsRequest,
            {"prefix": latents, "max_blocks": 2, "sampler": SAMPLER, "seed": SEED},
            {"prefix": {"prefix": others}, "max_blocks": {"max_blocks": 3}, **OF_SAMPLER, **OF_SEED},
        ),
        "Interpolate": (
            pb.InterpolateRequest,
            {"start": {"latents": latents}, "end": {"latents": others}, "points": 3, "sampling": SAMPLING},
            {
                "start.text": {"start": {"text": ONE[:-1]}, "end": {"text": OTHER}},
                "start.latents": {"start": {"latents": others}},
                "end.text": {"start": {"text": ONE}, "end": {"text": OTHER[:-1]}},
                "end.latents": {"end": {"latents": latents}},
                "points": {"points": 4},
                "interpolation": {"interpolation": pb.INTERPOLATION_LERP},
                **OF_SAMPLING,
            },
        ),
        "Infill": (
            pb.InfillRequest,
            {"segments": holes, "sampler": SAMPLER, "sampling": SAMPLING, "seed": SEED},
            {
                "segments.text": {"segments": [{"text": OTHER}, *holes[1:]]},
                "segments.token_count": {"segments": [holes[0], {"token_count": 9}, holes[2]]},
                **OF_SAMPLER,
                **OF_SAMPLING,
                **OF_SEED,
            },
        ),
        "Reconstruct": (pb.ReconstructRequest, {"texts": [ONE]}, {"texts": {"texts": [OTHER]}}),
    }


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.name not in WHOLE:
            yield from leaves(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_the_walk_covers_every_method_and_field() -> None:
    service = pb.DESCRIPTOR.services_by_name["LatentService"]
    found = walks(types_pb2.Latents(), types_pb2.Latents())
    assert {*found, "GetInfo"} == {method.name for method in service.methods}
    for request, _, changes in found.values():
        assert set(changes) == set(leaves(request.DESCRIPTOR)), request.DESCRIPTOR.name


async def answer(served: System, method: str, request: Any) -> list[bytes]:
    """What came back, without its timing: one message, or those of a stream."""
    call = getattr(served.latents, method)(request)
    responses = [response async for response in call] if hasattr(call, "__aiter__") else [await call]
    for response in responses:
        response.ClearField("timing")
    return [response.SerializeToString(deterministic=True) for response in responses]


def merged(base: Fields, change: Fields) -> Fields:
    """Sampler, sampling and seed keep what the change does not name."""
    keep = {"sampler", "sampling", "seed"}
    return base | {name: base[name] | value if name in keep else value for name, value in change.items()}


@pytest.fixture
async def latents() -> Any:
    """The system, and the latents of two texts of as many positions."""
    async with system(load_golden("tiny_b4"), split=True) as served:
        encoded = await served.latents.EncodeText(pb.EncodeTextRequest(texts=[ONE, OTHER]))
        one, other = (encoding.latents for encoding in encoded.encodings)
        rows = min(one.values.shape[0], other.values.shape[0]) // 4 * 4 - 1
        yield served, first(one, rows), first(other, rows)


def first(latents: types_pb2.Latents, rows: int) -> types_pb2.Latents:
    """Their first positions."""
    width = latents.values.shape[1]
    values = types_pb2.Tensor(
        dtype=latents.values.dtype, shape=[rows, width], data=latents.values.data[: 4 * rows * width]
    )
    return types_pb2.Latents(values=values, space=latents.space)


async def test_every_field_has_its_effect(latents: Any) -> None:
    served, one, other = latents
    for method, (request, base, changes) in walks(one, other).items():
        await answer(served, method, request(**base))  # its prefix is cached from here on: equal passes, equal bytes
        as_it_is = await answer(served, method, request(**base))
        assert await answer(served, method, request(**base)) == as_it_is, f"{method} repeats itself"
        for field, change in changes.items():
            assert await answer(served, method, request(**merged(base, change))) != as_it_is, f"{method}: {field}"


async def test_latents_of_another_space_are_refused_wherever_they_are_taken(latents: Any) -> None:
    served, one, other = latents
    strange = types_pb2.Latents(values=one.values, space="0123456789abcdef")
    for method, name in (("DecodeLatents", "latents"), ("SampleLatents", "prefix"), ("Interpolate", "start.latents")):
        request, base, changes = walks(strange, other)[method]
        assert name in changes
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(served, method, request(**base))
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION, method
        assert name in (refused.value.details() or ""), method
